"""The delta rule's forms against the recurrence, in values and gradients."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from cases import packed
from supra_kernels import delta_rule

DIGITS = {torch.float64: 1e-12, torch.float32: 2e-5}


def inputs(decay, batch=2, length=150, heads=4, kv_heads=2, key_dim=8, v_dim=6, states=None):
    """[q, k, v, g, beta, state], of a state a head or of `states`; every seventh decay is hard, β reaches over 1."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=rng)

    states = states or heads
    rows = (batch, length, states)
    g = {"none": None, "head": -torch.rand(rows, generator=rng), "channel": -torch.rand(*rows, key_dim, generator=rng)}
    if g[decay] is not None:
        g[decay][:, ::7] = -88
    k = torch.nn.functional.normalize(normal(batch, length, kv_heads, key_dim), dim=-1)
    beta = 2 * torch.rand(rows, generator=rng)
    state = normal(batch, states, key_dim, v_dim)
    return [normal(batch, length, heads, key_dim), k, normal(batch, length, kv_heads, v_dim), g[decay], beta, state]


def differentiate(form, values, dtype, segment=None):
    """-> o, S and the gradients of a random projection of both; the output on padding counts for nothing."""
    given = [None if x is None else x.to(dtype).clone().requires_grad_() for x in values]
    o, S = delta_rule(*given[:5], scale=0.3, state=given[5], segment=segment, form=form)
    assert o.isfinite().all()
    o = o if segment is None else o.masked_fill(segment[..., None, None] < 0, 0)
    rng = torch.Generator().manual_seed(1)
    do, dS = (torch.randn(x.shape, generator=rng, dtype=torch.float64) for x in (o, S))
    ((o.double() * do).sum() + (S.double() * dS).sum()).backward()
    return [o, S, *(x.grad for x in given if x is not None)]


@pytest.mark.parametrize("dtype", DIGITS, ids=str)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("decay", ["none", "head", "channel"])
@pytest.mark.parametrize("shape", [(4, 2, 4), (6, 1, 2), (4, 2, 2)], ids=str)
def test_every_form_is_the_recurrence(shape, decay, documents, dtype):
    """Against float64, over three chunks and a rest, with documents of one token and padding anywhere; as many query
    heads, kv heads and states as the operator takes."""
    heads, kv_heads, states = shape
    values = inputs(decay, heads=heads, kv_heads=kv_heads, states=states)
    segment = packed(2, 150, padding=0.2) if documents else None
    want = differentiate("naive", values, torch.float64, segment)
    for form in ("chunk", "step"):
        got = differentiate(form, values, dtype, segment)
        for x, y in zip(got, want, strict=True):
            assert (x.double() - y).norm() <= DIGITS[dtype] * y.norm(), form


@pytest.mark.parametrize("states", [2, 1])
@pytest.mark.parametrize("decay", ["none", "head", "channel"])
def test_what_autograd_says_of_the_chunk_form_is_its_slope(decay, states):
    values = [None if x is None else x.double().requires_grad_() for x in inputs(decay, 1, 21, 2, 1, 3, 2, states)]
    if values[3] is not None:
        values[3] = (values[3].detach() / 100).requires_grad_()
    torch.autograd.gradcheck(lambda *x: delta_rule(*x[:5], scale=0.5, state=x[5], form="chunk"), values, fast_mode=True)


@pytest.mark.parametrize("decay", ["none", "head", "channel"])
def test_heads_that_read_one_state_are_heads_whose_states_are_alike(decay):
    q, k, v, g, beta, state = (None if x is None else x.double() for x in inputs(decay, heads=6, states=2))
    shared, S = delta_rule(q, k, v, g, beta, state=state, form="chunk")
    g, beta = (None if x is None else x.repeat_interleave(3, 2) for x in (g, beta))
    apart, each = delta_rule(q, k, v, g, beta, state=state.repeat_interleave(3, 1), form="naive")
    torch.testing.assert_close(shared, apart)
    torch.testing.assert_close(S.repeat_interleave(3, 1), each)


@pytest.mark.parametrize("decay", ["none", "head", "channel"])
def test_a_loss_on_the_state_alone_is_differentiated(decay):
    """The output has no gradient then, and is of more heads than the state."""
    grads = []
    for form in ("naive", "chunk"):
        given = [None if x is None else x.double().requires_grad_() for x in inputs(decay, heads=6, states=2)]
        _, S = delta_rule(*given[:5], state=given[5], form=form)
        _, *of = torch.autograd.grad(S.square().sum(), [x for x in given if x is not None], allow_unused=True)
        grads.append(of)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("states", [4, 2])
@pytest.mark.parametrize("decay", ["none", "head", "channel"])
def test_a_prompt_and_then_steps_are_one_pass(decay, states):
    *values, state = (None if x is None else x.double() for x in inputs(decay, states=states))
    whole, end = delta_rule(*values, state=state, form="chunk")
    o, S = delta_rule(*(None if x is None else x[:, :131] for x in values), state=state)
    parts = [o]
    for t in range(131, 150):
        o, S = delta_rule(*(None if x is None else x[:, t : t + 1] for x in values), state=S)
        parts.append(o)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(S, end)


@pytest.mark.parametrize("form", ["chunk", "step"])
def test_bf16_queries_are_scaled_in_fp32(form):
    q, k, v, g, beta, state = inputs("head")
    q = q.bfloat16()
    o, _ = delta_rule(q, k, v, g, beta, scale=0.3, state=state.clone(), form=form)
    want, _ = delta_rule(*(x.double() for x in (q, k, v, g, beta)), scale=0.3, state=state.double(), form="naive")
    assert (o.double() - want).norm() <= DIGITS[torch.float32] * want.norm()


def test_a_state_of_inference_mode_is_left_alone_outside_of_it():
    *values, state = inputs("head", length=2)
    want = delta_rule(*values, state=state, form="naive")
    with torch.inference_mode():
        made = state.clone()
    torch.testing.assert_close(delta_rule(*values, state=made, form="step"), want)
    assert torch.equal(made, state)


def test_a_value_written_whole_is_what_its_key_reads():
    """β = 1 and |k| = 1: also where the same key held another value before, which is taken out."""
    k = torch.nn.functional.normalize(torch.randn(1, 1, 1, 8), dim=-1).expand(1, 80, 1, 8)
    v = torch.randn(1, 80, 1, 6)
    o, _ = delta_rule(k, k, v, None, torch.ones(1, 80, 1), form="chunk")
    torch.testing.assert_close(o, v, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("decay", "documents", "states"), product(("head", "channel"), (False, True), (4, 2)))
def test_the_operator_keeps_its_word_to_torch_compile(decay, documents, states):
    """Shapes, dtypes and gradients of the fake tensors, by torch's own check."""
    given = [x.requires_grad_() for x in inputs(decay, kv_heads=states, states=states)]
    packing = torch.tensor([[1, 1, *[3] * 148]] * 2, dtype=torch.int32) if documents else None
    torch.library.opcheck(torch.ops.supra.delta_chunk, (*given, packing, 0.5, True))


def test_what_does_not_fit_is_said():
    q, k, v, g, beta, state = inputs("head")
    three, none = beta[..., :3], beta[..., :0]
    for what, wrong in (
        ("g is", (q, k, v, g[..., :2], beta, state)),
        ("beta is", (q, k, v, g, beta[:1], state)),
        ("beta is", (q, k, v, None, beta[0, 0, 0], None)),
        ("beta is", (q, k, v, None, none, None)),
        ("beta is", (q, k, v, g[..., :3], three, state[:, :3])),
        ("beta is", (q, k, v, g[..., :1], beta[..., :1], state[:, :1])),
        ("q .* with H a multiple of G", (q, k[:, :3], v, g, beta, state)),
        ("state is", (q, k, v, g[..., :2], beta[..., :2], state)),
    ):
        with pytest.raises(ValueError, match=f"^{what}.* got"):
            delta_rule(*wrong[:5], state=wrong[5])
    with pytest.raises(ValueError, match="form is one of naive, chunk, step, got 'fast'"):
        delta_rule(q, k, v, g, beta, form="fast")
