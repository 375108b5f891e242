"""The Triton kernels against the recurrence in float64, in the interpreter or on a GPU.

Small here, because the interpreter takes about a second a case; every kernel, decay and layout runs nonetheless.
Tolerances as in test_linear_attention.py; ten times that on a GPU, where a product in fp32 is three in tf32.
"""

from __future__ import annotations

import pytest
import torch
from cases import DECAYS, assert_agrees, differentiate, inputs, packed, poisoned, tables, with_sums
from supra_kernels import documents, linear_attention

pytest.importorskip("triton")
from supra_kernels.gpu import launch, tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check(values, segment=None, **fused):
    moved = [None if x is None else x.to(DEVICE) for x in values]
    got = differentiate("triton", moved, torch.float32, None if segment is None else segment.to(DEVICE), **fused)
    assert_agrees(
        [None if x is None else x.cpu() for x in got],
        differentiate("naive", values, torch.float64, segment, **fused),
        torch.float32,
        times=10 if DEVICE == "cuda" else 1,
    )


@pytest.mark.parametrize("decay", DECAYS)
def test_triton_equals_the_recurrence(decay):
    check(inputs(1, 131, 2, 1, 8, 20, decay))


@pytest.mark.parametrize("decay", ["none", "fixed", "token"])
def test_triton_keeps_documents_apart_and_skips_padding(decay):
    check(inputs(2, 90, 2, 1, 8, 8, decay), packed(2, 90, padding=0.2))


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65])
def test_triton_takes_any_length(length):
    check(inputs(1, length, 1, 1, 8, 8, "token"))


@pytest.mark.parametrize(("key_dim", "v_dim"), [(1, 1), (80, 24), (24, 80)])
def test_triton_takes_widths_of_several_tiles(key_dim, v_dim):
    check(inputs(1, 70, 1, 1, key_dim, v_dim, "fixed"))


def test_triton_without_an_initial_state():
    check(inputs(1, 70, 2, 2, 8, 8, "token", state=False))


@pytest.mark.parametrize("gamma", [0.2, 0.01])
def test_a_small_decay_over_129_tokens_gives_no_nan_in_the_final_state(gamma):
    values = inputs(1, 129, 1, 1, 16, 16, "none")
    values[3] = torch.tensor([gamma]).log()
    check(values)


@pytest.mark.parametrize(("spans", "packing"), [(2, False), (3, True)])
def test_a_walk_in_spans_equals_one_walk(spans, packing):
    q, k, v, g, state = (x.to(DEVICE) for x in with_sums(inputs(1, 200, 2, 1, 8, 8, "fixed")))
    numbers = documents(packed(1, 200, document=100)).to(DEVICE) if packing else None
    problem, dd = launch.Problem(q, k, v, g, numbers, 1.0, sums=True), torch.randn(1, 2, 200, device=DEVICE)
    for x, reverse in ((problem.k, False), (problem.q, True)):
        one = launch.walk(problem, x, problem.v, state, reverse=reverse, dd=dd, spans=1)
        cut = launch.walk(problem, x, problem.v, state, reverse=reverse, dd=dd, spans=spans)
        torch.testing.assert_close(cut, one, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("decay", ["none", "fixed", "token"])
def test_the_decode_step_equals_the_recurrence_and_overwrites_its_state(decay):
    values = [None if x is None else x.to(DEVICE) for x in inputs(2, 3, 4, 2, 8, 20, decay)]
    q, k, v, g, state = values
    want, end = linear_attention(*values[:4], scale=0.3, state=state, form="naive")
    o, S = linear_attention(q, k, v, g, scale=0.3, state=state, form="triton")
    assert S.data_ptr() == state.data_ptr()
    torch.testing.assert_close(o, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(S, end, atol=1e-5, rtol=1e-5)


def test_a_state_of_inference_mode_is_left_alone_outside_of_it():
    q, k, v, g, state = (x.to(DEVICE) for x in inputs(2, 2, 4, 2, 8, 20))
    want = linear_attention(q, k, v, g, state=state, form="naive")
    with torch.inference_mode():
        made = state.clone()
    got = linear_attention(q, k, v, g, state=made, form="triton")
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert torch.equal(made, state)


def test_prefill_then_steps_equals_one_pass():
    q, k, v, g, _ = (None if x is None else x.to(DEVICE) for x in inputs(1, 70, 2, 1, 8, 8, state=False))
    whole, end = linear_attention(q, k, v, g, form="naive")
    o, S = linear_attention(q[:, :66], k[:, :66], v[:, :66], g, form="triton")
    outputs = [o]
    for t in range(66, 70):
        o, S = linear_attention(q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], g, state=S, form="triton")
        outputs.append(o)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(S, end, atol=1e-4, rtol=1e-5)


def test_every_element_of_every_output_is_written(monkeypatch):
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    check(inputs(1, 70, 2, 1, 5, 7, "token"))
    check(inputs(1, 70, 2, 1, 5, 7, "fixed"), packed(1, 70, padding=0.2))
    check(with_sums(inputs(1, 70, 2, 1, 5, 7, "token")), denominator_min=0.5)
    check(inputs(1, 70, 2, 1, 5, 7, "token"), norm_eps=1e-5)


@pytest.mark.parametrize("decay", ["none", "fixed", "token"])
def test_the_fused_norm_keeps_documents_apart_and_skips_padding(decay):
    check(inputs(2, 131, 4, 2, 8, 20, decay), packed(2, 131, padding=0.2), norm_eps=1e-5)


def test_bf16_inputs_agree_within_bf16():
    values = [x.bfloat16().float() for x in inputs(1, 70, 2, 1, 16, 16)]
    q, k, v, g, state = (x.to(DEVICE) for x in values)
    o, S = linear_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), g, state=state, form="triton")
    want, end = linear_attention(*(x.double() for x in values[:4]), state=values[4].double(), form="naive")
    assert o.dtype == torch.bfloat16
    assert (o.cpu().double() - want).pow(2).mean().sqrt() <= 5e-3 * want.pow(2).mean().sqrt()
    assert (S.cpu().double() - end).pow(2).mean().sqrt() <= 5e-3 * end.pow(2).mean().sqrt()


def test_the_fused_norm_equals_the_norm_after_the_operator():
    values = inputs(1, 70, 2, 1, 8, 12, "token")

    def run(form, dtype):
        leaves = [x.to(DEVICE, dtype).requires_grad_() for x in values]
        q, k, v, g, state = leaves
        o, S = linear_attention(q, k, v, g, state=state, norm_eps=1e-5, form=form)
        do = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(DEVICE, dtype)
        return [o.cpu(), S.cpu(), *(x.cpu() for x in torch.autograd.grad((o * do).sum() + S.sum(), leaves))]

    assert_agrees(run("triton", torch.float32), run("naive", torch.float64), torch.float32)
    q, k, v, g, state = (x.to(DEVICE) for x in values)
    one = [q[:, :1], k[:, :1], v[:, :1], g[:, :1]]
    want, _ = linear_attention(*one, state=state, norm_eps=1e-5, form="naive")
    o, _ = linear_attention(*one, state=state, norm_eps=1e-5, form="triton")
    torch.testing.assert_close(o, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("decay", ["none", "fixed", "token"])
def test_the_fused_denominator_equals_the_division_after_the_recurrence(decay):
    check(with_sums(inputs(1, 131, 2, 1, 8, 20, decay)), denominator_min=0.5)


@pytest.mark.parametrize("decay", ["fixed", "token"])
def test_the_fused_denominator_keeps_documents_apart_and_skips_padding(decay):
    values = with_sums(inputs(2, 90, 2, 1, 8, 8, decay))
    check(values, packed(2, 90, padding=0.2), denominator_min=0.5)


def test_the_fused_denominator_takes_widths_of_several_tiles_and_no_initial_state():
    check(with_sums(inputs(1, 70, 1, 1, 80, 130, "token", state=False)), denominator_min=0.5)


@pytest.mark.parametrize("decay", ["none", "fixed", "token"])
def test_the_decode_step_with_a_denominator_equals_the_recurrence_and_overwrites_its_state(decay):
    q, k, v, g, state = (None if x is None else x.to(DEVICE) for x in with_sums(inputs(2, 3, 4, 2, 8, 20, decay)))
    want, end = linear_attention(q, k, v, g, scale=0.3, state=state, denominator_min=0.5, form="naive")
    o, S = linear_attention(q, k, v, g, scale=0.3, state=state, denominator_min=0.5, form="triton")
    assert S.data_ptr() == state.data_ptr()
    torch.testing.assert_close(o, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(S, end, atol=1e-5, rtol=1e-5)


def test_prefill_then_steps_with_a_denominator_equals_one_pass():
    q, k, v, g, _ = (None if x is None else x.to(DEVICE) for x in with_sums(inputs(1, 70, 2, 1, 8, 8, state=False)))
    whole, end = linear_attention(q, k, v, g, denominator_min=0.5, form="naive")
    first = [x[:, :68] for x in (q, k, v)]
    rest = [x[:, 68:] for x in (q, k, v)]
    o, S = linear_attention(*first, g, denominator_min=0.5, form="triton")
    o_rest, S = linear_attention(*rest, g, state=S, denominator_min=0.5, form="triton")
    torch.testing.assert_close(torch.cat((o, o_rest), 1), whole, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(S, end, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("relu", "rows", "rotated"), [(True, 0, 0), (True, 2, 8), (False, 1, 6)])
def test_relu_and_rotation_before_the_chunks_equal_those_before_the_recurrence(relu, rows, rotated):
    rotation = tuple(x.to(DEVICE) for x in tables(rows, 70, rotated)) if rotated else None
    values = [x.to(DEVICE) for x in inputs(2, 70, 4, 2, 8, 12)]
    got, want = (
        [x.cpu() for x in differentiate(form, values, dtype, relu=relu, rotation=rotation)]
        for form, dtype in (("triton", torch.float32), ("naive", torch.float64))
    )
    assert_agrees(got, want, torch.float32)


@pytest.mark.parametrize(("relu", "rows", "rotated"), [(True, 0, 0), (True, 2, 8), (False, 1, 8), (True, 1, 6)])
@pytest.mark.parametrize("after", [{}, {"norm_eps": 1e-5}, {"denominator_min": 0.5}])
def test_the_decode_step_makes_features_and_turns_them_itself(relu, rows, rotated, after, monkeypatch):
    """The kernel that does so before the chunks is not launched."""
    q, k, v, g, state = inputs(2, 3, 4, 2, 8, 20)
    if "denominator_min" in after:
        state = torch.cat((state, state[..., :1].abs()), -1)
    rotation = tuple(x.to(DEVICE) for x in tables(rows, 3, rotated)) if rotated else None
    q, k, v, g, state = (x.to(DEVICE) for x in (q, k, v, g, state))
    given = {"scale": 0.3, "state": state, "relu": relu, "rotation": rotation, **after}
    want, end = linear_attention(q, k, v, g, form="naive", **given)
    monkeypatch.setattr(tokens, "rotate", None)
    o, S = linear_attention(q, k, v, g, form="triton", **given)
    assert S.data_ptr() == state.data_ptr()
    torch.testing.assert_close(o, want, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(S, end, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("after", [{}, {"norm_eps": 1e-5}, {"denominator_min": 0.5, "denominators": True}])
def test_a_decode_step_over_rows_of_several_tiles_equals_the_recurrence(after, monkeypatch):
    monkeypatch.setattr(tokens, "STEP_TILE", 128)
    monkeypatch.setattr(tokens, "STEP_TILE_WITH_SUMS", 128)
    q, k, v, g, state = (x.to(DEVICE) for x in inputs(2, 3, 4, 2, 9, 20))
    if "denominator_min" in after:
        state = torch.cat((state, state[..., :1].abs()), -1)
    want, end, *sums = linear_attention(q, k, v, g, state=state, relu=True, form="naive", **after)
    o, S, *d = linear_attention(q, k, v, g, state=state, relu=True, form="triton", **after)
    assert S.data_ptr() == state.data_ptr()
    torch.testing.assert_close((o, *d), (want, *sums), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(S, end, atol=1e-5, rtol=1e-5)


def test_autocast_to_bf16_reaches_the_kernels(monkeypatch):
    """Where a feature map left q and k in fp32, and at each of the two entrances."""
    taken = []

    class Problem(launch.Problem):
        def __init__(self, q, k, v, *rest, **named):
            taken.append((q.dtype, k.dtype, v.dtype))
            super().__init__(q, k, v, *rest, **named)

    monkeypatch.setattr(launch, "Problem", Problem)
    q, k, v, g, state = (x.to(DEVICE) for x in inputs(1, 70, 2, 1, 16, 16))
    with torch.autocast(DEVICE, torch.bfloat16):
        o, S = linear_attention(q, k, v.bfloat16(), g, state=state, form="triton")
        linear_attention(q[:, :1], k[:, :1], v[:, :1], g, state=state.clone(), form="triton")
    assert taken == [(torch.bfloat16,) * 3] * 2
    assert (o.dtype, S.dtype) == (torch.bfloat16, torch.float32)
    linear_attention(q, k, v, g, form="triton")
    assert taken[2] == (torch.float32,) * 3


def test_a_wide_output_is_not_rounded():
    """Of chunks, in values and gradients, and of the decode step, where autocast rounds q, k and v."""
    values = [x.bfloat16().float() for x in inputs(1, 70, 2, 1, 16, 16, "token")]
    q, k, v, g, state = (x.to(DEVICE).requires_grad_() for x in values)
    times = 1e4 if DEVICE == "cuda" else 10  # where the kernels' own products round what they are given
    for length in (70, 1):
        given = [x[:, :length] for x in (q, k, v, g)]
        want, _ = linear_attention(*(x.double() for x in given), state=state.double(), form="naive")
        with torch.autocast(DEVICE, torch.bfloat16), torch.set_grad_enabled(length > 1):
            o, _ = linear_attention(*given, state=state.detach().clone(), form="triton", wide=True)
        assert o.dtype == torch.float32
        assert_agrees([o], [want], torch.float32, times=times)
        if length > 1:
            do, leaves = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE), (q, k, v, g)
            got, wanted = torch.autograd.grad(o, leaves, do), torch.autograd.grad(want, leaves, do.double())
            for x, y in zip(got, wanted, strict=True):
                assert (x - y).norm() <= 1e-2 * y.norm()


def test_a_rerun_gives_the_same_bits():
    values = [x.to(DEVICE) for x in inputs(1, 70, 2, 1, 8, 8, "token")]
    first, second = (differentiate("triton", values, torch.float32) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_float64_is_refused():
    q, k, v, g, _ = (x.double() for x in inputs(1, 5, 1, 1, 4, 4))
    with pytest.raises(ValueError, match="float64"):
        linear_attention(q, k, v, g, form="triton")
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="float64"):
        linear_attention(q, k, v, g, form="triton")
