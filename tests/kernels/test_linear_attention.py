"""Every form against the recurrence in float64: value, every gradient and the final state.

Tolerances are RMS(error) / RMS(reference). 1e-12 in float64. In fp32 1e-6: sums of some hundred terms, each rounded at
6e-8. Ten times that for the gradient of a decay: it sums signed terms over all tokens, which cancel. 1e-2 in bf16:
inputs and output are rounded at 4e-3, the arithmetic is fp32.
"""

from __future__ import annotations

import math

import pytest
import torch
from cases import DECAYS, assert_agrees, differentiate, inputs, packed, with_sums
from hypothesis import given, settings
from hypothesis import strategies as st
from supra_kernels import linear_attention, weights

FAST = ("chunk", "step")


def check(form, values, dtype, segment=None):
    assert_agrees(
        differentiate(form, values, dtype, segment), differentiate("naive", values, torch.float64, segment), dtype
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 129, 500])
def test_chunk_equals_the_recurrence(length, decay, dtype):
    check("chunk", inputs(2, length, 4, 2, 8, 5, decay), dtype)


@pytest.mark.parametrize("decay", DECAYS)
def test_chunk_equals_the_recurrence_over_many_blocks(decay, monkeypatch):
    monkeypatch.setattr("supra_kernels.chunk.BLOCK_ELEMENTS", 1)
    check("chunk", inputs(1, 1024 + 17, 2, 1, 4, 6, decay), torch.float64)
    check("chunk", inputs(1, 1024 + 17, 2, 1, 4, 6, decay), torch.float64, packed(1, 1041))


@pytest.mark.parametrize("decay", DECAYS)
def test_step_equals_the_recurrence(decay):
    for dtype in (torch.float64, torch.float32):
        check("step", inputs(3, 7, 4, 2, 8, 5, decay), dtype)
        check("step", inputs(3, 30, 4, 2, 8, 5, decay), dtype, packed(3, 30, padding=0.2, document=5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("padding", [0.0, 0.3])
def test_documents_and_padding_equal_the_recurrence(padding, decay, dtype):
    check("chunk", inputs(3, 200, 4, 2, 8, 5, decay), dtype, packed(3, 200, padding=padding))


@pytest.mark.parametrize("form", ["naive", *FAST])
@pytest.mark.parametrize("decay", ["none", "fixed", "token"])
def test_each_document_of_a_packed_row_is_computed_alone(form, decay):
    q, k, v, g, state = inputs(1, 150, 2, 1, 4, 4, decay)
    segment = packed(1, 150)
    o, S = linear_attention(q, k, v, g, state=state.clone(), segment=segment, form=form)
    for number in segment.unique():
        at = (segment[0] == number).nonzero()[:, 0]
        per_token = g if g is None or g.dim() == 1 else g[:, at]
        initial = state if number == segment[0, 0] else None
        alone, end = linear_attention(q[:, at], k[:, at], v[:, at], per_token, state=initial, form="naive")
        torch.testing.assert_close(o[:, at], alone, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(S, end, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("form", ["naive", *FAST])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("where", ["left", "right", "interior", "everywhere"])
def test_padding_changes_nothing_for_the_real_tokens(form, decay, where):
    q, k, v, g, state = inputs(2, 140, 2, 2, 4, 4, decay)
    at = {
        "left": torch.arange(140) >= 70,
        "right": torch.arange(140) < 70,
        "interior": (torch.arange(140) < 10) | (torch.arange(140) > 80),
        "everywhere": torch.zeros(140, dtype=torch.bool),
    }[where]
    segment = torch.where(at, 0, -1).expand(2, 140)
    o, S = linear_attention(q, k, v, g, state=state.clone(), segment=segment, form=form)
    assert o.isfinite().all()
    if where == "everywhere":
        torch.testing.assert_close(S, state, atol=0, rtol=0)
        return
    per_token = g if g is None or g.dim() == 1 else g[:, at]
    alone, end = linear_attention(q[:, at], k[:, at], v[:, at], per_token, state=state, form="naive")
    torch.testing.assert_close(o[:, at], alone, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(S, end, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("gamma", [0.2, 0.01])
def test_a_small_decay_over_129_tokens_gives_no_nan_in_the_final_state(gamma):
    """flash-linear-attention's chunked form gives an all-NaN final state here."""
    values = inputs(1, 129, 1, 1, 16, 16, "none")
    values[3] = torch.tensor([math.log(gamma)])
    check("chunk", values, torch.float32)


@pytest.mark.parametrize("form", ["naive", *FAST])
def test_a_decay_of_zero_forgets_everything(form):
    q, k, v, _, state = inputs(1, 70, 1, 1, 4, 4)
    o, S = linear_attention(q, k, v, torch.tensor([-math.inf]), state=state.clone(), form=form)
    torch.testing.assert_close(S[0, 0], torch.outer(k[0, -1, 0], v[0, -1, 0]))
    torch.testing.assert_close(o, (q * k).sum(-1, keepdim=True) * v)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "key_dim", "v_dim"),
    [(1, 1, 1, 1), (6, 2, 3, 16), (8, 1, 16, 8), (3, 3, 33, 64), (2, 1, 128, 40)],
)
def test_any_heads_and_widths(heads, kv_heads, key_dim, v_dim):
    check("chunk", inputs(2, 70, heads, kv_heads, key_dim, v_dim, "token"), torch.float32)
    check("chunk", inputs(2, 70, heads, kv_heads, key_dim, v_dim, "fixed"), torch.float32, packed(2, 70))


@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 200),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    key_dim=st.integers(1, 9),
    v_dim=st.integers(1, 9),
    decay=st.sampled_from(DECAYS),
    layout=st.sampled_from(["none", "packed", "padded"]),
    state=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_random_shapes_equal_the_recurrence(batch, length, kv_heads, group, key_dim, v_dim, decay, layout, state, seed):
    segment = None if layout == "none" else packed(batch, length, seed, 0.3 if layout == "padded" else 0.0)
    check(
        "chunk",
        inputs(batch, length, kv_heads * group, kv_heads, key_dim, v_dim, decay, state, seed),
        torch.float64,
        segment,
    )


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("packing", [False, True])
def test_a_sequence_in_two_pieces_equals_the_whole(decay, packing):
    q, k, v, g, state = (None if x is None else x.double() for x in inputs(2, 150, 4, 2, 8, 5, decay))
    segment = packed(2, 150, padding=0.2) if packing else None
    whole, end = linear_attention(q, k, v, g, state=state, segment=segment, form="chunk")
    for cut in (1, 64, 149):
        parts, S = [], state
        for at in (slice(0, cut), slice(cut, None)):
            per_token = g if g is None or g.dim() == 1 else g[:, at]
            piece = None if segment is None else segment[:, at]
            if piece is not None and at.start == cut:
                _reset_where_a_document_starts(S, segment, cut)
            o, S = linear_attention(q[:, at], k[:, at], v[:, at], per_token, state=S, segment=piece, form="chunk")
            parts.append(o)
        real = torch.ones(2, 150, dtype=torch.bool) if segment is None else segment >= 0
        torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real])
        torch.testing.assert_close(S, end)


def _reset_where_a_document_starts(S, segment, cut):
    """A state belongs to the document of its row's first real token: the caller zeroes it where that is another one."""
    for row in range(len(segment)):
        before, after = segment[row, :cut], segment[row, cut:]
        before, after = before[before >= 0], after[after >= 0]
        if len(before) and len(after) and before[-1] != after[0]:
            S[row] = 0


@pytest.mark.parametrize("decay", DECAYS)
def test_prefill_then_steps_equals_one_pass(decay):
    q, k, v, g, _ = inputs(2, 140, 4, 2, 16, 16, decay)
    whole, end = linear_attention(q, k, v, g, form="naive")

    def at(a, b):
        return q[:, a:b], k[:, a:b], v[:, a:b], g if g is None or g.dim() == 1 else g[:, a:b]

    o, S = linear_attention(*at(0, 130), form="chunk")
    outputs = [o]
    for t in range(130, 140):
        o, S = linear_attention(*at(t, t + 1), state=S, form="step")
        outputs.append(o)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(S, end, atol=1e-4, rtol=1e-5)


def test_a_step_without_gradient_overwrites_its_state():
    q, k, v, g, state = inputs(2, 1, 4, 2, 8, 8)
    _, S = linear_attention(q, k, v, g, state=state, form="step")
    assert S.data_ptr() == state.data_ptr()


def test_a_state_of_inference_mode_is_left_alone_outside_of_it():
    q, k, v, g, state = inputs(2, 2, 4, 2, 8, 8)
    want = linear_attention(q, k, v, g, state=state, form="naive")
    with torch.inference_mode():
        made = state.clone()
    torch.testing.assert_close(linear_attention(q, k, v, g, state=made, form="step"), want)
    assert torch.equal(made, state)
    with torch.inference_mode():
        _, S = linear_attention(q, k, v, g, state=made, form="step")
    assert S.data_ptr() == made.data_ptr()


def test_a_step_with_gradient_and_the_chunked_form_leave_the_state_alone():
    q, k, v, g, state = inputs(2, 1, 4, 2, 8, 8)
    before = state.clone()
    linear_attention(q.requires_grad_(), k, v, g, state=state, form="step")
    linear_attention(q.detach(), k, v, g, state=state, form="chunk")
    assert torch.equal(state, before)


def test_the_gradients_are_those_of_the_recurrence_that_runs_backwards():
    """As the operator's docstring has it, written out token by token."""
    q, k, v, g, S = (x.double() for x in inputs(1, 9, 2, 2, 3, 4, "token"))
    leaves = [x.clone().requires_grad_() for x in (q, k, v, g, S)]
    o, end = linear_attention(*leaves[:4], scale=0.5, state=leaves[4], form="chunk")
    do, dS = torch.randn_like(o), torch.randn_like(end)
    states, given, kept = [S], [torch.zeros_like(x) for x in (q, k, v, g)], torch.ones_like(S[..., :1, :1])
    for t in range(9):
        S = g[:, t].exp()[..., None, None] * S + k[:, t, :, :, None] * v[:, t, :, None, :]
        states.append(S)
    after = dS
    for t in reversed(range(9)):
        after = kept * after + 0.5 * q[:, t, :, :, None] * do[:, t, :, None, :]
        kept = g[:, t].exp()[..., None, None]
        given[0][:, t] = 0.5 * (states[t + 1] @ do[:, t, :, :, None]).squeeze(-1)
        given[1][:, t] = (after @ v[:, t, :, :, None]).squeeze(-1)
        given[2][:, t] = (after.mT @ k[:, t, :, :, None]).squeeze(-1)
        given[3][:, t] = (kept * states[t] * after).sum((-2, -1))
    got = torch.autograd.grad((o, end), leaves, (do, dS))
    for x, y in zip(got, (*given, kept * after), strict=True):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("decay", ["none", "fixed", "token"])
@pytest.mark.parametrize("packing", [False, True])
def test_gradients_pass_gradcheck(decay, packing):
    values = [None if x is None else x.double().requires_grad_() for x in inputs(1, 67, 2, 1, 2, 3, decay)]
    segment = packed(1, 67, padding=0.1) if packing else None

    def run(*given_values):
        rest = iter(given_values)
        q, k, v, g, state = (None if x is None else next(rest) for x in values)
        o, S = linear_attention(q, k, v, g, scale=0.5, state=state, segment=segment, form="chunk")
        return o, S

    assert torch.autograd.gradcheck(run, [x for x in values if x is not None], fast_mode=True)


@pytest.mark.parametrize("form", ["naive", *FAST])
@pytest.mark.parametrize("packing", [False, True])
def test_a_denominator_is_the_sum_of_the_weights(form, packing):
    """Against the weights themselves, a_ij = scale · exp(g_{j+1} + … + g_i) q_i·k_j within a document, and no state."""
    q, k, v, g, _ = (None if x is None else x.double() for x in with_sums(inputs(1, 70, 2, 1, 8, 5, "token", False)))
    segment = packed(1, 70) if packing else None
    total = g.cumsum(1).transpose(1, 2)
    decay = (total.unsqueeze(-1) - total.unsqueeze(-2)).clamp(max=0).exp().tril()
    weights = 0.3 * torch.einsum("bihk,bjhk->bhij", q, k.expand_as(q)) * decay
    if packing:
        weights = weights * (segment[:, None, :, None] == segment[:, None, None, :])
    want, sums = torch.einsum("bhij,bjhv->bihv", weights, v.expand(-1, -1, 2, -1)), weights.sum(-1).transpose(1, 2)
    want = want / sums.clamp(min=0.5).unsqueeze(-1)
    asked = {"denominator_min": 0.5, "denominators": True}
    o, S, d = linear_attention(q, k, v, g, scale=0.3, segment=segment, **asked, form=form)
    torch.testing.assert_close((o, d), (want, sums))
    assert S.shape == (1, 2, 8, 6)


@pytest.mark.parametrize("form", FAST)
@pytest.mark.parametrize("decay", DECAYS)
def test_gradients_through_a_denominator_equal_those_of_the_recurrence(form, decay):
    values, segment = with_sums(inputs(2, 90, 4, 2, 8, 5, decay)), packed(2, 90, padding=0.2)
    for layout in (None, segment):
        got = differentiate(form, values, torch.float32, layout, denominator_min=0.5)
        assert_agrees(got, differentiate("naive", values, torch.float64, layout, denominator_min=0.5), torch.float32)


@pytest.mark.parametrize("form", ["naive", *FAST])
def test_bf16_inputs_are_divided_in_fp32(form):
    values = [None if x is None else x.bfloat16() for x in with_sums(inputs(2, 100, 4, 2, 16, 16, "none", False))]
    q, k, v, *_ = values
    o, _ = linear_attention(q, k, v, denominator_min=0.5, form=form)
    want, _ = linear_attention(q.double(), k.double(), v.double(), denominator_min=0.5, form="naive")
    assert o.dtype == torch.bfloat16
    assert (o.double() - want).pow(2).mean().sqrt() <= 3e-3 * want.pow(2).mean().sqrt()


def test_a_norm_beside_a_denominator_is_refused():
    q, k, v, g, _ = inputs(1, 5, 2, 1, 4, 4)
    with pytest.raises(ValueError, match="norm_eps or denominator_min, got both"):
        linear_attention(q, k, v, g, norm_eps=1e-5, denominator_min=0.5)
    with pytest.raises(ValueError, match="beside a denominator_min"):
        linear_attention(q, k, v, g, norm_eps=1e-5, denominators=True)


@pytest.mark.parametrize("form", ["naive", *FAST])
def test_bf16_inputs_are_summed_in_fp32(form):
    values = [None if x is None else x.bfloat16() for x in inputs(2, 100, 4, 2, 16, 16)]
    values[3], values[4] = values[3].float(), values[4].float()
    q, k, v, g, state = values
    o, S = linear_attention(q, k, v, g, state=state.clone(), form=form)
    want, end = linear_attention(q.double(), k.double(), v.double(), g.double(), state=state.double(), form="naive")
    assert o.dtype == torch.bfloat16
    assert S.dtype == torch.float32
    assert (o.double() - want).pow(2).mean().sqrt() <= 3e-3 * want.pow(2).mean().sqrt()
    assert (S.double() - end).pow(2).mean().sqrt() <= 1e-6 * end.pow(2).mean().sqrt()


@pytest.mark.parametrize("form", ["naive", *FAST])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_normed_or_divided_is_rounded_once_and_afterwards(form, dtype):
    """Beside a mean of 3 the rest of a sum has few digits, and these sums leave fp16's range."""
    q, k, v, _, _ = inputs(2, 100, 4, 2, 16, 16, "none")
    q, k, v = (x.to(dtype) for x in (16 * q.relu(), 16 * k.relu(), v + 3))
    exact = [x.double() for x in (q, k, v)]
    assert linear_attention(*exact, form="naive")[0].max() > 2 * torch.finfo(torch.float16).max
    for after in ({"norm_eps": 1e-5}, {"denominator_min": 0.5}):
        o, _ = linear_attention(q, k, v, form=form, **after)
        want, _ = linear_attention(*exact, form="naive", **after)
        assert o.dtype == dtype
        assert (o.double() - want).pow(2).mean().sqrt() <= 3e-3 * want.pow(2).mean().sqrt()


@pytest.mark.parametrize("form", ["naive", *FAST])
@pytest.mark.parametrize("after", [{}, {"norm_eps": 1e-5}, {"denominator_min": 0.5}])
def test_a_wide_output_is_not_rounded(form, after):
    """Nor is anything on the way to it, q times a scale that is no power of 2 among it."""
    q, k, v, g, _ = (None if x is None else x.bfloat16() for x in with_sums(inputs(2, 100, 4, 2, 16, 16, state=False)))
    given = {"scale": 0.3, **after}
    o, _ = linear_attention(q, k, v, g, form=form, wide=True, **given)
    want, _ = linear_attention(*(x.double() for x in (q, k, v, g)), form="naive", **given)
    assert o.dtype == torch.float32
    assert (o.double() - want).pow(2).mean().sqrt() <= 1e-6 * want.pow(2).mean().sqrt()


def test_bf16_gradients_agree_with_float64():
    values = [x.bfloat16().float() for x in inputs(2, 100, 4, 2, 16, 16)]
    check("chunk", values, torch.bfloat16)


def test_strided_inputs_give_what_contiguous_ones_give():
    q, k, v, g, state = inputs(2, 100, 4, 2, 8, 8, "token")
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    for got, want in zip(
        linear_attention(*strided, g, state=state, form="chunk"),
        linear_attention(q, k, v, g, state=state, form="chunk"),
        strict=True,
    ):
        assert torch.equal(got, want)


def test_a_rerun_gives_the_same_bits():
    values = inputs(2, 300, 4, 2, 16, 16, "token")
    first, second = (differentiate("chunk", values, torch.float32) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_shapes_that_do_not_fit_are_refused():
    q, k, v, g, state = inputs(2, 5, 4, 2, 8, 6)
    for wrong in (
        {"q": q[0]},
        {"k": k[:, :4]},
        {"q": q[:, :, :3]},
        {"g": g[:2]},
        {"state": state.mT},
        {"segment": torch.zeros(2, 4, dtype=torch.long)},
        {"form": "fast"},
        {"state": state, "denominator_min": 0.5},
    ):
        with pytest.raises(ValueError):
            linear_attention(**{"q": q, "k": k, "v": v, "g": g, **wrong})


def test_sums_without_float64_are_as_exact(monkeypatch):
    """MPS has no float64: gates near -88 are split as in the Triton form."""
    g = inputs(1, 64, 3, 1, 4, 4, "hard")[3].transpose(1, 2)[None]
    want, parts = weights._token_weights(g, 0.5), weights.exact_parts
    torch.testing.assert_close(sum(parts(g, "mps")), g, atol=2**-32, rtol=0)
    monkeypatch.setattr(weights, "exact_parts", lambda g, device: parts(g, "mps"))
    got = weights._token_weights(g, 0.5)
    for x, y in zip(got, want, strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, y, atol=0, rtol=2e-6)
