"""Tensors in safetensors files, written and read by rows: of a tensor that ranks share, each its own.

The header of such a file is known before any number is, and so is the place of every row. Ranks therefore write side
by side into one file, nobody gathers a tensor, and what is written does not show how many wrote it. One rank by itself
goes the same way.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from supra_cli.core.checkpoint.files import unwritten
from supra_cli.core.checkpoint.record import Hashes, entry
from supra_cli.core.errors import SupraError, first_line
from supra_cli.core.files import sha256
from supra_cli.core.parallel import ALONE, World

SHARD_BYTES = 5 * 10**9
MOST_THREADS = 4
THREADS = min(MOST_THREADS, os.cpu_count() or 1)
"""That draw, and that hash: one of each keeps up with a disk only where the processor has instructions for SHA-256."""
_PIECE_BYTES = 8 * 2**20
"""Of a tensor that are in another format, or on another device, at a time: memory that is used again from one piece to
the next, where fresh pages would cost as much as the cast."""
_CALL_BYTES = 128 * 2**10
"""Written at a time, as `cp` does: in a virtual machine (Linux 6.18, ext4) larger calls took ten times as long in the
kernel, which gives them large folios: pages, it seems, that the host has to bring back first."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By safetensors' names."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """Where a tensor lies."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    """As safetensors writes it: F32, BF16, ..."""
    name: str
    """In the file."""
    parts: tuple[tuple[Entry, ...], ...] = ()
    """Of a tensor whose rows are stored apart, as experts are: of each row the tensors that follow in it on another."""


def stacked(columns: Sequence[Sequence[Entry]]) -> Entry:
    """The tensor whose row i is columns[0][i], columns[1][i], ... one after the other. ValueError where rows differ."""
    rows = tuple(zip(*columns, strict=True))
    if len({tuple((part.shape, part.dtype) for part in row) for row in rows}) != 1:
        raise ValueError("rows differ in shape or format")
    first = rows[0][0]
    width = sum(part.shape[0] for part in rows[0])
    return Entry(first.file, (len(rows), width, *first.shape[1:]), first.dtype, first.name, rows)


def write_shards(
    described: Mapping[str, Tensor],
    directory: Path,
    stem: str,
    *,
    values: Iterable[tuple[str, Tensor]] | None = None,
    limit: int = SHARD_BYTES,
    dtype: torch.dtype | None = None,
    hashed: bool = True,
    world: World = ALONE,
) -> tuple[dict[str, str], Hashes]:
    """Write tensors, those with a point in `dtype` if it is given, into files `<stem>*` of at most `limit` bytes each.

    `values` brings them in the order of `described`, which then says their shapes and formats only and may be on the
    meta device; without it they are those. Each is written before the next is asked for. Returns tensor → file, and the
    files' entries for supra.json, with the hash of all of each, which ranks share out, unless `hashed` is false. A
    tensor larger than `limit` has a file of its own. All ranks give the same names and shapes in the same order.
    SupraError on all of them if one cannot write.
    """
    groups = list(_groups(described, limit, dtype))
    coming = iter(described.items() if values is None else values)
    placed: dict[str, str] = {}
    hashing: dict[Path, Future[str] | None] = {}
    with ThreadPoolExecutor(THREADS) as beside:  # files are hashed while others are written
        for turn, (name, members) in enumerate(zip(shard_names(stem, len(groups)), groups, strict=True)):
            file = directory / name
            _write(members, islice(coming, len(members)), file, dtype, world)
            placed |= dict.fromkeys(members, file.name)
            if turn % world.size == world.rank:
                hashing[file] = beside.submit(sha256, file) if hashed else None
        own: Hashes = {file.name: entry(file, found and found.result()) for file, found in hashing.items()}
    return placed, {name: known for hashes in world.gathered(own) for name, known in hashes.items()}


def shard_names(stem: str, count: int) -> list[str]:
    """What `count` files of one model are called, in order."""
    numbers = [f"-{turn + 1:05}" for turn in range(count)] if count > 1 else [""] * count
    return [f"{stem}{number}.safetensors" for number in numbers]


def _groups(described: Mapping[str, Tensor], limit: int, dtype: torch.dtype | None) -> Iterator[dict[str, Tensor]]:
    group: dict[str, Tensor] = {}
    size = 0
    for name, tensor in described.items():
        more = tensor.numel() * written(tensor.dtype, dtype).itemsize
        if group and size + more > limit:
            yield group
            group, size = {}, 0
        group[name] = tensor
        size += more
    if group:
        yield group


def _write(
    described: Mapping[str, Tensor],
    values: Iterable[tuple[str, Tensor]],
    path: Path,
    dtype: torch.dtype | None,
    world: World,
) -> None:
    """One file. Wide numbers come first in it, so that all are aligned, whatever the order of `values`."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    places: dict[str, int] = {}
    end = 0
    kinds = {name: written(tensor.dtype, dtype) for name, tensor in described.items()}
    for name in sorted(described, key=lambda name: (-kinds[name].itemsize, name)):
        kind, shape = kinds[name], described[name].shape
        places[name], start = end, end
        end += shape.numel() * kind.itemsize
        header[name] = {"dtype": _NAMES[kind], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    fault = None
    if world.leads:
        try:
            with path.open("xb") as file:  # never through a link to a file of another model
                file.write(len(text).to_bytes(8, "little") + text)
                file.truncate(8 + len(text) + end)
        except OSError as error:
            fault = unwritten(path, error)
    if (fault := world.shared(fault)) is None:
        try:
            # Not opened to be read: an NFS client then writes whole pages, with its own idea of other ranks' bytes.
            with os.fdopen(os.open(path, os.O_WRONLY), "wb") as file:
                for turn, (name, tensor) in enumerate(values):
                    tensor = tensor.detach()
                    if not isinstance(tensor, DTensor) and turn % world.size != world.rank:
                        continue  # whole on every rank, of which one writes it
                    kind = kinds[name]
                    rows, first = _own_rows(tensor)
                    file.seek(8 + len(text) + places[name] + first * tensor.shape[1:].numel() * kind.itemsize)
                    for piece in rows.reshape(-1).split(_PIECE_BYTES // kind.itemsize):
                        for part in piece.to("cpu", kind).view(torch.uint8).split(_CALL_BYTES):
                            file.write(part.numpy())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            fault = unwritten(path, error)
    if fault := next(filter(None, world.gathered(fault)), None):
        raise SupraError(fault)


def headers(directory: Path, files: Iterable[str]) -> dict[str, Entry]:
    """Every tensor in files of a directory. SupraError for one that is damaged."""
    found = {}
    for file in files:
        try:
            with safetensors.safe_open(directory / file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no mapping
                    if name in found:
                        raise SupraError(
                            f"tensor '{name}' is in {found[name].file} and in {file} of {directory}, expected in one; "
                            "restore the files or convert again"
                        )
                    view = opened.get_slice(name)
                    found[name] = Entry(file, tuple(view.get_shape()), view.get_dtype(), name)
        except safetensors.SafetensorError as error:
            raise SupraError(
                f"{directory / file} is damaged ({first_line(error)}); restore the file or convert again"
            ) from error
    return found


@torch.no_grad()
def fill(tensors: Mapping[str, Tensor], directory: Path, stored: Mapping[str, Entry]) -> None:
    """Put the numbers that are `stored` in a directory into `tensors` of the same shapes, cast to their formats: of
    those that ranks share, only this rank's rows.
    """
    for name, tensor in tensors.items():
        entry = stored[name]
        rows, first = _own_rows(tensor)
        if entry.parts:
            for row, parts in zip(rows, entry.parts[first : first + len(rows)], strict=True):
                pieces = row.split([part.shape[0] for part in parts])
                for piece, part in zip(pieces, parts, strict=True):
                    fill({name: piece}, directory, {name: part})
            continue
        # Opened for each tensor: what has been read of a mapped file counts as memory until it is closed.
        with safetensors.safe_open(directory / entry.file, "pt") as file:
            if not tensor.dim():
                rows.copy_(file.get_tensor(entry.name))
                continue
            view = file.get_slice(entry.name)
            row_bytes = tensor.shape[1:].numel() * DTYPES[entry.dtype].itemsize
            for piece in rows.split(max(1, _PIECE_BYTES // max(1, row_bytes))):
                piece.copy_(view[first : first + len(piece)])
                first += len(piece)


def same(directory: Path, one: Entry, other: Entry) -> bool:
    """Whether two tensors of one shape, stored in a directory, are the same numbers; NaN is the same as NaN."""
    with (
        safetensors.safe_open(directory / one.file, "pt") as first,
        safetensors.safe_open(directory / other.file, "pt") as second,
    ):
        ours, theirs = first.get_slice(one.name), second.get_slice(other.name)
        rows = max(1, _PIECE_BYTES // max(1, math.prod(one.shape[1:]) * DTYPES[one.dtype].itemsize))
        pieces = [slice(start, start + rows) for start in range(0, one.shape[0], rows)]
        return all(torch.allclose(ours[piece], theirs[piece], rtol=0, atol=0, equal_nan=True) for piece in pieces)


def _own_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """(what this rank has of a tensor, the number of its first row)."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), offset[0]


def written(own: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    """What a tensor of dtype `own` is written in where `dtype` is asked for."""
    return dtype if dtype is not None and own.is_floating_point else own
