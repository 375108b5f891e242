"""`supra uptrain`: run a recipe."""

from __future__ import annotations

import logging
import os
import signal
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from supra_cli.commands import console, plan

_LINES_IN_A_STAGE = 20


def run(
    recipe: Annotated[
        Path, typer.Option("--recipe", "-r", help="Recipe to run: a TOML file, or a shipped one's name.")
    ],
    model: Annotated[
        Path | None,
        typer.Option(
            "--model", "-m", help="Directory of a converted model to start from, instead of converting the base."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Run directory.", show_default="runs/<recipe's name>")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key of the recipe: --set stages.0.lr=1e-4.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in the run directory.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the run in the run directory first.")] = False,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")] = "auto",
    dtype: Annotated[
        str, typer.Option("--dtype", help="What is computed in: auto, float32 or bfloat16; masters stay float32.")
    ] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Uptrain a converted model: the stages of a recipe, with checkpoints that --resume goes on from."""
    from supra_cli.core import device as devices
    from supra_cli.core import recipe as recipes
    from supra_cli.core.errors import UsageError
    from supra_cli.core.lookup import lookup

    def parsed() -> recipes.Recipe:
        if resume and overwrite:
            raise UsageError("--resume goes on with what --overwrite would delete; give one of them")
        return recipes.load(recipe, overrides or (), lookup=lookup)

    if dry_run:
        given = {"model": model, "output": output, "resume": resume, "overwrite": overwrite}
        typed = plan.command(recipe, overrides or (), **given, device=device, dtype=dtype)
        # Of the device that the run would take; where it is left to this machine, of a GPU, as `supra plan` does.
        plan.show(parsed(), json, dtype, "cpu" if device == "cpu" else "cuda", run=typed, model=model)
        return

    output = output or Path("runs") / recipe.stem
    finished = None
    stop = threading.Event()
    with ExitStack() as listening:
        # While ranks come together, one that is missed may have died, of which torchrun tells the others by SIGTERM.
        listening.enter_context(_heeding(stop, signal.SIGUSR1))

        from supra_cli.core import parallel
        from supra_cli.core.train import loop

        with parallel.joined(device) as world, listening:  # which ends before a rank tells how it ended
            listening.enter_context(_heeding(stop, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT))
            if not world.leads:  # the first rank speaks for all
                logging.getLogger("supra_cli").setLevel(logging.ERROR)
            events = loop.uptrain(
                parsed(),  # here, where what all ranks would say alike is said once
                output,
                model=model,
                resume=resume,
                overwrite=overwrite,
                device=world.device,
                dtype=None if dtype == "auto" else devices.dtype(dtype, world.device),
                stop=stop,
                world=world,
            )
            if world.leads:
                finished = _follow(events)
            else:
                for _ in events:
                    pass
    if finished is None:
        return
    if json:
        console.document(finished)
    elif finished:
        console.result(finished["path"])


@contextmanager
def _heeding(stop: threading.Event, *numbers: signal.Signals) -> Iterator[None]:
    """These signals ask the loop, by `stop`, to finish its step and save; a second SIGINT interrupts at once.

    Not SIGHUP that is ignored, as under nohup, and SIGQUIT only of torchrun, which hands it on. When one rank has
    ended, torchrun sends the others SIGTERM: these are ending too, and are to say why undisturbed.
    """
    launched, interrupted = "TORCHELASTIC_RUN_ID" in os.environ, threading.Event()

    def ask(number: int, frame: object) -> None:
        if number == signal.SIGINT:
            if interrupted.is_set():
                raise KeyboardInterrupt
            interrupted.set()
        if number == signal.SIGHUP:
            _leave_terminal()
        stop.set()
        if os.environ.get("RANK", "0") == "0":  # torchrun hands its own signals on to every rank
            console.note(f"{signal.Signals(number).name}: saving after this step, or the first, and stopping")

    unheeded = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
    unheeded |= set() if launched else {signal.SIGQUIT}
    before = {number: signal.signal(number, ask) for number in numbers if number not in unheeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if launched else handler)


def _leave_terminal() -> None:
    """Let stdout and stderr lead nowhere where they led to a terminal: it is gone, and to write to it is an error."""
    for stream in (1, 2):
        if stat.S_ISCHR(os.fstat(stream).st_mode):
            os.dup2(nowhere := os.open(os.devnull, os.O_WRONLY), stream)
            os.close(nowhere)


def _follow(events: Iterator[Any]) -> dict[str, Any]:
    """Show events as they come; what the last one said, for --json."""
    from supra_cli.core.train.events import Finished

    show = _Bar() if sys.stderr.isatty() and not console.is_quiet() else _Lines()
    with show:
        for event in events:
            show(event)
            if isinstance(event, Finished):
                return {
                    "path": str(event.path),
                    "loss": event.loss,
                    "teacher_loss": event.teacher,
                    "tokens": event.tokens,
                    "seconds": round(event.seconds, 1),
                }
    return {}


class _Lines:
    """One plain line for everything but steps; of those, about twenty a stage."""

    def __init__(self) -> None:
        self._steps = 0

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...

    def __call__(self, event: Any) -> None:
        if type(event).__name__ == "StageStarted":
            self._steps = event.steps
        if type(event).__name__ == "Step" and event.stage_step % max(1, self._steps // _LINES_IN_A_STAGE):
            return
        self._say(_sentence(event, self._steps))

    def _say(self, text: str) -> None:
        console.note(text)


class _Bar(_Lines):
    """A bar for the stage, with loss, tokens a second and the time left; lines above it for the rest."""

    def __enter__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, TextColumn("{task.fields[figures]}"), console=Console(stderr=True))
        self._progress.start()
        self._task = None

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def __call__(self, event: Any) -> None:
        if type(event).__name__ == "StageStarted":
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task = self._progress.add_task(event.kind, total=event.steps, figures="")
        if type(event).__name__ == "Step":
            figures = f"loss {event.loss:.4f}  {event.tokens_per_second:,.0f} tokens/s"
            self._progress.update(self._task, completed=event.stage_step, figures=figures)
        else:
            super().__call__(event)

    def _say(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)


def _sentence(event: Any, steps: int) -> str:
    match type(event).__name__:
        case "Note":
            return event.text
        case "StageStarted":
            trained = f"{console.number(event.trainable)} of {console.number(event.total)} parameters move"
            return f"stage {event.index} ({event.kind}): {event.steps} steps, {trained}"
        case "Step":
            left = (steps - event.stage_step) * event.seconds
            return (
                f"step {event.stage_step}/{steps}  loss {event.loss:.4f}  gradient {event.grad_norm:.2f}  "
                f"lr {event.lr:.2e}  "
                f"{event.tokens_per_second:,.0f} tokens/s  {console.duration(left)} left"
            )
        case "Validated":
            teacher = f", teacher {event.teacher:.4f}" if event.teacher is not None else ""
            return f"held out, step {event.step}: {event.loss:.4f} nats per token{teacher}"
        case "Saved":
            return f"saved {event.path}"
        case "Finished":
            spent = f"{console.number(event.tokens)} tokens in {console.duration(event.seconds)}"
            return f"finished: {spent}, model in {event.path}"
    raise TypeError(f"no sentence for {event}")
