"""The training loop: stages in order, one optimizer step after the other, everything needed to go on saved as it goes.

A stage builds what it trains from the last save, whether that was written a moment ago or by a process that was killed:
weights, moments, position in the data and counters are all the state there is, and the random numbers of a step depend
on the seed, the step and the rank alone. So a run that was killed and resumed ends with the same bits as one that was
not, on as many ranks; on another number of them it takes the same rows in the same order, and sums in another.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import math
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from supra_cli.core import checkpoint, hub
from supra_cli.core import device as devices
from supra_cli.core import recipe as recipes
from supra_cli.core.archs import archs
from supra_cli.core.data import rows
from supra_cli.core.data.packing import Batch
from supra_cli.core.data.tokenizer import check_ids
from supra_cli.core.environment import environment
from supra_cli.core.errors import Stopped, SupraError, UsageError
from supra_cli.core.evaluate import token_nats
from supra_cli.core.files import read_json, write_json
from supra_cli.core.modeling import SupraConfig
from supra_cli.core.parallel import ALONE, World
from supra_cli.core.swap import mixer_names
from supra_cli.core.train import origin, state
from supra_cli.core.train.build import Built, build, check_stages, frozen, moves_base, optimise, stage_of, teacher_of
from supra_cli.core.train.events import Event, Finished, Note, Saved, StageStarted, Step, Validated
from supra_cli.core.train.nonfinite import leave_out
from supra_cli.core.train.optimizer import lr_factor, masters, set_lr
from supra_cli.core.train.run import STOPPED, RunDirectory
from supra_cli.core.train.state import Counters
from supra_cli.core.train.step import Computing, begin, check_dtype, take
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
    world: World = ALONE,
) -> Iterator[Event]:
    """Run `recipe` into the directory `output`, yielding what happens; every rank of `world` calls it alike.

    `model` starts from a converted model instead of converting the base; `dtype` is what the passes compute in (weights
    stay fp32), by default what the run began with, and for a new one bf16 on CUDA and fp32 elsewhere. When `stop` is
    set on any rank, the step in progress is finished, everything is saved and Stopped is raised. Processes that
    torchrun started again go on with what they had begun. Raises UsageError for an occupied directory or a recipe,
    model or dtype that changed, SupraError for a loss that is not finite.
    """
    run = RunDirectory(output)
    again = world.restarts > 0 and world.shared(run.is_of(world.launch))
    if again:
        resume, overwrite = True, False
    if world.leads:
        run.check_free(replace=resume or overwrite)
    with run.locked() if world.leads else nullcontext():
        run.honour_stop(world, again)
        trainer = Trainer(recipe, run, device, dtype, stop or threading.Event(), world)
        yield from trainer.open(model, resume)
        if trainer.counters.finished:
            yield Note(f"{output} is already finished; nothing to do")
            return
        yield from trainer.train()


class Trainer:
    """One run: where it stands, its data, and what it writes."""

    def __init__(
        self,
        recipe: recipes.Recipe,
        run: RunDirectory,
        device: str,
        dtype: torch.dtype | None,
        stop: threading.Event,
        world: World,
    ):
        self.recipe = recipe
        self.run = run
        self.device = torch.device(device)
        self.dtype = None if dtype is None else check_dtype(dtype)
        self.stop = stop
        self.world = world
        self.counters = Counters()
        self._same: dict[str, Any] = {}
        self._checkpoint: Path | None = None
        """The save that the next stage builds from; None before the first."""
        self._last_loss: float | None = None
        self._validated_step: int | None = None
        self._stops = False
        """Whether the step just taken is to be the last, on whichever rank that was asked."""
        self._clock = time.perf_counter()

    # -- the beginning -------------------------------------------------------------------------------------------------

    def open(self, model: Path | None, resume: bool) -> Iterator[Event]:
        """Bring the run to where it should go on from: its newest sound checkpoint, or the beginning.

        Whatever can fail is tried before anything is written or cleared.
        """
        if resume:
            if self.world.leads:
                self._same_recipe()
            yield from self._newest_sound()
        if self.counters.finished:
            return
        if self._checkpoint is not None:
            yield from self._go_on(model)
            return
        if resume:
            yield Note(f"no complete checkpoint in {self.run.path}; starting from the beginning")
        self._begin(model)

    def _go_on(self, model: Path | None) -> Iterator[Event]:
        leads, world = self.world.leads, self.world
        self.dtype = self.dtype or getattr(torch, self._same["dtype"])
        config, known = checkpoint.read_config(self._checkpoint), checkpoint.read_provenance(self._checkpoint)
        began, models = origin.Origin(known.get("base"), known.get("parent")), self._same["models"]
        found = origin.same_models(self.recipe, began, models, self.counters.stage) if leads else None
        self.origin = world.shared(found)
        self._ready(checkpoint.load_tokenizer(self.run.tokenizer), config, self.origin.base)
        self.mixture.restore(self._data_state)
        self._same_sums()
        if leads:
            origin.same_start(self.run, self.origin, model)
            yield from self._same_machine()
            self.run.trim_metrics(self.counters.step)
            write_json(self.run.path / "env.json", self._conditions())

    def _begin(self, model: Path | None) -> None:
        world, recipe = self.world, self.recipe
        self.dtype = self.dtype or devices.dtype("auto", str(self.device))
        if recipe.base is None and model is None:  # a tokenizer is trained, which one rank does for all
            start = world.shared(origin.look(recipe, self.run, model) if world.leads else None)
        else:
            with world.first():
                start = origin.look(recipe, self.run, model)
        self._ready(start.tokenizer, start.config, start.base)
        if start.base is not None and self.held_out is not None:
            teacher = frozen(hub.open(start.base), world, self.device, self.dtype)
            self.counters.teacher_loss = self._held_out_loss(teacher)
            del teacher
            gc.collect()
        began = None
        if world.leads:
            with self.run.starting() as beside:
                write_json(beside.path / "env.json", self._conditions())
                (beside.path / "recipe.toml").write_text(recipes.dumps(recipe), encoding="utf-8")
                found = origin.begin(start, recipe, beside, model)
            models = origin.identities(recipe, start.base)
            weights = {role: identity for role, (_, identity) in models.items()}
            began = found, {"dtype": _word(self.dtype), "held_out": _digest(self.held_out), "models": weights}
        self.origin, self._same = world.shared(began)

    def _conditions(self) -> dict[str, Any]:
        return environment(str(self.device)) | {"ranks": self.world.size, "launch": self.world.launch}

    def _ready(self, tokenizer: PreTrainedTokenizerBase, config: SupraConfig, base: str | None) -> None:
        """Open the data, and raise whatever else would end the run later than it could be known."""
        recipe = self.recipe
        with self.world.first():
            check_stages(recipe.stages[self.counters.stage :], config, tokenizer, base, self.world)
        longest, limit = max(map(recipe.seq_len, recipe.stages)), archs.get(config.swap.base).limit(config)
        if limit is not None and longest > limit:
            raise UsageError(f"seq_len is {longest} and the base has learned {limit} positions; lower data.seq_len")
        self.mixture = rows.training(recipe.data, tokenizer, recipe.seed, longest, self.world)
        held_out = rows.held_out(recipe.data, tokenizer) if self.world.leads else None
        self.held_out: Batch | None = self.world.shared(held_out)
        # Only here can a token that was added without an embedding be met: on a GPU it would end the process.
        self._check_ids = partial(_check_ids, tokenizer, config)
        if self.held_out is not None:
            self._check_ids(self.held_out)
            if base is not None and self._checkpoint is None:
                hub.open(base)
        for name in recipe.track:
            library(name)
        track = recipe.track if self.world.leads else ()
        self.trackers = open_trackers(track, self.run.path, recipe.model_dump(mode="json"))

    def _newest_sound(self) -> Iterator[Event]:
        """Find the newest complete checkpoint; a damaged one is named and the one before is taken."""
        complete = self.world.shared(self.run.complete())
        for path in reversed(complete):
            fault = None
            try:
                if self.world.leads:
                    checkpoint.verify(path)
                self.counters, self._data_state, self._same = state.read(path / "training", self.world)
            except state.OlderState:
                raise  # sound, so nothing to fall back from
            except (SupraError, OSError) as error:
                fault = str(error)
            fault = next(filter(None, self.world.gathered(fault)), None)
            if fault is None:
                self._checkpoint = path
                if self.world.leads:  # a kill may have come between a save and its links
                    best = self.counters.best_step
                    self.run.link("last", path)
                    if best is not None and self.run.step_path(best).exists():
                        self.run.link("best", self.run.step_path(best))
                yield Note(f"resuming from {path.name}")
                return
            self.counters = Counters()
            yield Note(f"checkpoint {path.name} is damaged ({fault}); falling back to the one before it")
        if complete:
            raise SupraError(f"no checkpoint in {self.run.path} can be read; start over with --overwrite")

    def _same_recipe(self) -> None:
        stored, now = self.run.path / "recipe.toml", self.recipe.trajectory()
        before = recipes.load(stored).trajectory() if stored.exists() else now
        if changed := [key for key in now if before[key] != now[key]]:
            raise UsageError(
                f"the recipe is not the one that {self.run.path} was started with: it differs in {', '.join(changed)} "
                "(see the run's recipe.toml); resume with the same recipe and --set, or start a new run"
            )

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
        """Say where versions, processors, ranks or threads are not the run's so far: then its last bits may differ."""
        with suppress(SupraError, OSError):
            before, now = read_json(self.run.path / "env.json"), self._conditions()
            differing = (key for key in now if before.get(key, now[key]) != now[key])
            keys = [key for key in differing if key not in ("command", "cpus", "launch")]
            if keys:
                changed = ", ".join(f"{key} {before[key]} → {now[key]}" for key in keys)
                yield Note(f"going on under other conditions ({changed}): the last bits need not be those of one run")

    # -- a stage, a step, a save ---------------------------------------------------------------------------------------

    def train(self) -> Iterator[Event]:
        counters = self.counters
        for spec in self.recipe.stages[counters.stage :]:
            if counters.stage_step < self.recipe.steps(spec):
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
        counters, recipe = self.counters, self.recipe
        waiting = time.perf_counter()
        batch = self._draw(spec) if drawn is None else drawn
        waited = time.perf_counter() - waiting
        random = np.random.SeedSequence([recipe.seed, counters.step, self.world.rank])
        torch.manual_seed(int(random.generate_state(1, np.uint64)[0]))
        for _, layer in built.student.swapped_layers():
            if hasattr(layer.mixer, "progress"):
                layer.mixer.progress = counters.stage_step / recipe.steps(spec) if built.stage.inside else 1.0
        rate = lr_factor(counters.stage_step, recipe.steps(spec), spec)
        set_lr(built.optimizer, rate)
        outcome = take(
            built.stage,
            built.student,
            built.teacher,
            built.optimizer,
            batch,
            computing,
            spec.clip_norm,
            self.stop,
        )
        self._stops = outcome.stop
        if not outcome.finite:
            kept, policy = self.run.path / "non-finite", recipe.non_finite
            yield Note(leave_out(outcome, batch, built.student, counters, spec.kind, policy, kept, self.world))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        tokens = batch.labels.numel()
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
            lr=max(float(group["lr"]) for group in built.optimizer.param_groups),
            tokens_per_second=tokens / seconds,
            seconds=seconds,
            data_seconds=waited,
            metrics=outcome.metrics,
        )
        self._log({"event": "step", **dataclasses.asdict(step), "sources": self.mixture.tokens_by_source()})
        yield from self._track({"loss": step.loss, "grad_norm": step.grad_norm, "lr": step.lr, **step.metrics})
        yield step

    def _validate(self, student: nn.Module) -> Iterator[Event]:
        if self.held_out is None:
            return
        counters, loss = self.counters, self._held_out_loss(student)
        self._last_loss, self._validated_step = loss, counters.step
        self._log({"event": "validation", "step": counters.step, "loss": loss, "teacher": counters.teacher_loss})
        yield from self._track({"held_out_loss": loss})
        yield Validated(counters.step, loss, counters.teacher_loss)
        self._clock = time.perf_counter()

    def _held_out_loss(self, model: nn.Module) -> float:
        """Nats per held-out token; each rank scores its share of the rows."""
        count, world = len(self.held_out.labels), self.world
        computing = Computing(self.device, self.dtype, count, world)
        (rows,) = computing.own(self.held_out)
        with computing.autocast():
            nats = token_nats(model, *rows, device=self.device, numbers=range(world.rank, count, world.size))
        known = nats[~nats.isnan()].double()
        total, count = world.total(torch.stack([known.sum(), torch.tensor(known.numel(), dtype=known.dtype)]))
        return float(total / count)

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
        """The converted model, as long as it is there as it was and only mixers have moved since."""
        converted, stages = self.run.path / "converted", self.recipe.stages[: self.counters.stage + 1]
        if self.origin.parent is None or any(moves_base(student, spec) for spec in stages):
            return None
        return converted if checkpoint.holds(converted, self.origin.parent) else None

    def _provenance(self) -> dict[str, Any]:
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


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _digest(batch: Batch | None) -> str | None:
    """Of what held-out rows say, wherever their text lies."""
    return None if batch is None else hashlib.sha256(b"".join(rows.numpy().tobytes() for rows in batch)).hexdigest()


def _check_ids(tokenizer: PreTrainedTokenizerBase, config: SupraConfig, batch: Batch) -> None:
    """SupraError where the text holds a token that the model has no embedding for."""
    check_ids((int(batch.input_ids.max()),), tokenizer, config)
