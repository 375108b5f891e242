"""The training loop: stages in order, one optimizer step after the other, everything needed to go on saved as it goes.

Resuming is exact: the state that a checkpoint holds (weights, moments, random state, position in the data, counters) is
all the state there is, so a run that was killed and resumed ends with the same bits as one that was not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from supra_cli.core import checkpoint, hub
from supra_cli.core import device as devices
from supra_cli.core import recipe as recipes
from supra_cli.core.data import rows
from supra_cli.core.data.packing import Batch
from supra_cli.core.data.tokenizer import check_ids
from supra_cli.core.environment import environment
from supra_cli.core.errors import Stopped, SupraError, UsageError
from supra_cli.core.evaluate import perplexity
from supra_cli.core.files import read_json, write_json
from supra_cli.core.modeling import SupraConfig
from supra_cli.core.stages import Stage
from supra_cli.core.swap import mixer_names
from supra_cli.core.train import origin, state
from supra_cli.core.train.events import Event, Finished, Note, Saved, StageStarted, Step, Validated
from supra_cli.core.train.nonfinite import leave_out
from supra_cli.core.train.optimizer import adamw, lr_factor, masters_in_place, release, set_lr
from supra_cli.core.train.prepare import moves_base, prepare, rehearse, stage_of, teacher_of
from supra_cli.core.train.run import RunDirectory
from supra_cli.core.train.state import Counters
from supra_cli.core.train.step import Stepper, begin, check_dtype, computing_in
from supra_cli.core.train.trackers import library, open_trackers


def uptrain(
    recipe: recipes.Recipe,
    output: Path,
    *,
    model: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    stop: threading.Event | None = None,
) -> Iterator[Event]:
    """Run `recipe` into the directory `output`, yielding what happens.

    `model` starts from a converted model instead of converting the base; `dtype` is what the passes compute in (masters
    stay fp32), by default what the run began with, and for a new one bf16 on CUDA and fp32 elsewhere. When `stop` is
    set, the step in progress is finished, everything is saved and Stopped is raised. Raises UsageError for an occupied
    directory or a recipe, model or dtype that changed, SupraError for a loss that is not finite.
    """
    run = RunDirectory(output)
    run.check_free(replace=resume or overwrite)
    with run.locked():
        trainer = Trainer(recipe, run, device, dtype, stop or threading.Event())
        yield from trainer.open(model, resume)
        if trainer.counters.finished:
            yield Note(f"{output} is already finished; nothing to do")
            return
        yield from trainer.train()


class Trainer:
    """One run: the student, its data and its counters."""

    def __init__(
        self,
        recipe: recipes.Recipe,
        run: RunDirectory,
        device: str,
        dtype: torch.dtype | None,
        stop: threading.Event,
    ):
        self.recipe = recipe
        self.run = run
        self.device = torch.device(device)
        self.dtype = None if dtype is None else check_dtype(dtype)
        self.stop = stop
        self.counters = Counters()
        self._same: dict[str, Any] = {}
        self._constants: dict[str, Tensor] = {}
        self._last_loss: float | None = None
        self._validated_step: int | None = None
        self._checkpoint: Path | None = None
        self._clock = time.perf_counter()

    def open(self, model: Path | None, resume: bool) -> Iterator[Event]:
        """Bring the run to where it should go on from: its newest sound checkpoint, or the beginning.

        Whatever can fail is tried before anything is written or cleared.
        """
        if resume:
            self._same_recipe()
            yield from self._newest_sound()
        if self.counters.finished:
            return
        self.dtype = self.dtype or self._dtype_so_far() or devices.dtype("auto", self.device.type)
        if self._checkpoint is not None:
            self.origin = origin.same_models(self.recipe, self.origin, self._same["models"], self.counters.stage)
            tokenizer = checkpoint.load_tokenizer(self.run.tokenizer)
            self._ready(tokenizer, self.student.config, self.origin.base)
            self.mixture.restore(self._data_state)
            self._same_sums()
            origin.same_start(self.run, self.origin, model)
            yield from self._same_machine()
            self._describe(self.run)
            self.run.trim_metrics(self.counters.step)
            self.student.to(self.device)
        else:
            if resume:
                yield Note(f"no complete checkpoint in {self.run.path}; starting from the beginning")
            start = origin.look(self.recipe, self.run, model)
            self._ready(start.tokenizer, start.config, start.base)
            with self.run.starting() as beside:
                self._describe(beside)
                (beside.path / "recipe.toml").write_text(recipes.dumps(self.recipe), encoding="utf-8")
                self.student, self.origin = origin.begin(start, self.recipe, beside, model)
                self.student.to(self.device)
                models = {role: weights for role, (_, weights) in origin.identities(self.recipe, start.base).items()}
                self._same = {"dtype": _word(self.dtype), "held_out": _digest(self.held_out), "models": models}
                self.counters.teacher_loss = self._teacher_loss()
        self.student.train()

    def _describe(self, run: RunDirectory) -> None:
        write_json(run.path / "env.json", environment(str(self.device)))

    def _ready(self, tokenizer: PreTrainedTokenizerBase, config: SupraConfig, base: str | None) -> None:
        """Open the data, and raise whatever else would end the run later than it could be known."""
        rehearse(self.recipe.stages[self.counters.stage :], config, tokenizer, base)
        for name in self.recipe.track:
            library(name)
        longest = max(map(self.recipe.seq_len, self.recipe.stages))
        self.mixture = rows.training(self.recipe.data, tokenizer, self.recipe.seed, longest)
        self.held_out = rows.held_out(self.recipe.data, tokenizer)
        # Only here can a token that was added without an embedding be met: on a GPU it would end the process.
        self._check_ids = partial(_check_ids, tokenizer, config)
        self._check_ids([self.held_out] if self.held_out is not None else [])
        if base is not None and self.held_out is not None and self._checkpoint is None:
            hub.open(base)
        self.trackers = open_trackers(self.recipe.track, self.run.path, self.recipe.model_dump(mode="json"))

    def _same_recipe(self) -> None:
        stored, now = self.run.path / "recipe.toml", self.recipe.trajectory()
        before = recipes.load(stored).trajectory() if stored.exists() else now
        if changed := [key for key in now if before[key] != now[key]]:
            raise UsageError(
                f"the recipe is not the one that {self.run.path} was started with: it differs in {', '.join(changed)} "
                "(see the run's recipe.toml); resume with the same recipe and --set, or start a new run"
            )

    def _dtype_so_far(self) -> torch.dtype | None:
        return getattr(torch, self._same["dtype"]) if self._checkpoint is not None else None

    def _same_sums(self) -> None:
        """UsageError where the losses so far and those to come would not be of one computation or one text."""
        if self._same["dtype"] != _word(self.dtype):
            raise UsageError(
                f"this run computes in {self._same['dtype']}, got {_word(self.dtype)}; "
                f"resume with --dtype {self._same['dtype']}, or start a new run"
            )
        if self._same["held_out"] != _digest(self.held_out):
            raise UsageError(
                "the held-out text changed since the run began, so its losses could not be compared; "
                "put back the same data.validation, or start a new run"
            )

    def _same_machine(self) -> Iterator[Event]:
        """Say where versions, processors or threads differ from the run's so far: then its last bits may, too."""
        with suppress(SupraError, OSError):
            before, now = read_json(self.run.path / "env.json"), environment(str(self.device))
            keys = [key for key in now if key not in ("command", "cpus") and before.get(key, now[key]) != now[key]]
            if keys:
                changed = ", ".join(f"{key} {before[key]} → {now[key]}" for key in keys)
                yield Note(f"going on under other conditions ({changed}): the last bits need not be those of one run")

    def _newest_sound(self) -> Iterator[Event]:
        """Load the newest complete checkpoint; a damaged one is named and the one before is taken."""
        found = self.run.complete()
        for path in reversed(found):
            try:
                checkpoint.verify(path)
                self.counters, self._data_state, self._same = state.read(path / "training")
                self.student, self.origin = origin.resume(path)
                state.restore_masters(path / "training", self.student)
            except state.OlderState:
                raise  # sound, so nothing to fall back from
            except (SupraError, OSError) as error:
                self.counters = Counters()
                yield Note(f"checkpoint {path.name} is damaged ({error}); falling back to the one before it")
                continue
            self._checkpoint = path
            yield Note(f"resuming from {path.name}")
            return
        if found:
            raise SupraError(f"no checkpoint in {self.run.path} can be read; start over with --overwrite")

    def train(self) -> Iterator[Event]:
        if self._checkpoint is None:
            yield from self._validate(self.counters.teacher_loss)
        while self.counters.stage < len(self.recipe.stages):
            yield from self._stage(self.recipe.stages[self.counters.stage])
        yield Finished(
            self.run.path / "last",
            self._last_loss,
            self.counters.teacher_loss,
            self.counters.tokens,
            self.counters.seconds,
        )

    def _stage(self, spec: recipes.Stage) -> Iterator[Event]:
        stage = stage_of(spec)
        trained = prepare(self.student, stage, spec)
        drawn = self._drawn(stage, spec)  # which may fit parameters, so before an optimizer copies them
        optimizer = adamw(self.student, trained, spec, self.dtype)
        if self._checkpoint is not None and self.counters.stage_step:
            state.restore_optimizer(self._checkpoint / "training", optimizer)
            state.restore_random(self._checkpoint / "training")
            stage.constants = state.constants(self._checkpoint / "training", self.device)
        self._constants = stage.constants
        self._checkpoint = None
        teacher = self._teacher(stage, spec)
        stepper = Stepper(stage, self.student, teacher, optimizer, spec.clip_norm, self.device, self.dtype)
        steps = self.recipe.steps(spec)
        moving = sum(parameter.numel() for _, parameter in trained)
        total = sum(parameter.numel() for parameter in self.student.parameters())
        yield StageStarted(self.counters.stage, spec.kind, steps, moving, total)
        self._clock = time.perf_counter()
        while self.counters.stage_step < steps:
            set_lr(optimizer, lr_factor(self.counters.stage_step, steps, spec))
            yield from self._step(stepper, spec, next(drawn))
            yield from self._between_steps(optimizer, steps, spec)
        release(optimizer)
        self.counters.stage, self.counters.stage_step = self.counters.stage + 1, 0

    def _drawn(self, stage: Stage, spec: recipes.Stage) -> Iterator[list[Batch]]:
        """The micro-batches of one step after the other, drawn when they are asked for; a stage begins on its first."""
        drawn = iter(partial(self._micro_batches, spec), None)
        if self.counters.stage_step:
            return drawn
        first = next(drawn)
        begin(stage, self.student, first, self.device, self.dtype)
        return itertools.chain([first], drawn)

    def _between_steps(self, optimizer: torch.optim.Optimizer, steps: int, spec: recipes.Stage) -> Iterator[Event]:
        counters = self.counters
        stage_ends = counters.stage_step == steps
        run_ends = stage_ends and counters.stage + 1 == len(self.recipe.stages)
        if stage_ends or counters.step % self.recipe.validate_every_steps == 0:
            yield from self._validate(counters.teacher_loss)
        if stage_ends or self.stop.is_set() or counters.step % self.recipe.checkpoint.every_steps == 0:
            counters.finished = run_ends
            yield from self._save(optimizer)
        if self.stop.is_set() and not run_ends:
            raise Stopped(f"stopped after step {counters.step} with everything saved; go on with --resume")

    def _step(self, stepper: Stepper, spec: recipes.Stage, micro_batches: list[Batch]) -> Iterator[Event]:
        counters, tokens = self.counters, self.recipe.rows(spec) * self.recipe.seq_len(spec)
        # Once a stage, at its full rate: that the weights' format can hold the updates.
        watched = stepper.watch() if counters.stage_step == spec.warmup_steps else None
        outcome = stepper.take(micro_batches)
        if not outcome.finite:
            kept, policy = self.run.path / "non-finite", self.recipe.non_finite
            yield Note(leave_out(outcome, micro_batches, self.student, counters, spec.kind, policy, kept))
        elif watched is not None and (share := stepper.swallowed(watched)) > 0.5:
            raise SupraError(
                f"{100 * share:.0f} % of the updates in stage {counters.stage} ({spec.kind}) are too small for the "
                "weights' number format and change nothing; raise the learning rate"
            )
        seconds = self._lap()
        counters.stage_step += 1
        counters.step += 1
        counters.tokens += tokens
        counters.seconds += seconds
        step = Step(
            stage=counters.stage,
            stage_step=counters.stage_step,
            step=counters.step,
            tokens=counters.tokens,
            loss=outcome.loss,
            grad_norm=outcome.grad_norm,
            lr=max(float(group["lr"]) for group in stepper.optimizer.param_groups),
            tokens_per_second=tokens / seconds,
            seconds=seconds,
            metrics=outcome.metrics,
        )
        self.run.log({"event": "step", **dataclasses.asdict(step), "sources": self.mixture.tokens_by_source()})
        yield from self._track({"loss": step.loss, "grad_norm": step.grad_norm, "lr": step.lr, **step.metrics})
        yield step

    def _track(self, figures: dict[str, float]) -> Iterator[Event]:
        """Give the trackers the figures of this step; one that fails is named and heard of no more."""
        for log in list(self.trackers):
            try:
                log(self.counters.step, figures)
            except SupraError as error:
                self.trackers.remove(log)
                yield Note(str(error))

    def _micro_batches(self, spec: recipes.Stage) -> list[Batch]:
        rows_in_step, rows_at_once = self.recipe.rows(spec), self.recipe.micro_rows(spec)
        batches = [
            self.mixture.batch(min(rows_at_once, rows_in_step - start), self.recipe.seq_len(spec))
            for start in range(0, rows_in_step, rows_at_once)
        ]
        self._check_ids(batches)
        return batches

    def _lap(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        return seconds

    def _teacher(self, stage: Stage, spec: recipes.Stage) -> nn.Module | None:
        folder = teacher_of(stage, spec, self.student.config, self.origin.base)
        if folder is None:
            return None
        return checkpoint.load(folder, device=self.device, dtype=self.dtype).eval().requires_grad_(False)

    def _teacher_loss(self) -> float | None:
        """The base's own held-out loss, measured once a run and kept with the counters."""
        if self.origin.base is None or self.held_out is None:
            return None
        teacher = checkpoint.load(hub.open(self.origin.base), device=self.device, dtype=self.dtype)
        return self._held_out_loss(teacher.eval())

    def _validate(self, teacher_loss: float | None) -> Iterator[Event]:
        if self.held_out is None:
            return
        counters, loss = self.counters, self._held_out_loss(self.student)
        self._last_loss, self._validated_step = loss, counters.step
        self.run.log({"event": "validation", "step": counters.step, "loss": loss, "teacher": teacher_loss})
        yield from self._track({"held_out_loss": loss})
        yield Validated(counters.step, loss, teacher_loss)
        self._clock = time.perf_counter()

    def _held_out_loss(self, model: nn.Module) -> float:
        """Nats per held-out token."""
        with computing_in(self.dtype, self.device):
            return perplexity(model, *self.held_out).nats

    def _save(self, optimizer: torch.optim.Optimizer) -> Iterator[Event]:
        """Save everything; `best` is the saved step with the lowest held-out loss."""
        counters, loss = self.counters, self._last_loss
        validated = loss is not None and self._validated_step == counters.step
        best = validated and loss < (math.inf if counters.best_loss is None else counters.best_loss)
        if best:
            counters.best_loss, counters.best_step = loss, counters.step
        dtype, unchanged = getattr(torch, self.recipe.checkpoint.dtype), self._unchanged()
        with self.run.writing(counters.step) as folder, masters_in_place(optimizer):
            masters = {} if dtype == torch.float32 else dict(self.student.named_parameters())
            if unchanged is not None:
                masters = {name: masters[name] for name in masters.keys() & mixer_names(self.student)}
            checkpoint.save(
                self.student,
                folder,
                source=self.run.tokenizer,
                unchanged=unchanged,
                provenance=self._provenance(),
                dtype=dtype,
            )
            data, training = self.mixture.state(), folder / "training"
            state.save(training, counters, optimizer, masters, self._constants, data, self._same)
        path = self.run.step_path(counters.step)
        self.run.link("last", path)
        if best:
            self.run.link("best", path)
        self.run.prune(self.recipe.checkpoint.keep_last)
        yield Saved(path)
        self._clock = time.perf_counter()

    def _unchanged(self) -> Path | None:
        """The converted model, as long as it is there as it was and only mixers have moved since."""
        converted, stages = self.run.path / "converted", self.recipe.stages[: self.counters.stage + 1]
        if self.origin.parent is None or any(moves_base(self.student, spec) for spec in stages):
            return None
        return converted if checkpoint.holds(converted, self.origin.parent) else None

    def _provenance(self) -> dict:
        return {
            "base": self.origin.base,
            "parent": self.origin.parent,
            "recipe": recipes.dumps(self.recipe),
            "step": self.counters.step,
            "tokens": self.counters.tokens,
            "seconds": round(self.counters.seconds, 3),
            "tokens_by_source": self.mixture.tokens_by_source(),
            "data": self.mixture.digests(),
        }


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _digest(batch: Batch | None) -> str | None:
    """Of what held-out rows say, wherever their text lies."""
    return None if batch is None else hashlib.sha256(b"".join(rows.numpy().tobytes() for rows in batch)).hexdigest()


def _check_ids(tokenizer: PreTrainedTokenizerBase, config: SupraConfig, batches: Iterable[Batch]) -> None:
    """SupraError where the text holds a token that the model has no embedding for."""
    check_ids((int(batch.input_ids.max()) for batch in batches), tokenizer, config)
