"""Decay weights of a chunk, always exp of a sum of log decays that is ≤ 0, and 0 across documents and from padding."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Weights(NamedTuple):
    """Leading dimensions [m,b,h] are chunk, batch and head, each whole or 1; `scale` is inside within and from_start.

    within [m,b,h,C,C]: of token j at token i ≥ j. from_start [m,b,h,C]: of the incoming state at token i.
    to_end [m,b,h,C]: of token j in the outgoing state. through [m,b,h]: of the incoming state in the outgoing one.
    """

    within: Tensor
    from_start: Tensor
    to_end: Tensor
    through: Tensor


def fixed_weights(g: Tensor | None, length: int, scale: float, dtype: torch.dtype, device: torch.device) -> Weights:
    """The same in every chunk: g [H], or none (h = 1)."""
    g = torch.zeros(1, dtype=dtype, device=device) if g is None else g
    token = torch.arange(length, device=device, dtype=dtype)
    distance = token[:, None] - token
    within = (g[:, None, None] * distance.clamp(min=0)).exp_().mul_(distance >= 0)
    from_start, to_end = (g[:, None] * (token + 1)).exp_(), (g[:, None] * (length - 1 - token)).exp_()
    through = from_start[:, -1]
    return Weights(*(x[None, None] for x in (within * scale, from_start * scale, to_end, through)))


def block_weights(fixed: Weights | None, g: Tensor | None, layout, block, scale: float) -> Weights:
    """The weights of one block: from per-token g [B,T,H] where `fixed` is None, cut where documents meet."""
    weights = _token_weights(_by_chunk(g, block), scale) if fixed is None else fixed
    if layout is None:
        return weights
    number, real = _by_chunk(layout.number.unsqueeze(-1), block), _by_chunk(layout.real.unsqueeze(-1), block)
    entering = torch.arange(
        block.start - 1, block.start + (block.chunks - 1) * block.length, block.length, device=real.device
    )
    carried = layout.number[:, entering.clamp(min=0)].t()[:, :, None, None]
    last = number[..., -1:]
    same = (number.unsqueeze(-1) == number.unsqueeze(-2)) & real.unsqueeze(-2)
    return Weights(
        weights.within * same.to(weights.within.dtype),  # a product with bool takes ten times as long
        weights.from_start * (number == carried),
        weights.to_end * ((number == last) & real),
        weights.through * (last == carried).squeeze(-1),
    )


def _token_weights(g: Tensor, scale: float) -> Weights:
    """g [m,b,h,C]; every difference of two sums of log decays is rounded once."""
    totals = [part.cumsum(-1) for part in exact_parts(g, g.device.type)]
    within = sum(total.unsqueeze(-1) - total.unsqueeze(-2) for total in totals)
    within = within.clamp_(max=0).to(g.dtype).exp_().tril_().mul_(scale)
    to_end = sum(total[..., -1:] - total for total in totals).to(g.dtype).exp_()
    from_start = sum(totals).to(g.dtype).exp_()
    return Weights(within, from_start * scale, to_end, from_start[..., -1])


def exact_parts(g: Tensor, device: str) -> tuple[Tensor, ...]:
    """What adds up to g, in parts whose sums over a chunk can be subtracted: a difference of two fp32 sums of gates
    near -88 would lose five digits. In float64 g itself; MPS has no float64, so there the multiple of 1/256 below g,
    whose sums are exact, and what remains, as in the Triton form."""
    if device != "mps":
        return (g.double(),)
    coarse = (g * 256).floor() / 256
    return coarse, g - coarse


def _by_chunk(x: Tensor, block) -> Tensor:
    """[B,T,h] -> [m,b,h,C] of one block."""
    x = x.narrow(1, block.start, block.chunks * block.length)
    return x.unflatten(1, (block.chunks, block.length)).permute(1, 0, 3, 2)
