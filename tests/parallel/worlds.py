"""The runs that tests/parallel/test_world.py compares, each by all ranks of a world: `torchrun worlds.py FOLDER`, or
`run(FOLDER, ALONE)` for a world of one.

FOLDER/runs.json is a list of {"recipe": path, "output": path, "after": output, "stop_after": step, "dtype": name,
"trick": name, "recipe of the last": path}, all but the first two optional. A run keeps the gradients of its first step
in `gradients.safetensors`, and a SupraError that ends it in a file beside it, `OUTPUT.error`.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from safetensors.torch import save_file

from supra_cli.core import parallel
from supra_cli.core import recipe as recipes
from supra_cli.core.data import rows
from supra_cli.core.data.packing import Batch
from supra_cli.core.data.tokens import Tokens
from supra_cli.core.errors import Stopped, SupraError
from supra_cli.core.lookup import lookup
from supra_cli.core.mixers.supra import Supra
from supra_cli.core.parallel import World
from supra_cli.core.stages.finetune import Finetune
from supra_cli.core.train import loop
from supra_cli.core.train.events import Step


def run(folder: Path, world: World) -> None:
    for task in json.loads((folder / "runs.json").read_text()):
        output = Path(task["output"])
        if "after" in task and world.leads:
            shutil.copytree(task["after"], output, symlinks=True)
        world.barrier()
        stop = threading.Event()
        settings = {"dtype": getattr(torch, task["dtype"])} if "dtype" in task else {}
        recipe = recipes.load(Path(task["recipe"]), lookup=lookup)
        if world.rank == world.size - 1 and "recipe of the last" in task:
            recipe = recipes.load(Path(task["recipe of the last"]), lookup=lookup)
        try:
            with TRICKS[task.get("trick", "none")](output, world), _first_gradients(output, world):
                # One rank alone is asked to stop.
                for event in loop.uptrain(recipe, output, resume="after" in task, stop=stop, world=world, **settings):
                    if (
                        isinstance(event, Step)
                        and event.step == task.get("stop_after")
                        and world.rank == world.size - 1
                    ):
                        stop.set()
        except Stopped:
            pass
        except SupraError as error:
            if world.leads:
                (output.parent / f"{output.name}.error").write_text(str(error))


@contextmanager
def _first_gradients(output: Path, world: World) -> Iterator[None]:
    """Of the first step that any optimizer takes, whole, before it is taken."""
    original, seen = torch.optim.AdamW.step, []

    def step(optimizer: torch.optim.Optimizer, *given: object) -> object:
        if not seen:
            seen.append(True)
            pairs = [p for g in optimizer.param_groups for p in zip(g["names"], g["params"], strict=True)]
            gradients = {name: _whole(parameter.grad) for name, parameter in pairs}
            if world.leads:
                save_file(gradients, output / "gradients.safetensors")
        return original(optimizer, *given)

    with mock.patch.object(torch.optim.AdamW, "step", step):
        yield


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone().contiguous()


@contextmanager
def _nothing(output: Path, world: World) -> Iterator[None]:
    yield


@contextmanager
def _hub(output: Path, world: World) -> Iterator[None]:
    """A dataset on the hub is random documents, and each process that opens it leaves a file."""

    def open_hub(source: object, split: str, tokenizer: object, packing: str) -> rows.Documents:
        (output.parent / f"{output.name}.opened-{world.rank}").touch()
        ids = np.random.default_rng(0).integers(4, 300, 5000)
        return rows.Documents(Tokens(ids, np.arange(50, 5001, 50), "random"), (0,), packing)

    with mock.patch.object(rows, "_open_hub", open_hub):
        yield


@contextmanager
def _rows_apart(output: Path, world: World) -> Iterator[None]:
    """Rank 1 has other text in its third step."""
    original, calls = rows.Mixture.batch, []

    def batch(mixture: rows.Mixture, *given: int) -> object:
        calls.append(True)
        drawn = original(mixture, *given)
        if world.rank == 1 and len(calls) == 3:
            drawn.input_ids[0, 0] += 1
        return drawn

    with mock.patch.object(rows.Mixture, "batch", batch):
        yield


@contextmanager
def _unused(output: Path, world: World) -> Iterator[None]:
    """A mixer has a parameter that its forward pass has forgotten."""
    original = Supra.__init__

    def begin(mixer: Supra, *given: object, **named: object) -> None:
        original(mixer, *given, **named)
        mixer.forgotten = torch.nn.Parameter(torch.zeros(6))

    with mock.patch.object(Supra, "__init__", begin):
        yield


@contextmanager
def _on_one_machine(output: Path, world: World) -> Iterator[None]:
    """To all ranks but the first the text is a name on the hub."""
    with mock.patch.object(rows.sources, "is_on_hub", return_value=not world.leads):
        yield


@contextmanager
def _measuring(output: Path, world: World) -> Iterator[None]:
    """Finetuning looks at the student's answers before its first step."""

    def measure(stage: Finetune, student: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        answers = student(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        return {"scale": answers.square().sum()}

    patched = {"rounds": lambda stage, student: 1, "measure": measure, "begin": lambda stage, *given: None}
    with mock.patch.multiple(Finetune, **patched):
        yield


@contextmanager
def _out_of_sight(output: Path, world: World) -> Iterator[None]:
    """The last rank does not see what lies in the run's directory."""
    original = Path.is_dir

    def is_dir(path: Path) -> bool:
        return original(path) and not (world.rank == world.size - 1 and path.parent == output)

    with mock.patch.object(Path, "is_dir", is_dir):
        yield


TRICKS = {
    "out of sight": _out_of_sight,
    "none": _nothing,
    "hub": _hub,
    "rows apart": _rows_apart,
    "unused": _unused,
    "on one machine": _on_one_machine,
    "measuring": _measuring,
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    with parallel.joined("cpu") as joined:
        run(Path(sys.argv[1]), joined)
