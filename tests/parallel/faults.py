"""supra with one fault in it, on each rank: `torchrun ... faults.py KIND@STEP:RANK,RANK uptrain ...`, and what launches it.

What happens to those ranks in that step, by KIND; to ranks that torchrun has started again, nothing:

- SIGKILL, SIGTERM, SIGUSR1: the process has that signal as the step begins
- SIGKILL-in-save: it is killed while the step's checkpoint has its model, and its training state is being written
- nan: its part of the loss is NaN
- full: from that step's checkpoint on, its disk is full
- hold: it makes the file `held` in the run and waits for a signal
"""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

PATIENCE = 150.0
"""Seconds that any wait may take, on a machine that does other things too; a hang would take 30 minutes or more."""
ROWS, LENGTH = 4, 32


def recipe(folder: Path, steps: int, every: int) -> Path:
    """A recipe for a Llama of 37 thousand parameters, half of its `steps` transfer, with a save after `every` steps."""
    import tomli_w
    from tiny import save_base

    from supra_cli.core import corpus

    text, batch = folder / "text.txt", ROWS * LENGTH
    text.write_text("".join(document.text for document in corpus.documents("validation"))[:20_000], encoding="utf-8")
    save_base(folder / "base", [text.read_text(encoding="utf-8")], num_hidden_layers=2)
    shared = {"batch_tokens": batch, "micro_batch_tokens": batch, "lr": 1e-3, "warmup_steps": 2}
    described = {
        "base": str(folder / "base"),
        "mixer": {"name": "supra", "gain": "head"},
        "data": {"seq_len": LENGTH, "sources": [{"path": str(text)}]},
        "checkpoint": {"every_steps": every, "keep_last": 2},
        "stages": [
            {"kind": "transfer", "tokens": steps // 2 * batch, **shared},
            {"kind": "finetune", "tokens": (steps - steps // 2) * batch, **shared},
        ],
    }
    path = folder / "recipe.toml"
    path.write_text(tomli_w.dumps(described), encoding="utf-8")
    return path


class Launch:
    """A torchrun that runs `supra ARGUMENTS` on some ranks."""

    def __init__(self, folder: Path, arguments: Sequence[object], ranks: int, fault: str | None, options: Sequence[str]):
        self._log = folder / f"launch-{time.monotonic_ns()}.log"
        program = ["-m", "supra_cli"] if fault is None else [__file__, fault]
        command = ["-m", "torch.distributed.run", "--nproc-per-node", ranks, *options, *program, *arguments]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "SUPRA_CACHE": str(folder / "cache"),
        }
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, command)], stdout=log, stderr=log, env=environment
            )

    def wait(self) -> int:
        """Its exit code."""
        return self.process.wait(PATIENCE)

    def said(self) -> str:
        """What the ranks and torchrun have printed."""
        return self._log.read_text(encoding="utf-8")

    def errors(self) -> list[str]:
        """The sentences in which supra says why it ends."""
        return [line for line in self.said().splitlines() if line.startswith("error: ")]

    def until(self, happened: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not happened():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < end, self.said()
            time.sleep(0.05)


@contextmanager
def launched(
    recipe: Path, output: Path, *more: str, ranks: int = 2, fault: str | None = None, options: Sequence[str] = ()
) -> Iterator[Launch]:
    """`supra uptrain` on the CPU; ended with the block, and so are its ranks."""
    arguments = ["uptrain", "--recipe", recipe, "--output", output, "--device", "cpu", *more]
    launch = Launch(output.parent, arguments, ranks, fault, options)
    try:
        yield launch
    finally:
        launch.process.terminate()
        launch.process.wait(PATIENCE)


def run(recipe: Path, output: Path, *more: str, **how: Any) -> Launch:
    """`launched`, to its end."""
    with launched(recipe, output, *more, **how) as launch:
        launch.wait()
    return launch


def steps(output: Path) -> list[int]:
    """The numbers of the steps in the run's metrics, in the order in which they were taken."""
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [record["step"] for record in records if record["event"] == "step"]


def checkpoints(output: Path) -> list[int]:
    """The steps of complete checkpoints."""
    return sorted(int(marker.parent.name.removeprefix("step-")) for marker in output.glob("step-*/COMPLETE"))


def bits(output: Path) -> Mapping[str, bytes]:
    """Every file of weights and moments of the last checkpoint."""
    last = output / "last"
    return {str(path.relative_to(last)): path.read_bytes() for path in last.rglob("*.safetensors")}


def truncate(output: Path) -> int:
    """Cut the weights of the newest checkpoint in half; its step."""
    newest = checkpoints(output)[-1]
    weights = min((output / f"step-{newest:06}").glob("*.safetensors"))
    os.truncate(weights, weights.stat().st_size // 2)
    return newest


# -- on a rank ---------------------------------------------------------------------------------------------------------


def build_in(kind: str, at: int) -> None:
    """Let it happen to this process in step `at`."""
    import torch

    from supra_cli.core.checkpoint import slices
    from supra_cli.core.stages.transfer import Transfer
    from supra_cli.core.train import loop

    step, write, loss = loop.Trainer._step, slices._write, Transfer.loss
    number = 0

    def taken(trainer: loop.Trainer, *given: Any) -> Iterator[Any]:
        nonlocal number
        number = trainer.counters.step + 1
        if number == at and kind == "hold":
            (trainer.run.path / "held").touch()
            signal.pause()
        if number == at and hasattr(signal, kind):
            os.kill(os.getpid(), getattr(signal, kind))
        yield from step(trainer, *given)

    def written(tensors: Any, path: Path, *given: Any) -> None:
        if number == at and kind == "SIGKILL-in-save" and path.parent.name == "training":
            os.kill(os.getpid(), signal.SIGKILL)
        if number >= at and kind == "full":
            with mock.patch.object(os, "fsync", side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))):
                return write(tensors, path, *given)
        return write(tensors, path, *given)

    def scored(stage: Any, student: Any, teacher: Any, batch: Any, backward: Callable[[Any], Any]) -> Any:
        def spoilt(part: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                return backward(part * math.nan)

        return loss(stage, student, teacher, batch, spoilt if number == at and kind == "nan" else backward)

    loop.Trainer._step, slices._write, Transfer.loss = taken, written, scored


if __name__ == "__main__":
    from supra_cli.__main__ import main

    kind, _, place = sys.argv[1].partition("@")
    at, _, ranks = place.partition(":")
    if os.environ["RANK"] in ranks.split(",") and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        build_in(kind, int(at))
    sys.exit(main(sys.argv[2:]))
