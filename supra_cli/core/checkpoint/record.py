"""supra.json: where a model comes from, the hashes of its files, and whether it still speaks of the files beside it."""

from __future__ import annotations

import hashlib
import json
import logging
import tomllib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from supra_cli.core.checkpoint.files import header_sha256, named_by_hash, sha256_again, sha256_once
from supra_cli.core.errors import NotFoundError, SupraError
from supra_cli.core.files import read_json, sha256
from supra_cli.core.folder import weight_files

log = logging.getLogger(__name__)

PROVENANCE = "supra.json"

FORMAT = 1
"""Version of supra.json and of the model beside it: raise it when an older supra would misread either."""

Hashes = dict[str, dict[str, Any]]
"""File → {"bytes", "header", "mtime_ns", "sha256"}. `header` is the hash of a safetensors header. `sha256`, that of all
of the file, is there where supra saved a model or knew it without reading, not of what converting drew; records of
older versions have no other.
"""

_KINDS = {"files": dict, "format": int, "base": str, "parent": str, "config": str, "versions": dict}
_KINDS |= {
    "recipe": (str, dict),
    "tokens": int,
    "tokens_before": int,
    "seed": int,
    "step": int,
    "seconds": (int, float),
}
"""The kind of each key that is read; None stands for a missing one."""

# Keys of a config that do not change what its weights compute.
_WORDS = ("transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "_name_or_path", "name_or_path")


def read_provenance(path: Path | str) -> dict[str, Any]:
    """What supra.json says of the weights and the config beside it: recipe, base, parent, tokens, versions, hashes.

    Empty where supra did not write them: there is no record, or something was saved over the model since. Costs the
    hashing of files that were copied since (a second a gigabyte); a file recorded by its header is compared by that.
    """
    path = Path(path)
    record = _record(path)
    if difference := _difference(path, record):
        _tell_once(path / PROVENANCE, difference)
        return {}
    return record


@cache
def _tell_once(file: Path, difference: str) -> None:
    log.warning("%s is of another model than the one beside it and is not heeded: %s", file, difference)


def verify(path: Path | str) -> list[str]:
    """Hash every weight file that would be loaded, and compare with supra.json, as is the config.

    A SupraError names the first difference: a file that the record does not list, a listed one that is not there or
    would not be loaded, content that is not what was saved. In the hub's cache the file's name is its hash.

    Returns the files of which size and header alone could be compared: converting hashes neither what it links nor what
    it draws. Their hashes are taken now and kept, so that the next time all of their content is compared.
    """
    path = Path(path)
    record = _record(path)
    if not record.get("files"):
        if _verified_by_name(path):
            return []
        raise NotFoundError(
            f"{path} has no hashes to verify, expected them in {PROVENANCE}; convert or save the model with supra"
        )
    for file in record["files"]:
        if not (path / file).is_file():
            raise SupraError(f"{path / file} is missing, though {PROVENANCE} lists it; restore the file")
    unread: list[str] = []
    if difference := _difference(path, record, unread):
        raise SupraError(f"{path} is not what was saved: {difference}; restore the model's files, or save it again")
    return unread


def check_headers(path: Path) -> None:
    """SupraError for a weight file whose header is not the recorded one: its tensors would be read from wrong places.

    Not where the record lists other files than would be loaded, as where something was saved over the model.
    """
    recorded = _record(path).get("files") or {}
    if set(recorded) != set(weight_files(path)):
        return
    for file, known in recorded.items():
        if known.get("header") not in (None, header_sha256(path / file)):
            raise SupraError(
                f"{path / file} is not what was saved, its header differs from {PROVENANCE}; restore the file, or "
                f"delete {PROVENANCE} if another model was saved over this one"
            )


def _verified_by_name(path: Path) -> bool:
    """Whether all weight files lie in the hub's cache under their hashes; SupraError for one that has another."""
    files = weight_files(path)
    if not all(named_by_hash(path / file) for file in files):
        return False
    for file in (path / name for name in files):
        if sha256(file) != named_by_hash(file):
            raise SupraError(
                f"{file} is not what the hub sent, its hash differs; delete {file.resolve()} and download it again"
            )
    return True


def identity(path: Path | str) -> str:
    """One hash of all weights of a model directory, whoever wrote it: what "the same weights" means everywhere.

    It is that of each file that would be loaded. supra.json answers for files that are as old and as large as it says,
    if it has their hashes; others are hashed once (a second a gigabyte), so nothing saved over a model, or copied into
    it, goes unnoticed.
    """
    path = Path(path)
    recorded = _record(path).get("files") or {}
    files = weight_files(path)
    return digest({file: vouched(path / file, recorded.get(file)) or sha256_once(path / file) for file in files})


def digest(hashes: Mapping[str, str | None]) -> str | None:
    """One hash of the hashes of files; None without any, or where one is not known."""
    if not hashes or None in hashes.values():
        return None
    return hashlib.sha256("".join(f"{name} {hashes[name]}\n" for name in sorted(hashes)).encode()).hexdigest()


def entry(file: Path, sha256: str | None) -> dict[str, Any]:
    """A weight file's entry in supra.json; `sha256` is None where all of its content has not been read."""
    state = file.stat()
    known = {"bytes": state.st_size, "header": header_sha256(file), "mtime_ns": state.st_mtime_ns}
    return known if sha256 is None else known | {"sha256": sha256}


def vouched(file: Path, known: Mapping[str, Any] | None) -> str | None:
    """The hash of a file by `known`, its entry in supra.json; None if only reading the file can tell.

    A hard link has its target's time of change; a copy has its own.
    """
    return known.get("sha256") if known is not None and _untouched(file, known) else None


def _untouched(file: Path, known: Mapping[str, Any]) -> bool:
    state = file.stat()
    return (known.get("bytes"), known.get("mtime_ns")) == (state.st_size, state.st_mtime_ns)


def config_digest(path: Path) -> str:
    """One hash of what config.json says beyond words: tokens that end a text, dtype and versions are left out."""
    described = read_json(path / "config.json")
    if isinstance(described, dict):
        described = {k: v for k, v in described.items() if k not in _WORDS and not k.endswith("_token_id")}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def check_format(path: Path) -> None:
    """SupraError for a model that a newer supra wrote, in a way that this one does not know."""
    _record(path)


def _record(path: Path) -> dict[str, Any]:
    """supra.json as it lies there, of whatever model; empty where there is none."""
    file = path / PROVENANCE
    if not file.is_file():
        return {}
    record = read_json(file)
    written = record.get("format") if isinstance(record, dict) else None
    if isinstance(written, int) and written > FORMAT:
        raise SupraError(
            f"{file} says that a newer supra wrote the model (format {written}, here is {FORMAT}); install that supra, "
            "or write the model again with this one"
        )
    if not isinstance(record, dict) or not _makes_sense(record):
        raise SupraError(f"{file} is not what supra writes; restore the file, or delete it to do without what it says")
    return record


def _makes_sense(record: Mapping[str, Any]) -> bool:
    """Whether each key that is read is of its kind; any may be missing."""
    if any(not isinstance(record[key], kind) for key, kind in _KINDS.items() if record.get(key) is not None):
        return False
    files, recipe = record.get("files") or {}, record.get("recipe")
    try:
        tomllib.loads(recipe if isinstance(recipe, str) else "")
    except tomllib.TOMLDecodeError:
        return False
    known = all(isinstance(entry, dict) and entry.keys() & {"sha256", "header"} for entry in files.values())
    return known and (record.get("format", FORMAT) or 0) >= FORMAT


def _difference(path: Path, record: Mapping[str, Any], unread: list[str] | None = None) -> str | None:
    """How the model beside supra.json differs from what it records, as far as can be told without reading files that it
    vouches for. Where `unread` is given all are read, and those whose content nobody knew before are added to it.
    """
    recorded = record.get("files") or {}
    if not recorded:
        return None
    if extra := _first(set(weight_files(path)) - set(recorded)):
        return f"{extra} would be loaded, of which {PROVENANCE} has no record"
    if surplus := _first(set(recorded) - set(weight_files(path))):
        return f"{surplus}, which {PROVENANCE} lists, would not be loaded"
    for file, known in recorded.items():
        if unread is None and _untouched(path / file, known):
            continue
        if known.get("header") not in (None, header_sha256(path / file)):
            return f"{file} is not what was saved, its header differs from {PROVENANCE}"
        if "sha256" in known:
            if sha256(path / file) != known["sha256"]:
                return f"{file} is not what was saved, its hash differs from {PROVENANCE}"
            continue
        if (path / file).stat().st_size != known.get("bytes"):
            return f"{file} is not what was saved, its size differs from {PROVENANCE}"
        if unread is not None:
            found, before = sha256_again(path / file)
            if before not in (None, found):
                return f"{file} has changed since it was hashed last, at the same size and time of change"
            if before is None:
                unread.append(file)
    if record.get("config") not in (None, config_digest(path)):
        return f"config.json describes another model than the one recorded in {PROVENANCE}"
    return None


def _first(names: Iterable[str]) -> str | None:
    return min(names, default=None)
