"""Writing a model directory: the base's shards are linked, never rewritten; what is new gets shards of its own."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, revert_weight_conversion

from supra_cli.core.checkpoint.describing import legible, read_config, skeleton
from supra_cli.core.checkpoint.files import atomic_directory, link, sha256_once
from supra_cli.core.checkpoint.reading import has_tokenizer, load_tokenizer, tensors
from supra_cli.core.checkpoint.record import (
    FORMAT,
    PROVENANCE,
    Hashes,
    config_digest,
    entry,
    identity,
    read_provenance,
    vouched,
)
from supra_cli.core.checkpoint.slices import shard_names, write_shards
from supra_cli.core.environment import versions
from supra_cli.core.files import read_json, write_json
from supra_cli.core.folder import INDEX, SINGLE
from supra_cli.core.modeling import SupraConfig, SupraForCausalLM
from supra_cli.core.parallel import ALONE, World
from supra_cli.core.swap import mixer_names

# What a base brings besides weights and config, by the names that Hugging Face libraries look for, and its licence.
_COMPANIONS = re.compile(
    r"LICENSE.*|NOTICE.*|tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\..*|merges\.txt|chat_template.*|generation_config\.json|"
    r".*\.tiktoken|spiece\.model"
)
_NUMBERED = re.compile(r"model-\d+-of-\d+\.safetensors")


def save(
    model: SupraForCausalLM,
    path: Path | str,
    *,
    source: Path | str | None,
    provenance: Mapping[str, Any],
    unchanged: Path | str | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """`write` a whole model directory, or nothing; an existing non-empty `path` is refused unless `overwrite`."""
    with atomic_directory(path, overwrite=overwrite) as directory:
        write(directory, model, source=source, provenance=provenance, unchanged=unchanged, dtype=dtype)
    return Path(path)


def write(
    directory: Path,
    model: SupraForCausalLM,
    *,
    source: Path | str | None,
    provenance: Mapping[str, Any],
    weights: Mapping[str, Tensor] | None = None,
    unchanged: Path | str | None = None,
    dtype: torch.dtype | None = None,
    world: World = ALONE,
) -> None:
    """Write a model into an empty directory, all ranks together, each its own rows.

    Tokenizer and generation config come from `source`. `weights` are the model's state where it does not hold that
    itself. `unchanged` is a model that differs in its mixers alone: the other shards are its own, linked and in their
    dtype, unless one holds a mixer too. `dtype` is that of the weights written (None: the model's own); `provenance`
    goes into supra.json.
    """
    source = None if source is None else Path(source)
    config = copy.deepcopy(model.config)
    config.dtype = dtype = dtype or model.dtype
    config.architectures = [type(model).__name__]  # where it was read, a model without a head may have lain
    state = model.state_dict() if weights is None else weights
    state = {name: tensor for name, tensor in state.items() if name not in model.all_tied_weights_keys}
    of_mixers = mixer_names(model)
    mixers = {name: tensor for name, tensor in state.items() if name in of_mixers}
    known: Hashes = {}
    placed: dict[str, str] = {}
    groups = {"model-mixers": mixers}
    if kept := {} if unchanged is None else _without_mixers(Path(unchanged)):
        if world.leads:
            placed, known = link_shards(Path(unchanged), directory, kept)
    else:
        base = {name: value for name, value in state.items() if name not in mixers}
        # Experts stay together, as in memory: taken apart, each rank would have to gather them.
        if not any(isinstance(entry, WeightConverter) for entry in get_model_conversion_mapping(model)):
            base = revert_weight_conversion(model, base)
        groups = {"model-base": base, **groups}
    for stem, members in groups.items():
        files, hashes = write_shards(members, directory, stem, dtype=dtype, world=world)
        placed, known = placed | files, known | hashes
    if world.leads:
        if "parent" not in provenance:
            ours = source is not None and read_provenance(source).get("files")
            provenance = {"parent": identity(source) if ours else None, **provenance}
        finish(directory, config, placed, known, source=source, provenance=provenance)


def keeps_mixers_apart(path: Path | str) -> bool:
    """Whether each shard of a model holds mixers alone or the base alone, so that the base's can be linked."""
    return bool(_without_mixers(Path(path)))


def _without_mixers(path: Path) -> dict[str, str]:
    """Tensor → file of a model's shards that hold no mixer; nothing where one holds both."""
    mixers = mixer_names(skeleton(read_config(path)))  # its own: the model to be written may have fewer
    files = {name: entry.file for name, entry in tensors(path).items()}
    mixed = {file for name, file in files.items() if name in mixers}
    kept = {name: file for name, file in files.items() if name not in mixers}
    return {} if mixed & set(kept.values()) else kept


def link_shards(
    source: Path, directory: Path, placed: Mapping[str, str], sha256: Callable[[Path], str | None] = sha256_once
) -> tuple[dict[str, str], Hashes]:
    """Put the shards of `placed` (tensor → file in `source`) into `directory`; returns the new places and their hashes.

    `sha256` gives the hashes that supra.json of `source` does not have. Shards that are all named as transformers names
    them keep their names, others become `model-base*`: theirs could be those of new parameters, or `model.safetensors`,
    which beside an index would be taken for the whole model.
    """
    files = sorted(set(placed.values()))
    kept = all(_NUMBERED.fullmatch(file) for file in files)
    renamed = dict(zip(files, files if kept else shard_names("model-base", len(files)), strict=True))
    known = read_provenance(source).get("files", {})
    hashes: Hashes = {}
    for old, new in renamed.items():
        link(source / old, directory / new)
        hashes[new] = entry(directory / new, vouched(source / old, known.get(old)) or sha256(source / old))
    return {name: renamed[file] for name, file in placed.items()}, hashes


def finish(
    directory: Path,
    config: SupraConfig,
    placed: Mapping[str, str],
    known: Hashes,
    *,
    source: Path | None,
    provenance: Mapping[str, Any],
) -> None:
    """What a model directory has besides its shards: index, config, companions of `source` and, last, supra.json."""
    files = describe(directory, config, placed, source)
    record = {
        "format": FORMAT,
        "versions": versions(),
        **provenance,
        "config": config_digest(directory),
        "files": {file: known[written] for file, written in files.items()},
    }
    write_json(directory / PROVENANCE, record)


def describe(directory: Path, config: SupraConfig, placed: Mapping[str, str], source: Path | None) -> dict[str, str]:
    """Put index, config and companions of `source` beside the shards that hold `placed`, without byte-order marks;
    returns shard → its name before, as a single one is renamed.
    """
    files = {file: file for file in sorted(set(placed.values()))}
    if len(files) == 1:
        (file,) = files
        (directory / file).rename(directory / SINGLE)
        files = {SINGLE: file}
    else:
        size = sum((directory / file).stat().st_size for file in files)
        write_json(directory / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(placed.items()))})
    config.to_json_file(directory / "config.json")
    if source is not None:
        with legible(source) as readable:
            for file in companions(readable):
                shutil.copyfile(readable / file, directory / file)
        if config.swap.any and has_tokenizer(directory):
            _name_tokenizer(directory, config)
    return files


def _name_tokenizer(directory: Path, config: SupraConfig) -> None:
    """Let the tokenizer's config name the class that transformers makes for the base, whose type it goes by before what
    is named there; of ours it knows nothing.
    """
    file = directory / "tokenizer_config.json"
    described = read_json(file) if file.exists() else {}
    name = type(load_tokenizer(directory, config)).__name__
    if described.get("tokenizer_class") != name:
        write_json(file, {**described, "tokenizer_class": name})


def companions(path: Path) -> list[str]:
    """The names of a model directory's tokenizer files, generation config and licence."""
    return sorted(file.name for file in path.iterdir() if file.is_file() and _COMPANIONS.fullmatch(file.name))
