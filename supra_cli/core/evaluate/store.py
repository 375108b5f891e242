"""Scores that were paid for once: `<run>/eval/<task>.json`, each under a key of all that it depends on (`keys`)."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from supra_cli.core.files import cache_folder, dumps, write

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


class Store:
    """The records in one folder, one file a task: {"task", "results", "records": {hash of the key: record}}.

    The steps of a run share a file, so `results`, the newest comparison for people, for `supra report` and for a card,
    is kept for each model by the hash of its weights: {"metrics": ..., "questions": hash of what was asked, ...} of a
    task, {"figures": ..., "questions": ...} of a measure.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._refused = False

    @property
    def place(self) -> str | None:
        """The folder, None once something could not be kept there."""
        return None if self._refused else str(self.folder)

    def find(self, task: str, key: dict[str, Any]) -> dict[str, Any] | None:
        try:
            return self._read(task)["records"].get(_hash(key))
        except OSError as error:
            self._refuse(error)
            return None

    def add(self, task: str, key: dict[str, Any], record: dict[str, Any]) -> None:
        self._change(task, "records", _hash(key), {"key": key, **record})

    def note(self, task: str, weights: str, results: dict[str, Any]) -> None:
        """Put the newest comparison of the model with these weights on top of the task's file."""
        self._change(task, "results", weights, results)

    def _path(self, task: str) -> Path:
        return self.folder / f"{task.replace('/', '_')}.json"

    def _read(self, task: str) -> dict[str, Any]:
        empty = {"task": task, "results": {}, "records": {}}
        try:
            content = json.loads(self._path(task).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return empty
        except ValueError:
            log.warning("%s is damaged; its scores are taken again", self._path(task))
            return empty
        if not isinstance(content, dict) or not isinstance(content.get("records"), dict):
            return empty
        results = content.get("results")
        by_weights = isinstance(results, dict) and "metrics" not in results  # of an earlier format: one for all models
        return {**content, "results": results if by_weights else {}}

    def _change(self, task: str, part: str, name: str, value: dict[str, Any]) -> None:
        """Put a record or result into the task's file while no other process does: steps of a run may be scored at the
        same time. A score that cannot be kept is still a score: said, once a folder, and not raised.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / ".lock").open("a") as lock:
                with suppress(OSError):  # where the file system takes no locks
                    fcntl.flock(lock, fcntl.LOCK_EX)
                content = self._read(task)
                content[part][name] = value
                write(self._path(task), dumps(content))
        except OSError as error:
            self._refuse(error)

    def _refuse(self, error: OSError) -> None:
        _tell_once(self.folder, error.strerror)
        self._refused = True


@cache
def _tell_once(folder: Path, reason: str) -> None:
    log.warning("scores cannot be kept in %s (%s) and will be taken again", folder, reason)


def _hash(key: dict[str, Any]) -> str:
    return hashlib.sha256(dumps(key, sort_keys=True).encode()).hexdigest()[:32]
