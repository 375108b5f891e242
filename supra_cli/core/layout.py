"""The words that architectures and mixers share: a layer's shape, its positions, where documents lie in a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from supra_kernels import documents
from torch import Tensor

Rotate = Callable[[Tensor], Tensor]
"""x [B,T,·,K] -> x with the base's positions in it; the identity for a base with learned positions."""


@dataclass(frozen=True)
class HeadSpec:
    """The static shape of one attention layer."""

    heads: int
    kv_heads: int
    head_dim: int
    """Width K of a query or key head."""
    v_dim: int
    """Width V of a value head."""
    model_dim: int
    layer: int
    scale: float
    """Factor of q·k in the base's softmax."""
    window: int | None = None
    """Tokens that the base's own attention sees, itself included; None is all."""
    softcap: float | None = None
    """c of c·tanh(s / c), which the base takes of its scores s before the softmax."""


class Layout(NamedTuple):
    """Where documents and padding lie in a batch; None in its place means one unpadded document a row.

    The real tokens of a row are contiguous. Rows that continue a cached document go on with their first segment.
    """

    segment: Tensor
    """[B, T] int: number of the document in its row, non-decreasing over real tokens; -1 on padding."""
    documents: Tensor | None = None
    """[B, T] int32: the same as the kernels read it, made once for all layers; None has each layer make it."""

    @classmethod
    def of(cls, segment: Tensor) -> Layout:
        """The layout as a forward pass shares it among its layers. Reads nothing from the device."""
        return cls(segment, documents(segment))


class Derived(NamedTuple):
    """What mask and positions say of a batch."""

    layout: Layout | None
    """None when every row holds one document and no padding; where values are not read, also when that is unknown."""
    position: Tensor | None
    """[B or 1, T] for the base; None lets it count columns."""
    packed: bool
    """Whether a row holds more than one document; where values are not read, whether one may."""


def derive(mask: Tensor | None, position: Tensor | None, batch: int, tokens: int) -> Derived:
    """The layout of a batch's last `tokens` columns.

    `mask` [B, past + T] is non-zero on real tokens (None: all are real); `position` [B or 1, T] is 0 where a document
    starts (None: counted along the mask). Values are read on a CPU alone, where it is free and saves the work for
    padding and documents that are not there. On any other device the host would wait at every token for all that it has
    sent ahead, and a tensor on meta has none.
    """
    given = position if mask is None else mask
    free = given is not None and given.device.type == "cpu" and not torch.compiler.is_compiling()
    if mask is not None and free and bool(mask.all()):
        mask = None
    packed = position is not None and tokens > 1  # one token goes on with the row's document
    if mask is None and not packed:
        return Derived(None, position, False)
    if position is None:
        position = (mask.bool().long().cumsum(-1) - 1).clamp_(min=0)[:, -tokens:]
    real = torch.ones((batch, tokens), dtype=torch.bool, device=position.device)
    if mask is not None:
        real = mask[:, -tokens:].bool()
    segment = real.long() - 1
    if packed:
        starts = (real & (position == 0)).long().cumsum(-1)
        # A row's first document is number 0, whether it starts here or goes on from the cache.
        first = starts.gather(1, real.long().argmax(-1, keepdim=True))
        segment = (starts - first).masked_fill(~real, -1)
        packed = not free or bool((segment > 0).any())
    if mask is None and not packed:
        return Derived(None, position, False)
    return Derived(Layout.of(segment), position, packed)


def softmax_mask(
    layout: Layout | None, tokens: int, *, window: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """[B, 1, T, T], added to the scores: 0 where j ≤ i lie in one document and i - j < window, elsewhere the minimum.

    Padding sees padding, so no row is empty and every output is finite. None where plain causality says it all.
    """
    if window is not None and tokens <= window:
        window = None  # or a mask of causality alone would cost the fused kernels
    if layout is None and window is None:
        return None
    index = torch.arange(tokens, device=device)
    distance = index[:, None] - index
    seen = (distance >= 0)[None]
    if window is not None:
        seen = seen & (distance < window)
    if layout is not None:
        seen = seen & (layout.segment[:, :, None] == layout.segment[:, None, :])
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
