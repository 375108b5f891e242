"""Writing a model directory, atomically: the base's shards are linked and never rewritten."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from supra_cli.core.checkpoint.reading import (
    INDEX,
    PROVENANCE,
    SINGLE,
    fingerprint,
    first_line,
    read_provenance,
    sha256,
    tensors,
)
from supra_cli.core.errors import SupraError, UsageError
from supra_cli.core.modeling import SupraConfig, SupraForCausalLM

FORMAT = 1
"""Version of supra.json."""
SHARD_BYTES = 5 * 10**9

# What a base brings besides weights and config, by the names that Hugging Face libraries look for.
_COMPANIONS = re.compile(
    r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\..*|merges\.txt|chat_template.*|generation_config\.json|"
    r".*\.tiktoken|spiece\.model"
)


def save(
    model: SupraForCausalLM,
    path: Path | str,
    *,
    source: Path | str | None,
    provenance: Mapping[str, Any],
    changed: Literal["all", "mixers"] = "all",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a whole model directory, or nothing; an existing non-empty `path` is refused unless `overwrite`.

    Tokenizer and generation config come from `source`. With changed = "mixers" so do the base's shards, and only the
    mixers are written. `dtype` is that of the weights written (None: the model's own); `provenance` goes into
    supra.json.
    """
    source = None if source is None else Path(source)
    config = copy.deepcopy(model.config)
    config.dtype = dtype = dtype or model.dtype
    state = {
        name: tensor.detach() for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys
    }
    mixers = {name: tensor for name, tensor in state.items() if ".mixer." in name}
    base = revert_weight_conversion(model, {name: tensor for name, tensor in state.items() if name not in mixers})
    with atomic_directory(Path(path), overwrite=overwrite) as directory:
        if changed == "mixers":
            kept = {name: entry.file for name, entry in tensors(source).items() if name not in mixers}
            placed = link_shards(source, directory, kept)
        else:
            placed = write_shards(_cast(base, dtype), directory, "base", _size(base, dtype))
        placed |= write_shards(_cast(mixers, dtype), directory, "mixers", _size(mixers, dtype))
        finish(directory, config, placed, source=source, provenance=provenance)
    return Path(path)


def _cast(state: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in state.items():
        yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor


def _size(state: Mapping[str, Tensor], dtype: torch.dtype) -> int:
    return sum(tensor.numel() * dtype.itemsize for tensor in state.values())


def write_shards(
    members: Iterable[tuple[str, Tensor]], directory: Path, group: str, total_bytes: int, limit: int = SHARD_BYTES
) -> dict[str, str]:
    """Write tensors as they come into `model-<group>*.safetensors` of at most `limit` bytes each; returns name →
    file.
    """
    several = total_bytes > limit
    placed: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    count = 0

    def flush() -> None:
        nonlocal count
        if shard:
            count += 1
            file = f"model-{group}-{count:05}.safetensors" if several else f"model-{group}.safetensors"
            with writing_to(directory):
                save_file(shard, directory / file, metadata={"format": "pt"})
            placed.update(dict.fromkeys(shard, file))
            shard.clear()

    for name, tensor in members:
        if shard and sum(map(tensor_bytes, shard.values())) + tensor_bytes(tensor) > limit:
            flush()
        shard[name] = tensor.detach().to("cpu").contiguous()
    flush()
    return placed


def finish(
    directory: Path,
    config: SupraConfig,
    placed: Mapping[str, str],
    *,
    source: Path | None,
    provenance: Mapping[str, Any],
) -> None:
    """What every model directory has besides its shards: index, config, companions of the base and supra.json."""
    files = sorted(set(placed.values()))
    if len(files) == 1:
        (directory / files[0]).rename(directory / SINGLE)
        files = [SINGLE]
    else:
        size = sum((directory / file).stat().st_size for file in files)
        write_json(directory / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(placed.items()))})
    config.to_json_file(directory / "config.json")
    known: dict[str, Any] = {}
    if source is not None:
        known = read_provenance(source).get("files", {})
        for file in companions(source):
            shutil.copyfile(source / file, directory / file)
    record = {
        "format": FORMAT,
        "versions": {
            name: importlib.metadata.version(name) for name in ("supra", "torch", "transformers", "safetensors")
        },
        "parent": None if source is None else fingerprint(source),
        **provenance,
        "files": {file: _hashed(directory, source, file, known) for file in files},
    }
    write_json(directory / PROVENANCE, record)


def companions(path: Path) -> list[str]:
    """The names of a model directory's tokenizer files and generation config."""
    return sorted(file.name for file in path.iterdir() if file.is_file() and _COMPANIONS.fullmatch(file.name))


def _hashed(directory: Path, source: Path | None, file: str, known: Mapping[str, Any]) -> dict[str, Any]:
    if file in known and (source / file).is_file() and os.path.samefile(directory / file, source / file):
        return known[file]
    return {"bytes": (directory / file).stat().st_size, "sha256": sha256(directory / file)}


def link_shards(source: Path, directory: Path, placed: Mapping[str, str]) -> dict[str, str]:
    """Put the shards of `placed` (name → file in `source`) into `directory`; `model.safetensors` becomes `model-
    base.safetensors`, as a file of that name beside an index would be taken for the whole model.
    """
    renamed = {file: "model-base.safetensors" if file == SINGLE else file for file in set(placed.values())}
    for old, new in renamed.items():
        link(source / old, directory / new)
    return {name: renamed[file] for name, file in placed.items()}


def link(source: Path, target: Path) -> None:
    """A hard link to the file that `source` finally names, or a copy where the file system has none."""
    source = source.resolve(strict=True)
    try:
        os.link(source, target)
    except OSError:
        with writing_to(target.parent):
            shutil.copyfile(source, target)


@contextmanager
def atomic_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary directory beside `path` that takes its place when the block ends well, and vanishes when it does
    not.
    """
    path = Path(os.path.abspath(path))
    if path.exists() and not overwrite and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"{path} already exists and is not empty; choose another output or overwrite it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        _sync(temporary)
        _replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _replace(temporary: Path, path: Path) -> None:
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.exists():
        path.rename(old)
    temporary.rename(path)
    _sync_one(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(directory: Path) -> None:
    for file in directory.rglob("*"):
        _sync_one(file)
    _sync_one(directory)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def tensor_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def write_json(path: Path, value: Any) -> None:
    with writing_to(path.parent):
        path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def writing_to(directory: Path) -> Iterator[None]:
    """Failures to write, as a SupraError."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        raise SupraError(
            f"cannot write to {directory} ({first_line(error)}); make room or choose another output"
        ) from error
