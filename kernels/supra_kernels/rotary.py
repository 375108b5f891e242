"""Rotary positions: x cos + (-x₂, x₁) sin, with x₁ and x₂ the halves of a head. PyTorch, or one Triton kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from supra_kernels.library import gpu_kernels, library

library.define("rotary(Tensor x, Tensor cos, Tensor sin, bool transposed) -> Tensor")


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, form: str | None = None) -> Tensor:
    """x [B,T,H,K] with its positions in it; cos, sin [B,T,K] or [1,T,K], without gradients of their own.

    The Triton form, taken on a GPU, reads x and writes the result once, in fp32 between; the others, which the names of
    `linear_attention`'s mean alike, run PyTorch's operations in the dtypes given. float64 is refused by Triton's.
    """
    if form is None:
        form = "triton" if x.is_cuda and x.dtype != torch.float64 else "chunk"
    if form == "triton":
        if x.dtype == torch.float64:
            raise ValueError("the triton form computes in fp32, got float64: use the form chunk")
        return torch.ops.supra.rotary(x, cos, sin, False)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


def _rotary(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> Tensor:
    return gpu_kernels().rotate(x, cos, sin, transposed)


for _key in ("CUDA", "CPU"):
    library.impl("rotary", _rotary, _key)


@torch.library.register_fake("supra::rotary", lib=library)
def _(x, cos, sin, transposed):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output):
    _, cos, sin, ctx.transposed = inputs
    ctx.save_for_backward(cos, sin)


def _gradients(ctx, dy):
    return torch.ops.supra.rotary(dy, *ctx.saved_tensors, not ctx.transposed), None, None, None


torch.library.register_autograd("supra::rotary", _gradients, setup_context=_setup, lib=library)
