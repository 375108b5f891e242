"""A run in this process that may be asked to stop."""

from __future__ import annotations

import threading
from pathlib import Path

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
