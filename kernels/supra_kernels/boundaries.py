"""What the forms share: the dtype they compute in, the floor of a log decay, documents read from segment numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DECAY_FLOOR = -200.0
"""exp(-200) is 0 in fp32 and 1e-87 in float64; a finite floor keeps -inf - -inf out of the sums."""


class Documents(NamedTuple):
    """real [B,T]: not padding. number [B,T]: the document each position belongs to, padding to the one before it
    (leading padding to the first). continues [B,T]: real, and the document did not start here."""

    real: Tensor
    number: Tensor
    continues: Tensor


def documents(segment: Tensor) -> Documents:
    real = segment >= 0
    first = segment.masked_fill(~real, torch.iinfo(segment.dtype).max).amin(dim=1, keepdim=True)
    number = torch.maximum(segment.cummax(dim=1).values, first)
    continues = real.clone()
    continues[:, 1:] &= number[:, 1:] == number[:, :-1]
    return Documents(real, number, continues)


def numbered(cu_seqlens: Tensor, length: int) -> Tensor:
    """Offsets [documents + 1] of documents laid end to end, 0 first and T last -> the document of each token [1,T]."""
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.is_floating_point():
        raise ValueError(f"cu_seqlens is [documents + 1] int, got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}")
    if not torch.compiler.is_compiling():
        ends, rising = cu_seqlens[[0, -1]].tolist(), bool((cu_seqlens.diff() >= 0).all())
        if ends != [0, length] or not rising:
            raise ValueError(f"cu_seqlens rises from 0 to T = {length}, got {cu_seqlens.tolist()}")
    tokens = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return (torch.searchsorted(cu_seqlens, tokens, right=True) - 1).unsqueeze(0)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def log_decay(g: Tensor | None, real: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """g in the compute dtype, floored; given padding, [B,T,H] with 0 on it (a fixed decay skips padding too)."""
    if g is None:
        return None
    g = g.to(dtype).clamp(min=DECAY_FLOOR)
    if real is None or bool(real.all()):
        return g
    return g * real.unsqueeze(-1)
