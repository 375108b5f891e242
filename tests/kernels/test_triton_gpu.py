"""The Triton kernels at real sizes, in bf16 and fp32, against the chunked PyTorch form in float64.

Tolerances, RMS(error) / RMS(reference): 5e-3 in bf16, whose inputs to a product are rounded at 4e-3 and whose sums are
fp32; 1e-5 in fp32, three tf32 products for one. Ten times that for the gradient of a decay, a sum of signed terms.
"""

from __future__ import annotations

import pytest
import torch
from cases import DECAYS, NAMES, inputs, packed, poisoned, tables, with_sums
from supra_kernels import linear_attention, rotary

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPES = [(2, 1024, 8, 2, 128, 128), (1, 2000, 4, 4, 64, 64), (1, 333, 4, 1, 256, 256), (1, 8192, 2, 2, 64, 128)]
SMALL = [(2, 131, 4, 2, 72, 40), (1, 65, 3, 1, 20, 33), (1, 1, 2, 1, 8, 8)]
"""Widths that move in pieces of 16 bytes but are no power of two, widths that do not, and one token."""


def run(values, form, segment=None, **fused):
    q, k, v, g, state = (None if x is None else x.detach().requires_grad_() for x in values)
    fused |= {"denominators": "denominator_min" in fused}
    o, S, *d = linear_attention(q, k, v, g, scale=0.1, state=state, segment=segment, form=form, **fused)
    rng = torch.Generator().manual_seed(1)
    if segment is not None:
        o, *d = (x.masked_fill((segment < 0).view(*segment.shape, *[1] * (x.dim() - 2)), 0) for x in (o, *d))
    given = [torch.randn(x.shape, generator=rng, dtype=torch.float64).to(x) for x in (o, S, *d)]
    torch.autograd.backward((o, S, *d), given)
    return [o, S, *(None if x is None else x.grad for x in (q, k, v, g, state)), *d]


def check(values, tolerance, segment=None, **fused):
    got = run([None if x is None else x.cuda() for x in values], "triton", segment, **fused)
    wide = [None if x is None else x.double().cuda() for x in values]
    want = run(wide, "chunk", segment, **fused)
    for name, x, y in zip(NAMES[: len(want)], got, want, strict=True):
        if y is None:
            continue
        limit = tolerance * (10 if name == "dg" else 1) * y.pow(2).mean().sqrt()
        assert (x.double() - y).pow(2).mean().sqrt() <= limit + 1e-30, name


def narrow(values):
    return [x.bfloat16() if i < 3 else x for i, x in enumerate(values)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decay", DECAYS)
def test_bf16(shape, decay):
    check(narrow(inputs(*shape, decay)), 5e-3)


def test_a_wide_output_in_bf16():
    """Its gradient, which comes in fp32, enters bf16 products."""
    check(narrow(inputs(*SHAPES[0], "token")), 5e-3, wide=True)


@pytest.mark.parametrize("shape", SMALL)
@pytest.mark.parametrize("decay", ["fixed", "token"])
def test_uneven_widths_in_bf16(shape, decay):
    check(narrow(inputs(*shape, decay)), 5e-3)


@pytest.mark.parametrize("shape", SHAPES[:2])
@pytest.mark.parametrize("decay", ["fixed", "token"])
def test_fp32(shape, decay):
    check(inputs(*shape, decay), 1e-5)


@pytest.mark.parametrize("decay", DECAYS)
def test_packed_and_padded(decay):
    segment = packed(2, 1024, padding=0.1, document=200).cuda()
    check(narrow(inputs(2, 1024, 8, 2, 64, 64, decay)), 5e-3, segment)


@pytest.mark.parametrize("v_dim", [64, 128, 256])
def test_fused_norm(v_dim):
    """In bf16 the gradient before the norm is rounded once more, and what the norm takes out of it makes it smaller."""
    values = inputs(1, 1000, 4, 2, 64, v_dim, "fixed")
    check(values, 1e-4, norm_eps=1e-5)
    check(narrow(values), 1e-2, norm_eps=1e-5)


@pytest.mark.parametrize("after", [{}, {"norm_eps": 1e-5}, {"denominator_min": 0.5}])
def test_fp16(after):
    """Widened inside; what is rounded is what comes back, at 5e-4."""
    values = inputs(1, 500, 4, 2, 64, 64, "fixed")
    values = with_sums(values) if "denominator_min" in after else values
    check([x.half() if i < 3 else x for i, x in enumerate(values)], 2e-3, **after)


@pytest.mark.parametrize("decay", ["none", "fixed", "token"])
def test_fused_denominator(decay):
    values = with_sums(inputs(1, 1000, 4, 2, 256, 64, decay))
    check(values, 1e-5, denominator_min=0.5)
    check(narrow(values), 5e-3, denominator_min=0.5)


def test_fused_denominator_with_documents_and_padding():
    values, segment = with_sums(inputs(2, 1024, 4, 2, 64, 128, "token")), packed(2, 1024, padding=0.1, document=200)
    check(narrow(values), 5e-3, segment.cuda(), denominator_min=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("relu", [False, True])
def test_rotary(dtype, relu):
    x, dy, _ = (t.to("cuda", dtype) for t in inputs(2, 1024, 32, 32, 128, 128)[:3])
    angles = torch.arange(1024.0, device="cuda")[:, None] * torch.exp2(-torch.arange(64.0, device="cuda") / 8)
    cos, sin = (torch.cat((table, table), -1)[None].to(dtype) for table in (angles.cos(), angles.sin()))

    def turned(values, form):
        x, cos, sin, dy = values
        leaf = x.detach().requires_grad_()
        y = rotary(leaf, cos, sin, relu=relu, form=form)
        return y, *torch.autograd.grad(y, leaf, dy)

    wide = turned([t.double() for t in (x, cos, sin, dy)], "chunk")
    for got, want in zip(turned((x, cos, sin, dy), "triton"), wide, strict=True):
        assert (got.double() - want).pow(2).mean().sqrt() <= (1e-6 if dtype == torch.float32 else 3e-3)


def test_every_element_of_every_output_is_written(monkeypatch):
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    segment = packed(1, 333, padding=0.2).cuda()
    check(narrow(inputs(1, 333, 4, 2, 72, 40, "token")), 5e-3)
    check(narrow(with_sums(inputs(1, 333, 4, 2, 72, 40, "token"))), 5e-3, segment, denominator_min=0.5)
    check(narrow(inputs(1, 333, 4, 2, 72, 40, "fixed")), 1e-2, norm_eps=1e-5)


@pytest.mark.parametrize(("key_dim", "v_dim"), [(128, 128), (20, 33)])
@pytest.mark.parametrize("after", [{}, {"norm_eps": 1e-5}, {"denominator_min": 0.5, "denominators": True}])
def test_decode_steps_in_bf16_with_a_decay_of_every_token(key_dim, v_dim, after):
    """q, k and v are bf16 and nothing else is, so o is rounded once and the state not at all."""
    values = inputs(2, 3, 4, 2, key_dim, v_dim, "token")
    values = with_sums(values) if "denominator_min" in after else values
    q, k, v, g, state = (x.cuda() for x in narrow(values))
    wide = [x.double() for x in (q, k, v, g)]
    want, end, *sums = linear_attention(*wide, state=state.double(), form="naive", **after)
    o, S, *d = linear_attention(q, k, v, g, state=state, form="triton", **after)
    assert o.dtype == torch.bfloat16
    torch.testing.assert_close(o.double(), want, atol=1e-3, rtol=1e-2)
    torch.testing.assert_close([x.double() for x in d], sums, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(S.double(), end, atol=1e-4, rtol=1e-4)


def test_a_rerun_gives_the_same_bits():
    values = [None if x is None else x.cuda() for x in narrow(inputs(1, 8192, 2, 2, 64, 64, "token"))]
    first, second = (run(values, "triton") for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("batch", [1, 16, 256])
@pytest.mark.parametrize("after", [{}, {"norm_eps": 1e-5}, {"denominator_min": 0.5}])
def test_decode_steps_in_a_cuda_graph(batch, after):
    q, k, v, g, state = (x.cuda() for x in inputs(batch, 1, 8, 2, 128, 128))
    if "denominator_min" in after:
        state = torch.cat((state, state[..., :1].abs()), -1)
    before = {"relu": True, "rotation": tuple(x.cuda() for x in tables(1, 1, 128)), **after}
    S = state.clone()
    linear_attention(q, k, v, g, state=S, form="triton", **before)
    S.copy_(state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _ = linear_attention(q, k, v, g, state=S, form="triton", **before)
    S.copy_(state)
    for _ in range(3):
        graph.replay()
    want = state
    for _ in range(3):
        wanted, want = linear_attention(q, k, v, g, state=want, form="naive", **before)
    assert wanted.abs().max() > 0
    torch.testing.assert_close(S, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(o, wanted, atol=1e-3, rtol=1e-4)
