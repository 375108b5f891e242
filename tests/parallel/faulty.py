"""`supra`, and one thing that goes wrong in it: `torchrun faulty.py FAULT uptrain ...`.

FAULT is JSON: {"kind": kind, "rank": number, "step": number}. It strikes when that step is about to be taken, or when
its sums are known, or while its save is written, or before a run begins, on that rank or, without `rank`, on all, and
not again in processes that torchrun started anew.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from supra_cli.__main__ import main
from supra_cli.core.train import loop


class Fault(NamedTuple):
    kind: str
    step: int
    rank: int | None = None


def arm(fault: Fault) -> None:
    """Let `fault` strike in this process."""
    if fault.rank not in (None, int(os.environ["RANK"])) or int(os.environ["TORCHELASTIC_RESTART_COUNT"]) > 0:
        return
    if fault.kind in _SIGNALS:
        _before_step(fault.step, lambda: os.kill(os.getpid(), _SIGNALS[fault.kind]))
    elif fault.kind == "term after sums":
        _before_step(fault.step, _stop_after_next_sums)
    elif fault.kind in _TO_TORCHRUN:
        _before_step(fault.step, lambda: os.kill(os.getppid(), _TO_TORCHRUN[fault.kind]))
    elif fault.kind == "kill at start":
        _before_anything_is_cleared(lambda: os.kill(os.getpid(), signal.SIGKILL))
    elif fault.kind == "nan":
        _before_step(fault.step, _spoil_next_loss)
    elif fault.kind == "kill in save":
        _in_save(fault.step, lambda path: os.kill(os.getpid(), signal.SIGKILL))
    elif fault.kind == "full disk":
        _in_save(fault.step, _refuse)
    else:
        raise ValueError(fault.kind)


_SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "usr1": signal.SIGUSR1}
_TO_TORCHRUN = {
    f"{number.name} to torchrun": number for number in (signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT, signal.SIGINT)
}


def _before_step(number: int, strike: Callable[[], None]) -> None:
    original = loop.Trainer._step

    def step(trainer: loop.Trainer, *given: Any) -> Iterator[Any]:
        if trainer.counters.step + 1 == number:
            strike()
        yield from original(trainer, *given)

    loop.Trainer._step = step


def _stop_after_next_sums() -> None:
    original = loop.take

    def take(*given: Any) -> Any:
        outcome = original(*given)
        os.kill(os.getpid(), signal.SIGTERM)
        loop.take = original
        return outcome

    loop.take = take


def _before_anything_is_cleared(strike: Callable[[], None]) -> None:
    loop.RunDirectory.starting = lambda run: strike()


def _spoil_next_loss() -> None:
    original = loop.take

    def take(stage: Any, *given: Any) -> Any:
        loss = stage.loss
        stage.loss = lambda s, t, batch, backward: loss(s, t, batch, lambda part: backward(part * float("nan")))
        return original(stage, *given)

    loop.take = take


def _in_save(number: int, strike: Callable[[Path], None]) -> None:
    """Where moments are written, the model's own weights being there already."""
    original = os.fsync

    def fsync(file: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{file}"))
        if path.name == "optimizer.safetensors" and path.parts[-3] == f".writing-{number:06d}":
            strike(path)
        original(file)

    os.fsync = fsync


def _refuse(path: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


if __name__ == "__main__":
    arm(Fault(**json.loads(sys.argv[1])))
    sys.exit(main(sys.argv[2:]))
