"""Tensors in safetensors files by rows: three ranks write what one writes, and any number of ranks reads it."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from supra_cli.core import parallel
from supra_cli.core.checkpoint import slices
from supra_cli.core.errors import SupraError
from supra_cli.core.parallel import World
from tests.parallel.launching import finish, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # the first to come makes what all look at

LIMIT = 400
"""Bytes in a file, which some tensors exceed."""


def tensors() -> dict[str, Tensor]:
    """Of more rows than three ranks share evenly, of fewer, of none, of one number, and of other kinds."""
    torch.manual_seed(0)
    return {
        "uneven": torch.randn(7, 5),
        "long": torch.randn(150),
        "one row": torch.randn(1, 6),
        "empty": torch.empty(0, 3),
        "count": torch.tensor(3.0),
        "whole": torch.randn(4, 4),
        "codes": torch.randint(0, 255, (5, 3), dtype=torch.uint8),
        "half": torch.randn(3, 2).to(torch.bfloat16),
    }


def shared_out(world: World) -> dict[str, Tensor]:
    """All but the one that is whole on every rank, and the number, by rows."""
    from torch.distributed.tensor import Shard, distribute_tensor

    return {
        name: tensor
        if world.size == 1 or name == "whole" or not tensor.dim()
        else distribute_tensor(tensor, world.mesh, [Shard(0)])
        for name, tensor in tensors().items()
    }


def write(folder: Path, world: World) -> None:
    if world.leads:
        folder.mkdir()
    world.barrier()
    for stem, dtype in {"as-they-are": None, "rounded": torch.bfloat16}.items():
        members = shared_out(world)
        placed, hashes = slices.write_shards(members, folder, stem, limit=LIMIT, dtype=dtype, world=world)
        assert placed.keys() == tensors().keys()
        for file, entry in hashes.items():
            assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == entry["sha256"]


def read(folder: Path, world: World) -> None:
    """Each rank has its own rows of what one process wrote, cast to its own format."""
    stored = slices.headers(folder, [path.name for path in folder.glob("rounded*")])
    ours = {name: torch.zeros_like(tensor) for name, tensor in shared_out(world).items()}
    slices.fill(ours, folder, stored)
    for name, tensor in tensors().items():
        wanted = tensor.to(torch.bfloat16).to(tensor.dtype) if tensor.is_floating_point() else tensor
        found = ours[name].full_tensor() if hasattr(ours[name], "full_tensor") else ours[name]
        assert torch.equal(found, wanted), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`1` written by one process, and `3` by three, which have read `1`."""
    root = tmp_path_factory.mktemp("slices")
    write(root / "1", parallel.ALONE)
    ended = finish(start(3, [__file__, str(root)], cache=root / "cache"))
    assert ended.returncode == 0, ended.stderr
    return root


def test_three_ranks_write_the_bytes_of_one(folder: Path) -> None:
    files = sorted(path.name for path in (folder / "1").iterdir())
    assert len([name for name in files if name.startswith("as-they-are")]) > 2
    assert sorted(path.name for path in (folder / "3").iterdir()) == files
    for name in files:
        assert (folder / "3" / name).read_bytes() == (folder / "1" / name).read_bytes(), name


def test_what_is_written_is_what_safetensors_reads(folder: Path) -> None:
    for stem, dtype in {"as-they-are": None, "rounded": torch.bfloat16}.items():
        found = {n: t for path in (folder / "3").glob(f"{stem}*") for n, t in load_file(path).items()}
        for name, tensor in tensors().items():
            wanted = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
            assert found[name].dtype == wanted.dtype
            assert torch.equal(found[name], wanted), name


def test_a_file_holds_no_more_than_the_limit_or_one_tensor(folder: Path) -> None:
    for path in (folder / "3").glob("as-they-are*"):
        held = load_file(path)
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= LIMIT


def test_one_process_reads_what_three_wrote(folder: Path) -> None:
    read(folder / "3", parallel.ALONE)


@pytest.mark.parametrize("left", [0, 5, 100])
def test_a_file_that_is_cut_off_is_named(left: int, tmp_path: Path) -> None:
    slices.write_shards({"a": torch.randn(100)}, tmp_path, "model")
    os.truncate(tmp_path / "model.safetensors", left)
    with pytest.raises(SupraError, match=r"model\.safetensors is damaged"):
        slices.headers(tmp_path, ["model.safetensors"])


def test_where_nothing_can_be_written_the_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SupraError, match=r"cannot write .*missing/model\.safetensors .*make room"):
        slices.write_shards({"a": torch.randn(100)}, tmp_path / "missing", "model")


if __name__ == "__main__":
    root = Path(sys.argv[1])
    with parallel.joined("cpu") as joined:
        write(root / str(joined.size), joined)
        read(root / "1", joined)
