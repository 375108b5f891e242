"""What the tests of all forms share: operands, gradients, tolerances. Imports torch and the kernels alone, since the
GPU tests run where little is installed.
"""

from __future__ import annotations

import torch
from supra_kernels import linear_attention

NAMES = ("o", "S", "dq", "dk", "dv", "dg", "dstate", "d")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}
DECAYS = ("none", "fixed", "tiny", "token", "hard")


def inputs(batch, length, heads, kv_heads, key_dim, v_dim, decay="fixed", state=True, seed=0):
    """Float32 values, so that every dtype above bf16 sees the same numbers: [q, k, v, g, state]."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng)

    def uniform(*shape):
        return torch.rand(*shape, generator=rng)

    g = {
        "none": lambda: None,
        "fixed": lambda: -torch.exp2(-8 * torch.arange(1.0, heads + 1) / heads),
        "tiny": lambda: torch.tensor([1e-30, 0.999, 0.01, 0.4])[torch.arange(heads) % 4].log(),
        "token": lambda: -uniform(batch, length, heads),
        "hard": lambda: torch.where(uniform(batch, length, heads) < 0.3, -88.0, -0.1 * uniform(batch, length, heads)),
    }[decay]()
    q, k, v = (
        normal(batch, length, heads, key_dim),
        normal(batch, length, kv_heads, key_dim),
        normal(batch, length, kv_heads, v_dim),
    )
    return [q, k, v, g, normal(batch, heads, key_dim, v_dim) if state else None]


def with_sums(values):
    """The same with features as a map makes them, none negative and some tokens' all zero, and z beside the state."""
    q, k, v, g, state = values
    q, k = (x.relu() for x in (q, k))
    q[:, ::7] = 0
    if state is not None:
        state = torch.cat((state, state[..., :1].abs()), -1)
    return [q, k, v, g, state]


def tables(batch, length, rotated, seed=2):
    """cos, sin [B,T,R], no two numbers alike, so that halves, tokens or rows that are mixed up show."""
    rng = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, length, rotated, generator=rng) for _ in range(2))


def differentiate(form, values, dtype, segment=None, scale=0.3, **fused):
    """-> o, S, the gradients of a random projection of both and, beside a denominator_min, of the denominators, then
    these; the output on padding counts for nothing.

    `fused` is norm_eps or denominator_min, relu and rotation.
    """
    q, k, v, g, state = (None if x is None else x.detach().clone().to(dtype).requires_grad_() for x in values)
    fused |= {"denominators": "denominator_min" in fused}
    o, S, *d = linear_attention(q, k, v, g, scale=scale, state=state, segment=segment, form=form, **fused)
    o = torch.cat((o, d[0].unsqueeze(-1)), dim=-1) if d else o
    assert o.isfinite().all()
    assert S.isfinite().all()
    if segment is not None:
        o = o.masked_fill(segment.unsqueeze(-1).unsqueeze(-1) < 0, 0)
    rng = torch.Generator().manual_seed(1)
    do, dS = (torch.randn(x.shape, generator=rng, dtype=torch.float64) for x in (o, S))
    ((o.double() * do).sum() + (S.double() * dS).sum()).backward()
    o, d = (o[..., :-1], [o[..., -1]]) if d else (o, d)
    return [o, S, *(None if x is None else x.grad for x in (q, k, v, g, state)), *d]


def assert_agrees(got, want, dtype, times=1):
    for name, x, y in zip(NAMES[: len(want)], got, want, strict=True):
        if y is None:
            continue
        assert x.isfinite().all(), name
        error, size = (z.double().pow(2).mean().sqrt() for z in (x.double() - y.double(), y))
        limit = times * TOLERANCE[dtype] * (10 if name == "dg" else 1) * size
        assert error <= limit + 1e-30, f"{name}: {error / size:.1e} relative"


def poisoned(make):
    """`make`, torch.empty or torch.empty_like, whose floats are NaN: what a kernel leaves unwritten shows."""

    def fill(*size, **options):
        x = make(*size, **options)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    return fill


def packed(batch, length, seed=0, padding=0.0, document=20):
    """Documents of random lengths, 1 among them, and a share of padding anywhere."""
    rng = torch.Generator().manual_seed(seed)
    starts = (torch.rand(batch, length, generator=rng) < 1 / document).long()
    starts[:, length // 2 : length // 2 + 3] = 1
    segment = starts.cumsum(1)
    return segment.masked_fill(torch.rand(batch, length, generator=rng) < padding, -1)
