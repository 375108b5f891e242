"""What a rank holds while it loads, steps and saves: `torchrun holding.py RECIPE RUN`, which writes RUN-<rank>.json.

Peaks are VmHWM of /proc/self/status, which Linux counts and lets a process reset; `own` is what this rank has of the
model's parameters, `kept` what it holds between step and save. All in bytes.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from supra_cli.core import parallel
from supra_cli.core import recipe as recipes
from supra_cli.core.checkpoint import slices
from supra_cli.core.lookup import lookup
from supra_cli.core.train import loop
from supra_cli.core.train.events import Saved, StageStarted, Step

slices._PIECE_BYTES = 2**20  # in proportion to a small model


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def settle() -> int:
    """What is in memory when nothing is that nobody wants any more; the peak begins there again."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def work(recipe: Path, output: Path) -> None:
    found: dict[str, int] = {}

    def measured(original: Callable[..., Any]) -> Callable[..., Any]:
        def build(*given: Any) -> Any:
            before = settle()
            built = original(*given)
            found["load"] = resident("VmHWM") - before
            found["own"] = sum(parameter.to_local().nbytes for parameter in built.student.parameters())
            return built

        return build

    loop.build = measured(loop.build)
    with parallel.joined("cpu") as world:
        for event in loop.uptrain(recipes.load(recipe, lookup=lookup), output, world=world):
            if isinstance(event, StageStarted):
                settle()
            if isinstance(event, Step):
                found["step"], found["kept"] = resident("VmHWM"), settle()
            if isinstance(event, Saved):
                found["save"] = resident("VmHWM")
        output.with_name(f"{output.name}-{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    work(Path(sys.argv[1]), Path(sys.argv[2]))
