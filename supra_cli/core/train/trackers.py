"""Where metrics go besides metrics.jsonl, when a recipe asks for it; each library is imported only then."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from supra_cli.core.errors import UsageError

Log = Callable[[int, Mapping[str, float]], None]
"""(step, figures by name) → kept somewhere."""


def library(name: str) -> ModuleType:
    """The library of a tracker; UsageError if it is not installed."""
    try:
        return importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError as error:
        raise UsageError(f"a tracker needs '{name}', which is not installed: pip install {name}") from error


def open_trackers(names: Sequence[str], folder: Path, recipe: Mapping[str, Any]) -> list[Log]:
    """A function to log with for each tracker."""
    return [(_tensorboard if name == "tensorboard" else _wandb_like)(library(name), folder, recipe) for name in names]


def _tensorboard(library: ModuleType, folder: Path, recipe: Mapping[str, Any]) -> Log:
    writer = library.SummaryWriter(folder / "tensorboard")

    def log(step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log


def _wandb_like(library: ModuleType, folder: Path, recipe: Mapping[str, Any]) -> Log:
    run = library.init(project="supra", name=folder.name, config=dict(recipe))
    return lambda step, figures: run.log(dict(figures), step=step)
