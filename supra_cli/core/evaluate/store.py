"""Scores that were paid for once: `<run>/eval/<task>.json`, each under a key of all that it depends on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from supra_cli.core.data.tokens import cache_folder

log = logging.getLogger(__name__)


def folder_of(path: Path, weights: str, *, owned: bool) -> Path:
    """Where records of the model at `path` live.

    For what supra wrote itself (`owned`): `<run>/eval` for a step of a run, a folder `eval` within any other. For a
    model from the hub or from elsewhere, into whose folder nothing is written: the user's cache.
    """
    path = path.resolve()
    if owned and path.name.startswith("step-") and (path.parent / "recipe.toml").exists():
        return path.parent / "eval"
    if owned and (path / "supra.json").exists():
        return path / "eval"
    return cache_folder() / "eval" / weights[:16]


def weights_hash(path: Path) -> str:
    """SHA-256 over the model's safetensors files, in name order (about a second a gigabyte)."""
    digest = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def model_key(path: Path, weights: str, *, device: str, dtype: str) -> dict[str, str]:
    """What must be equal for two scores to be of the same model, as far as a score can tell."""
    return {
        "weights": weights,
        "config": _files_hash(path, "config.json"),
        "tokenizer": _files_hash(path, "tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt"),
        "device": device,
        "dtype": dtype,
    }


class Store:
    """The records in one folder, one file a task: {"task", "results", "records": {hash of the key: record}}."""

    def __init__(self, folder: Path):
        self.folder = folder

    def find(self, task: str, key: dict[str, Any]) -> dict[str, Any] | None:
        return self._read(task)["records"].get(_hash(key))

    def add(self, task: str, key: dict[str, Any], record: dict[str, Any]) -> None:
        content = self._read(task)
        content["records"][_hash(key)] = {"key": key, **record}
        self._write(task, content)

    def note(self, task: str, results: dict[str, Any]) -> None:
        """Put the newest comparison on top of the task's file, for people."""
        self._write(task, {**self._read(task), "results": results})

    def _path(self, task: str) -> Path:
        return self.folder / f"{task.replace('/', '_')}.json"

    def _read(self, task: str) -> dict[str, Any]:
        empty = {"task": task, "results": {}, "records": {}}
        try:
            content = json.loads(self._path(task).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return empty
        except ValueError:
            log.warning("%s is damaged; its scores are taken again", self._path(task))
            return empty
        return content if isinstance(content.get("records"), dict) else empty

    def _write(self, task: str, content: dict[str, Any]) -> None:
        """A score that cannot be kept is still a score: said, not raised."""
        path = self._path(task)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps(content), encoding="utf-8")
            beside.replace(path)
        except OSError as error:
            log.warning("the scores of %s could not be kept in %s (%s)", task, self.folder, error.strerror)


def _files_hash(path: Path, *patterns: str) -> str:
    files = sorted({file for pattern in patterns for file in path.glob(pattern) if file.is_file()})
    return hashlib.sha256(b"\0".join(file.name.encode() + file.read_bytes() for file in files)).hexdigest()[:16]


def _hash(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
