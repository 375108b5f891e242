"""The training loop: stages in order, one optimizer step after the other, everything needed to go on saved as it goes.

A stage builds what it trains from the last save, whether that was written a moment ago or by a process that was killed:
weights, moments, position in the data and counters are all the state there is, and the random numbers of a step depend
on the seed, the step and the rank alone. So a run that was killed and resumed ends with the same bits as one that was
not, on as many ranks; on another number of them it takes the same rows in the same order, and sums in another.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from supra_cli.core import checkpoint
from supra_cli.core import recipe as recipes
from supra_cli.core.data.packing import Batch
from supra_cli.core.errors import Stopped, SupraError, UsageError
from supra_cli.core.parallel import ALONE, World
from supra_cli.core.swap import mixer_names
from supra_cli.core.train import state
from supra_cli.core.train.build import Built, build, moves_base, optimise, stage_of, teacher_of
from supra_cli.core.train.events import Event, Finished, Note, Saved, StageStarted, Step, Validated
from supra_cli.core.train.held_out import held_out_loss
from supra_cli.core.train.nonfinite import leave_out
from supra_cli.core.train.opening import Opening, Standing
from supra_cli.core.train.optimizer import lr_factor, masters, set_lr
from supra_cli.core.train.run import STOPPED, RunDirectory
from supra_cli.core.train.step import Computing, begin, check_dtype, take


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
    world: World = ALONE,
) -> Iterator[Event]:
    """Run `recipe` into the directory `output`, yielding what happens; every rank of `world` calls it alike.

    `model` starts from a converted model instead of converting the base; `dtype` is what the passes compute in (weights
    stay fp32), by default what the run began with, and for a new one bf16 on CUDA and fp32 elsewhere. When `stop` is
    set on any rank, the step in progress is finished, everything is saved and Stopped is raised. Processes that
    torchrun started again go on with what they had begun. Raises UsageError for an occupied directory or a recipe,
    model or dtype that changed, SupraError for a loss that is not finite.
    """
    saved = recipe.checkpoint, recipe.validate_every_steps
    given = {"recipe": (recipe.trajectory(), saved), "model": model is not None, "dtype": dtype}
    _same_call(world, given | {"resume": resume, "overwrite": overwrite})
    run = RunDirectory(output)
    again = world.restarts > 0 and world.shared(run.is_of(world.launch))
    if again:
        resume, overwrite = True, False
    if world.leads:
        run.check_free(replace=resume or overwrite)
    with run.locked() if world.leads else nullcontext():
        run.honour_stop(world, again)
        place = torch.device(device)
        dtype = None if dtype is None else check_dtype(dtype)
        opening = Opening(recipe, run, place, world)
        standing = (yield from opening.go_on(model, dtype)) if resume else opening.begin(model, dtype)
        if standing is None:
            yield Note(f"{output} is already finished; nothing to do")
            return
        yield from Trainer(recipe, run, standing, place, stop or threading.Event(), world).train()


def _same_call(world: World, given: dict[str, Any]) -> None:
    """UsageError on all ranks where one was started with something else, as an older copy of the recipe."""
    first, *others = world.gathered(given)
    for rank, other in enumerate(others, 1):
        if differing := [name for name in first if other[name] != first[name]]:
            raise UsageError(
                f"rank {rank} was started with another {' and '.join(differing)}; give all ranks the same command, and "
                "all machines the same recipe and version of supra"
            )


class Trainer:
    """One run: where it stands, its data, and what it writes."""

    def __init__(
        self,
        recipe: recipes.Recipe,
        run: RunDirectory,
        standing: Standing,
        device: torch.device,
        stop: threading.Event,
        world: World,
    ):
        self.recipe = recipe
        self.run = run
        self.device = device
        self.stop = stop
        self.world = world
        self.dtype = standing.dtype
        self.origin = standing.origin
        self.counters = standing.counters
        self.mixture, self.held_out, self._check_ids, self.trackers = standing.material
        self._same = standing.same
        self._checkpoint = standing.checkpoint
        self._last_loss: float | None = None
        self._validated_step: int | None = None
        self._stops = False
        """Whether the step just taken is to be the last, on whichever rank that was asked."""
        self._clock = time.perf_counter()

    def train(self) -> Iterator[Event]:
        counters = self.counters
        for spec in self.recipe.stages[counters.stage :]:
            yield from self._stage(spec)
            gc.collect()  # FSDP2's modules hold each other, with what they shared out
            counters.stage, counters.stage_step = counters.stage + 1, 0
        yield Finished(
            self.run.path / "last", self._last_loss, counters.teacher_loss, counters.tokens, counters.seconds
        )

    def _stage(self, spec: recipes.Stage) -> Iterator[Event]:
        recipe, counters, world = self.recipe, self.counters, self.world
        saved = self._checkpoint or self.run.path / "converted"
        training = saved / "training"
        teacher = teacher_of(stage_of(spec), spec, checkpoint.read_config(saved), self.origin.base)
        built = build(spec, saved, teacher, world, self.device, self.dtype)
        computing = Computing(self.device, self.dtype, recipe.micro_rows(spec), world)
        drawn = None
        if not counters.stage_step:
            drawn = self._draw(spec)
            begin(built.stage, built.student, drawn, computing)
        optimise(built, spec, world, self.device, self.dtype)
        if counters.stage_step:
            state.restore_optimizer(training, built.optimizer)
            built.stage.constants = state.constants(training, self.device)
        if self._checkpoint is None:
            yield from self._validate(built.student)
        steps = recipe.steps(spec)
        yield StageStarted(counters.stage, spec.kind, steps, built.trained, built.total)
        self._clock = time.perf_counter()
        while counters.stage_step < steps:
            yield from self._step(built, spec, computing, drawn)
            drawn = None
            if world.size == 1:  # nobody has to be told, so it counts until now
                self._stops = self.stop.is_set()
            stage_ends = counters.stage_step == steps
            run_ends = stage_ends and counters.stage + 1 == len(recipe.stages)
            if stage_ends or counters.step % recipe.validate_every_steps == 0:
                yield from self._validate(built.student)
            if stage_ends or self._stops or counters.step % recipe.checkpoint.every_steps == 0:
                counters.finished = run_ends
                yield from self._save(built, spec)
            if self._stops and not run_ends:
                if world.leads and world.launch is not None:
                    (self.run.path / STOPPED).touch()
                raise Stopped(f"stopped after step {counters.step} with everything saved; go on with --resume")

    def _draw(self, spec: recipes.Stage) -> Batch:
        """The rows of the next step, those of all ranks."""
        batch = self.mixture.batch(self.recipe.rows(spec), self.recipe.seq_len(spec))
        self._check_ids(batch)
        return batch

    def _step(self, built: Built, spec: recipes.Stage, computing: Computing, drawn: Batch | None) -> Iterator[Event]:
        counters = self.counters
        waiting = time.perf_counter()
        batch = self._draw(spec) if drawn is None else drawn
        waited = time.perf_counter() - waiting
        self._ready(built, spec)
        given = built.stage, built.student, built.teacher, built.optimizer
        outcome = take(*given, batch, computing, spec.clip_norm, self.stop)
        self._stops = outcome.stop
        if not outcome.finite:
            kept, policy = self.run.path / "non-finite", self.recipe.non_finite
            yield Note(leave_out(outcome, batch, built.student, counters, spec.kind, policy, kept, self.world))
        seconds = self._lap()
        counters.took(batch.labels.numel(), seconds)
        step = Step(
            stage=counters.stage,
            stage_step=counters.stage_step,
            step=counters.step,
            tokens=counters.tokens,
            loss=outcome.loss,
            grad_norm=outcome.grad_norm,
            lr=max(float(group["lr"]) for group in built.optimizer.param_groups),
            tokens_per_second=batch.labels.numel() / seconds,
            seconds=seconds,
            data_seconds=waited,
            metrics=outcome.metrics,
        )
        self._log({"event": "step", **dataclasses.asdict(step), "sources": self.mixture.tokens_by_source()})
        yield from self._track({"loss": step.loss, "grad_norm": step.grad_norm, "lr": step.lr, **step.metrics})
        yield step

    def _ready(self, built: Built, spec: recipes.Stage) -> None:
        """Set what of a step depends on where the run stands: random numbers, rates, mixers' schedules."""
        counters, steps = self.counters, self.recipe.steps(spec)
        random = np.random.SeedSequence([self.recipe.seed, counters.step, self.world.rank])
        torch.manual_seed(int(random.generate_state(1, np.uint64)[0]))
        for _, layer in built.student.swapped_layers():
            layer.mixer.progress = counters.stage_step / steps if built.stage.inside else 1.0
        set_lr(built.optimizer, lr_factor(counters.stage_step, steps, spec))

    def _lap(self) -> float:
        """Seconds since the clock was set, of what is done by now; sets it again."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        before, self._clock = self._clock, time.perf_counter()
        return self._clock - before

    def _validate(self, student: nn.Module) -> Iterator[Event]:
        if self.held_out is None:
            return
        counters = self.counters
        loss = held_out_loss(student, self.held_out, self.device, self.dtype, self.world)
        self._last_loss, self._validated_step = loss, counters.step
        self._log({"event": "validation", "step": counters.step, "loss": loss, "teacher": counters.teacher_loss})
        yield from self._track({"held_out_loss": loss})
        yield Validated(counters.step, loss, counters.teacher_loss)
        self._clock = time.perf_counter()

    def _save(self, built: Built, spec: recipes.Stage) -> Iterator[Event]:
        """Save everything; `best` is the saved step with the lowest held-out loss."""
        counters, loss, run, world = self.counters, self._last_loss, self.run, self.world
        validated = loss is not None and self._validated_step == counters.step
        best = validated and loss < (math.inf if counters.best_loss is None else counters.best_loss)
        if best:
            counters.best_loss, counters.best_step = loss, counters.step
        dtype = getattr(torch, self.recipe.checkpoint.dtype)
        unchanged = world.shared(self._unchanged(built.student) if world.leads else None)
        weights = {**built.student.state_dict(), **masters(built.optimizer)}
        rounded = (
            {} if dtype == torch.float32 else {name: weights[name] for name, _ in built.student.named_parameters()}
        )
        if unchanged is not None:
            rounded = {name: rounded[name] for name in rounded.keys() & mixer_names(built.student)}
        with run.writing(counters.step, world) as folder:
            checkpoint.write(
                folder,
                built.student,
                weights=weights,
                source=run.tokenizer,
                unchanged=unchanged,
                provenance=self._provenance(),
                dtype=dtype,
                world=world,
            )
            data, training = self.mixture.state(), folder / "training"
            state.save(training, counters, built.optimizer, rounded, built.stage.constants, data, self._same, world)
        path = self._checkpoint = run.step_path(counters.step)
        if world.leads:
            run.link("last", path)
            if best:
                run.link("best", path)
            run.prune(self.recipe.checkpoint.keep_last)
        yield Saved(path)
        self._clock = time.perf_counter()

    def _unchanged(self, student: nn.Module) -> Path | None:
        """The converted model, to link its base, while it is there as it was and only mixers have moved since; None
        where shards hold both, as others save them: the base is then written and rounded, and its masters kept.
        """
        converted, stages = self.run.path / "converted", self.recipe.stages[: self.counters.stage + 1]
        if self.origin.parent is None or any(moves_base(student, spec) for spec in stages):
            return None
        return converted if checkpoint.holds(converted, self.origin.parent) and self._linkable else None

    @cached_property
    def _linkable(self) -> bool:
        return checkpoint.keeps_mixers_apart(self.run.path / "converted")

    def _provenance(self) -> dict[str, Any]:
        return {
            "base": self.origin.base,
            "parent": self.origin.parent,
            "recipe": recipes.dumps(self.recipe),
            "seed": checkpoint.read_provenance(self._checkpoint or self.run.path / "converted").get("seed"),
            "step": self.counters.step,
            "tokens": self.counters.tokens,
            "tokens_before": self.origin.tokens,
            "seconds": round(self.counters.seconds, 3),
            "tokens_by_source": self.mixture.tokens_by_source(),
            "data": self.mixture.digests(),
        }

    def _log(self, record: dict[str, Any]) -> None:
        if self.world.leads:
            self.run.log(record)

    def _track(self, figures: dict[str, float]) -> Iterator[Event]:
        """Give the trackers the figures of this step; one that fails is named and heard of no more."""
        for log in list(self.trackers):
            try:
                log(self.counters.step, figures)
            except SupraError as error:
                self.trackers.remove(log)
                yield Note(str(error))
