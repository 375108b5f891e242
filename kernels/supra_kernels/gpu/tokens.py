"""Tensors in, kernels launched, tensors out: what takes each token by itself, the decode step and the rotation."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from supra_kernels.gpu import launch
from supra_kernels.gpu.rotary import rotary_backward_kernel, rotary_kernel
from supra_kernels.gpu.step import step_kernel

STEP_TILE, STEP_TILE_WITH_SUMS = 1 << 12, 1 << 10
"""Numbers of the state that a program of the decode step holds at a time, 32 registers in each of 128 threads. With z
beside it a state's rows do not begin at multiples of 16 bytes: every number is moved by itself, which takes more."""


def step(
    problem: launch.Problem,
    state: Tensor,
    out_dtype: torch.dtype,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    relu: bool = False,
    norm_eps: float | None = None,
    denominator_min: float | None = None,
) -> tuple[Tensor, Tensor]:
    """-> o and, with a denominator, d [B,T,H] fp32, else an empty tensor; `state` [B,H,K,V or V+1], fp32 and
    contiguous, is overwritten, in one launch a token.

    q and k go through the ReLU with `relu`, then turn by cos, sin [B or 1,T,R] where given.
    """
    least = norm_eps if denominator_min is None else denominator_min
    BV = triton.next_power_of_2(problem.v_dim)
    if least is None:
        BV = min(32, BV)
    tile = STEP_TILE_WITH_SUMS if problem.sums else STEP_TILE
    BK = min(triton.next_power_of_2(problem.key_dim), max(1, tile // BV))
    shape = (problem.batch, problem.length, problem.heads, problem.v_dim)
    o = problem.empty(*shape, dtype=torch.float32 if launch.INTERPRETED else out_dtype)
    d = problem.empty(*(shape[:3] if problem.sums else (0,)))
    tables = (None, None, 0, 0) if cos is None else _tables(cos, sin)
    with launch.on_device(problem.q):
        for t in range(problem.length):
            step_kernel[(problem.batch * problem.heads * triton.cdiv(problem.v_dim, BV),)](
                problem.q, problem.k, problem.v, problem.g, state, o, d, *tables, t,
                problem.length, problem.heads, problem.kv_heads, problem.scale, least or 0.0,
                K=problem.key_dim, V=problem.v_dim, BK=BK, BV=BV, DECAY=problem.shared["DECAY"],
                NORM=norm_eps is not None, SUMS=problem.sums, ROTARY=cos is not None, RELU=relu,
                **launch.resident(4, warps=4),
            )  # fmt: skip
    return o.to(out_dtype), d


def _tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """cos, sin [B or 1,T,R] -> both as operands, R, and the numbers from one sequence to the next."""
    return launch.operand(cos), launch.operand(sin), cos.shape[-1], 0 if len(cos) == 1 else cos[0].numel()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, relu: bool) -> Tensor:
    """See rotary_kernel; x [B,T,H,K], cos and sin [B or 1,T,R]."""
    inside = launch.operand(x)
    y = torch.empty_like(inside, memory_format=torch.contiguous_format)
    _turn(rotary_kernel, (inside,), cos, sin, y, relu)
    return y.to(x.dtype)


def rotate_backward(dy: Tensor, x: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
    """Gradient of x, which is given where it went through the ReLU."""
    inside = launch.operand(dy)
    dx = torch.empty_like(inside, memory_format=torch.contiguous_format)
    _turn(rotary_backward_kernel, (inside, None if x is None else launch.operand(x)), cos, sin, dx, x is not None)
    return dx.to(dy.dtype)


def _turn(kernel, given: tuple, cos: Tensor, sin: Tensor, out: Tensor, relu: bool) -> None:
    batch, length, heads, width = out.shape
    cos, sin, rotated, stride = _tables(cos, sin)
    BH = min(16, triton.next_power_of_2(heads))
    with launch.on_device(out):
        kernel[(batch * length * triton.cdiv(heads, BH),)](
            *given, cos, sin, out, length, heads, width, rotated, stride,
            BH=BH, BK=triton.next_power_of_2(width), RELU=relu, num_warps=4,
        )  # fmt: skip
