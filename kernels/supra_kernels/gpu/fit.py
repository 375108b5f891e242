"""Which tiles and how many stages a kernel over chunks gets: the first choice that the card's shared memory holds.

The first choice is Hopper's, pinned by K, V and the dtype. On a card with less shared memory a loop gets fewer stages
first, so that as many programs reside on a multiprocessor, and narrower tiles only where one program would not fit.
Nothing is tuned at run time: on one card the choice is the same in every process and for every batch. Between cards the
last bits may differ, since narrower tiles add up in another order.

The bytes follow what Triton allocates; benchmarks/compiled.py compiles for each card and its test holds the limits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import triton

CHUNK = 64
RESERVED = 1024
"""Bytes of shared memory that a program takes on a multiprocessor beside its own."""
SLACK = 2048
"""Bytes for sums over rows and columns, which the formulas below leave out."""


class Card(NamedTuple):
    """What the choice of tiles has to know of a GPU."""

    name: str
    shared_bytes: int
    """Shared memory that one program may have; a multiprocessor has RESERVED bytes more."""
    processors: int
    hopper: bool
    """Products read shared memory while the next tiles arrive: a loop of n stages holds n copies, elsewhere n - 1."""

    def copies(self, stages: int) -> int:
        return stages if self.hopper else max(1, stages - 1)


H100 = Card("H100", 232_448, 132, hopper=True)


@cache
def card_of(device: torch.device) -> Card:
    """Of a CUDA device; an H100 for any other, where the interpreter runs."""
    if device.type != "cuda":
        return H100
    properties = torch.cuda.get_device_properties(device)
    # ROCm has no opt-in limit beside the plain one.
    shared = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    hopper = torch.version.hip is None and properties.major >= 9
    return Card(properties.name, shared, properties.multi_processor_count, hopper)


class Fit(NamedTuple):
    inner: int
    """Columns that the loop takes at a time: BX, or BK."""
    outer: int
    """Columns that a program owns: BU, or BV."""
    stages: int
    programs: int
    """That are meant to reside on a multiprocessor together."""


def tile(width: int, most: int = 64) -> int:
    """A power of two from 16, the least that tl.dot takes."""
    return min(most, max(16, triton.next_power_of_2(width)))


def side(card: Card, x: int, u: int, *, size: int, whole: bool, programs: int, stages: int) -> Fit:
    """Of query_side and key_side for widths X and U of numbers of `size` bytes; `whole`: one program has all of U.

    A loop over [C, BX] and [BX, C] of x and y and [BX, BU] of the state, then [C, C] of the scores and [C, BU] of u.
    """

    def held(inner: int, outer: int, stages: int) -> int:
        loop = card.copies(stages) * inner * (2 * CHUNK + outer)
        # Hopper's product of three tf32 ones reads the upper and the lower halves of u and the scores from there.
        after = (2 if card.hopper and size == 4 else 1) * CHUNK * (CHUNK + outer)
        return size * max(loop, after)

    widths = [tile(u, 1 << 20)] if whole else _narrower(tile(u, 128))
    return _first(card, [(inner, outer) for outer in widths for inner in _narrower(tile(x))], held, programs, stages)


def walk(card: Card, key_dim: int, v_dim: int, *, size: int, programs: int, stages: int) -> Fit:
    """Of states: a loop over [BK, C] of x and [C, BV] of y. Except on Hopper y, and x in fp32, goes back to shared
    memory on its way to the product."""

    def held(inner: int, outer: int, stages: int) -> int:
        again = 0 if card.hopper else outer + (inner if size == 4 else 0)
        return size * CHUNK * (card.copies(stages) * (inner + outer) + again)

    tiles = [(inner, outer) for outer in _narrower(tile(v_dim)) for inner in _narrower(tile(key_dim))]
    return _first(card, tiles, held, programs, stages)


def decay(card: Card, key_dim: int, v_dim: int, *, size: int, programs: int, stages: int) -> Fit:
    """Of decay: a loop over q and k, and in it one over do, v, S and dS."""

    def held(inner: int, outer: int, stages: int) -> int:
        return size * 2 * (CHUNK * inner + max(1, stages - 1) * outer * (CHUNK + inner))

    tiles = [(inner, outer) for outer in _narrower(tile(v_dim)) for inner in _narrower(tile(key_dim))]
    return _first(card, tiles, held, programs, stages)


def _narrower(width: int) -> list[int]:
    """The width and the powers of two below it, down to 16."""
    return [width >> shift for shift in range(width.bit_length() - 4)]


def _first(
    card: Card, tiles: list[tuple[int, int]], held: Callable[[int, int, int], int], programs: int, stages: int
) -> Fit:
    """As many programs as asked for, then more stages, then wide tiles; RuntimeError where nothing fits."""
    for count in range(programs, 1, -1):
        for n in range(stages, 1, -1):
            if count * (held(*tiles[0], n) + RESERVED) <= card.shared_bytes + RESERVED:
                return Fit(*tiles[0], n, count)
    for inner, outer in tiles:
        for n in range(stages, 0, -1):
            if held(inner, outer, n) + SLACK <= card.shared_bytes:
                return Fit(inner, outer, n, 1)
    raise RuntimeError(
        f"the smallest tiles of a program take {held(*tiles[-1], 1) + SLACK:,} bytes of shared memory, "
        f"{card.name} has {card.shared_bytes:,}: use the form chunk"
    )
