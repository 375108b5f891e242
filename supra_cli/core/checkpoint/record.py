"""supra.json: where a model comes from, the hashes of its files, and whether it still speaks of the files beside it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from supra_cli.core.checkpoint.files import named_by_hash, sha256, sha256_once
from supra_cli.core.errors import NotFoundError, SupraError
from supra_cli.core.files import read_json
from supra_cli.core.folder import weight_files

log = logging.getLogger(__name__)

PROVENANCE = "supra.json"

FORMAT = 1
"""Version of supra.json and of the model beside it: raise it when an older supra would misread either."""

Hashes = dict[str, dict[str, Any]]
"""File → {"bytes", "sha256", "mtime_ns"}; records of older versions lack the last."""

# Keys of a config that do not change what its weights compute.
_WORDS = ("transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "_name_or_path", "name_or_path")


def read_provenance(path: Path | str) -> dict[str, Any]:
    """What supra.json says of the weights and the config beside it: recipe, base, parent, tokens, versions, hashes.

    Empty where supra did not write them: there is no record, or something was saved over the model since. Costs the
    hashing of files that were copied since (a second a gigabyte).
    """
    path = Path(path)
    record = _record(path)
    if difference := _difference(path, record):
        log.warning(
            "%s is of another model than the one beside it and is not heeded: %s", path / PROVENANCE, difference
        )
        return {}
    return record


def verify(path: Path | str) -> None:
    """Hash every weight file that would be loaded, and compare with supra.json, as is the config.

    A SupraError names the first difference: a file that the record does not list, a listed one that is not there or
    would not be loaded, content that is not what was saved. In the hub's cache the file's name is its hash.
    """
    path = Path(path)
    record = _record(path)
    if not record.get("files"):
        if _verified_by_name(path):
            return
        raise NotFoundError(
            f"{path} has no hashes to verify, expected them in {PROVENANCE}; convert or save the model with supra"
        )
    for file in record["files"]:
        if not (path / file).is_file():
            raise SupraError(f"{path / file} is missing, though {PROVENANCE} lists it; restore the file")
    if difference := _difference(path, record, hash_all=True):
        raise SupraError(f"{path} is not what was saved: {difference}; restore the model's files, or save it again")


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

    It is that of each file that would be loaded. supra.json answers for files that are as old and as large as it says;
    others are hashed once (a second a gigabyte), so nothing saved over a model, or copied into it, goes unnoticed.
    """
    path = Path(path)
    recorded = _record(path).get("files", {})
    files = weight_files(path)
    return digest({file: vouched(path / file, recorded.get(file)) or hashed(path / file) for file in files})


def digest(files: Mapping[str, Any]) -> str | None:
    """One hash of the hashes of files; None without any."""
    if not files:
        return None
    return hashlib.sha256("".join(f"{name} {files[name]['sha256']}\n" for name in sorted(files)).encode()).hexdigest()


def hashed(file: Path, sha256: Callable[[Path], str] = sha256_once) -> dict[str, Any]:
    """A file's entry in supra.json."""
    state = file.stat()
    return {"bytes": state.st_size, "sha256": sha256(file), "mtime_ns": state.st_mtime_ns}


def vouched(file: Path, known: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """`known`, the entry of a file in supra.json, if the file is untouched since; None if only hashing can tell.

    A hard link has its target's time of change; a copy has its own, and is hashed.
    """
    if known is None:
        return None
    state = file.stat()
    return dict(known) if (known.get("bytes"), known.get("mtime_ns")) == (state.st_size, state.st_mtime_ns) else None


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
    files = record.get("files") or {} if isinstance(record, dict) else None
    if not isinstance(files, dict) or not all(
        isinstance(known, dict) and "sha256" in known for known in files.values()
    ):
        raise SupraError(f"{file} is not what supra writes; restore the file, or delete it to do without what it says")
    if (newer := record.get("format", FORMAT)) != FORMAT:
        raise SupraError(
            f"{file} says that a newer supra wrote the model (format {newer}, here is {FORMAT}); install that supra, "
            "or write the model again with this one"
        )
    return record


def _difference(path: Path, record: Mapping[str, Any], *, hash_all: bool = False) -> str | None:
    """How the model beside supra.json differs from what it records; files that it vouches for are hashed on demand."""
    recorded = record.get("files") or {}
    if not recorded:
        return None
    if extra := _first(set(weight_files(path)) - set(recorded)):
        return f"{extra} would be loaded, of which {PROVENANCE} has no record"
    if unread := _first(set(recorded) - set(weight_files(path))):
        return f"{unread}, which {PROVENANCE} lists, would not be loaded"
    for file, known in recorded.items():
        if (hash_all or not vouched(path / file, known)) and sha256(path / file) != known["sha256"]:
            return f"{file} is not what was saved, its hash differs from {PROVENANCE}"
    if record.get("config") not in (None, config_digest(path)):
        return f"config.json describes another model than the one recorded in {PROVENANCE}"
    return None


def _first(names: Iterable[str]) -> str | None:
    return min(names, default=None)
