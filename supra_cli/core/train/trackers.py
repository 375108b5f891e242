"""Where metrics go besides metrics.jsonl, when a recipe asks for it; each library is imported only then."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from supra_cli.core.errors import UsageError, near_miss

Log = Callable[[int, Mapping[str, float]], None]
"""(step, figures by name) → kept somewhere."""


def open_trackers(names: Sequence[str], folder: Path, recipe: Mapping[str, Any]) -> list[Log]:
    """A function to log with for each tracker. UsageError for an unknown name or a library that is not installed."""
    return [_opener(name)(folder, recipe) for name in names]


def _opener(name: str) -> Callable[[Path, Mapping[str, Any]], Log]:
    if name not in _OPENERS:
        raise UsageError(f"unknown tracker '{name}'{near_miss(name, _OPENERS)}")
    return _OPENERS[name]


def _library(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(f"a tracker needs '{package}', which is not installed: pip install {package}") from error


def _tensorboard(folder: Path, recipe: Mapping[str, Any]) -> Log:
    writer = _library("torch.utils.tensorboard", "tensorboard").SummaryWriter(folder / "tensorboard")

    def log(step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log


def _wandb_like(module: str) -> Callable[[Path, Mapping[str, Any]], Log]:
    def opened(folder: Path, recipe: Mapping[str, Any]) -> Log:
        library = _library(module, module)
        run = library.init(project="supra", name=folder.name, config=dict(recipe))
        return lambda step, figures: run.log(dict(figures), step=step)

    return opened


_OPENERS = {"tensorboard": _tensorboard, "wandb": _wandb_like("wandb"), "trackio": _wandb_like("trackio")}
