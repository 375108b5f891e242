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
