"""Where metrics go besides metrics.jsonl, when a recipe asks for it; each library is imported only then."""

from __future__ import annotations

import functools
import importlib
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from supra_cli.core.errors import SupraError, UsageError, first_line

Log = Callable[[int, Mapping[str, float]], None]
"""(step, figures by name) → kept somewhere; SupraError if the tracker fails."""


def library(name: str) -> ModuleType:
    """The library of a tracker; UsageError if it is not installed."""
    try:
        return importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError as error:
        raise UsageError(f"a tracker needs '{name}', which is not installed: pip install {name}") from error


def open_trackers(names: Sequence[str], folder: Path, recipe: Mapping[str, Any]) -> list[Log]:
    """A function to log with for each tracker; SupraError for one that does not start. None writes to `folder` yet."""
    return [(_tensorboard if name == "tensorboard" else _wandb_like)(name, folder, recipe) for name in names]


def _tensorboard(name: str, folder: Path, recipe: Mapping[str, Any]) -> Log:
    open_writer = library(name).SummaryWriter
    with _starting(name), tempfile.TemporaryDirectory() as elsewhere:
        open_writer(elsewhere).close()
    writer = functools.cache(lambda: open_writer(folder / "tensorboard"))

    def log(step: int, figures: Mapping[str, float]) -> None:
        with _going_on(name):
            for figure, value in figures.items():
                writer().add_scalar(figure, value, step)
            writer().flush()

    return log


def _wandb_like(name: str, folder: Path, recipe: Mapping[str, Any]) -> Log:
    tracker = library(name)
    own = getattr(tracker, "Error", OSError)
    with _starting(name, own):
        run = tracker.init(project="supra", name=folder.name, config=dict(recipe))

    def log(step: int, figures: Mapping[str, float]) -> None:
        with _going_on(name, own):
            run.log(dict(figures), step=step)

    return log


@contextmanager
def _failing(told: str, advice: str, own: type[Exception] = OSError) -> Iterator[None]:
    """What a tracker raises, of its `own` kind or another, as a SupraError."""
    try:
        yield
    except (own, LookupError, OSError, RuntimeError, TypeError, ValueError, sqlite3.Error) as error:
        raise SupraError(f"{told} ({first_line(error)}); {advice}") from error


def _starting(name: str, *own: type[Exception]) -> AbstractContextManager:
    advice = "log in or set it up as its own manual says, or leave it out of 'track'"
    return _failing(f"the tracker '{name}' does not start", advice, *own)


def _going_on(name: str, *own: type[Exception]) -> AbstractContextManager:
    return _failing(f"the tracker '{name}' failed", "the run goes on without it, metrics.jsonl has all of it", *own)
