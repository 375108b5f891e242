"""A batch, how pieces of documents fill its rows, and what each of its tokens has to predict."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from supra_cli.core.recipe import Packing

IGNORED = -100


class Batch(NamedTuple):
    """Rows for one forward pass, on one device."""

    input_ids: Tensor
    """[B,T] int64."""
    position_ids: Tensor
    """[B,T] int64, restarting at 0 with each document."""
    labels: Tensor
    """[B,T] int64: the next token of the same document, or -100 where there is none."""

    @property
    def targets(self) -> int:
        """How many positions have a next token to predict."""
        return int((self.labels != IGNORED).sum())

    def to(self, device) -> Batch:
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


def pack(take: Callable[[int], np.ndarray], length: int, packing: Packing) -> tuple[np.ndarray, np.ndarray]:
    """One row as (ids [length], positions [length]); `take(most)` gives the next at most `most` tokens of a document.

    `separate` fills the row with pieces whose positions each start at 0, `joined` with pieces under one run of
    positions, and `cut` takes one piece. What a piece leaves empty is token 0 at position 0: every such token is a
    document by itself, so that no other sees it and it has nothing to predict.
    """
    ids, positions = np.zeros(length, np.int64), np.zeros(length, np.int64)
    filled = 0
    while filled < length:
        piece = take(length - filled)
        ids[filled : filled + len(piece)] = piece
        positions[filled : filled + len(piece)] = np.arange(len(piece))
        filled += len(piece)
        if packing == "cut":
            break
    return ids, np.arange(length, dtype=np.int64) if packing == "joined" else positions


def collate(ids: list[np.ndarray], positions: list[np.ndarray]) -> Batch:
    """Rows as tensors, with the next token of the same document as label."""
    input_ids = torch.from_numpy(np.stack(ids))
    position_ids = torch.from_numpy(np.stack(positions))
    labels = torch.full_like(input_ids, IGNORED)
    same = position_ids[:, 1:] == position_ids[:, :-1] + 1
    labels[:, :-1] = torch.where(same, input_ids[:, 1:], IGNORED)
    return Batch(input_ids, position_ids, labels)
