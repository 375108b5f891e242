"""A run in this process that may be asked to stop, and what two runs have in common."""

from __future__ import annotations

import threading
from pathlib import Path

import safetensors.torch
import torch

from supra_cli.core import recipe as recipes
from supra_cli.core.errors import Stopped
from supra_cli.core.lookup import lookup
from supra_cli.core.train import loop
from supra_cli.core.train.events import Step


def run(recipe: Path, output: Path, *, stop_after: int | None = None, **given) -> list:
    """The events of the run, up to its end or to the save that a stop after step `stop_after` asks for."""
    stop, events = threading.Event(), []
    try:
        for event in loop.uptrain(recipes.load(recipe, lookup=lookup), output, stop=stop, **given):
            events.append(event)
            if isinstance(event, Step) and event.step == stop_after:
                stop.set()
    except Stopped:
        assert stop_after is not None
    return events


def assert_same(ours: dict[str, bytes], wanted: dict[str, bytes], device: str) -> None:
    """Files of tensors, alike to the bit on a CPU. On a GPU, where some sums have no fixed order, to 5 % of the size of
    all numbers of a kind; 8-bit codes are no numbers.
    """
    assert ours.keys() == wanted.keys()
    if device == "cpu":
        assert ours == wanted
        return
    for file in wanted:
        new, old = (safetensors.torch.load(part[file]) for part in (ours, wanted))
        assert new.keys() == old.keys()
        for kind in {name.partition(".")[0] for name in old} - {"exp_avg/codes", "exp_avg_sq/codes"}:
            a, b = (
                torch.cat([part[name].flatten().double() for name in sorted(old) if name.partition(".")[0] == kind])
                for part in (new, old)
            )
            assert (a - b).norm() <= 0.05 * b.norm(), (file, kind)
