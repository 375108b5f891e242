"""Rotary positions: x cos + (-x₂, x₁) sin, with x₁ and x₂ the halves of what turns. PyTorch, or one Triton kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from supra_kernels.boundaries import OPERATORS, triton_runs_on


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, relu: bool = False, form: str | None = None) -> Tensor:
    """y₁ = x₁ cos₁ - x₂ sin₁,  y₂ = x₂ cos₂ + x₁ sin₂;  backward dx₁ = dy₁ cos₁ + dy₂ sin₂,  dx₂ = dy₂ cos₂ - dy₁ sin₁.

    x [B,T,H,K] with its positions in it; cos, sin [B,T,R] or [1,T,R], R even, without gradients of their own.

    The first R numbers of a head turn, the other K - R stay. With relu, x is max(x, 0) before. The Triton form, taken
    on a GPU, reads x and writes the result once, in fp32 between; its gradient is not itself differentiable. The
    others, which the names of `linear_attention`'s mean alike, run PyTorch's operations. The result has x's dtype.
    Raises ValueError for tables that do not fit, and for float64 in the Triton form.
    """
    (batch, length, _, width), rotated = x.shape, cos.shape[-1]
    if cos.shape != sin.shape or cos.shape[:-1] not in ((batch, length), (1, length)) or rotated % 2 or rotated > width:
        shapes = tuple(cos.shape), tuple(sin.shape)
        raise ValueError(f"cos, sin are [{batch} or 1, {length}, R], R even and at most {width}, got {shapes}")
    if form is None:
        fast = x.is_cuda and x.dtype != torch.float64 and triton_runs_on(x.device)
        form = "triton" if fast else "chunk"
    if form == "triton":
        if x.dtype == torch.float64:
            raise ValueError("the triton form computes in fp32, got float64: use the form chunk")
        return OPERATORS.rotary(x, cos, sin, relu)
    x = x.relu() if relu else x
    turns, stays = x.split((rotated, width - rotated), dim=-1)
    x1, x2 = turns.chunk(2, dim=-1)
    turned = (turns * cos.unsqueeze(-2) + torch.cat((-x2, x1), dim=-1) * sin.unsqueeze(-2)).to(x.dtype)
    return turned if rotated == width else torch.cat((turned, stays), dim=-1)
