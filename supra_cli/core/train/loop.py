"""The training loop: stages in order, one optimizer step after the other, everything needed to go on saved as it goes.

Resuming is exact: the state that a checkpoint holds (weights, moments, random state, position in the data, counters) is
all the state there is, so a run that was killed and resumed ends with the same bits as one that was not.
"""

from __future__ import annotations

import dataclasses
import json
import math
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from supra_cli.core import checkpoint, hub
from supra_cli.core import recipe as recipes
from supra_cli.core.data import rows
from supra_cli.core.data.rows import Batch
from supra_cli.core.errors import Stopped, SupraError, UsageError
from supra_cli.core.stages import Loss, Stage, chunked, stages
from supra_cli.core.train import origin, state
from supra_cli.core.train.events import Event, Finished, Note, Saved, StageStarted, Step, Validated
from supra_cli.core.train.optimizer import adamw, lr_factor, set_lr
from supra_cli.core.train.run import RunDirectory, environment
from supra_cli.core.train.state import Counters


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
    stay fp32), by default bf16 on CUDA and fp32 elsewhere. When `stop` is set, the step in progress is finished,
    everything is saved and Stopped is raised. Raises UsageError for an occupied directory or a recipe that changed,
    SupraError for a loss that is not finite.
    """
    run = RunDirectory(output)
    if run.exists() and not (resume or overwrite):
        raise UsageError(
            f"{output} is not empty; go on with --resume, start over with --overwrite, or choose another -o"
        )
    with run.locked():
        if overwrite:
            run.clear()
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
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        self.stop = stop
        self.counters = Counters()
        self._checkpoint: Path | None = None
        self._clock = time.perf_counter()

    def open(self, model: Path | None, resume: bool) -> Iterator[Event]:
        """Bring the run to where it should go on from: its newest sound checkpoint, or the beginning."""
        if resume:
            self._same_recipe()
            yield from self._newest_sound()
        if self._checkpoint is None:
            if resume:
                yield Note(f"no complete checkpoint in {self.run.path}; starting from the beginning")
            self.run.clear()
            (self.run.path / "recipe.toml").write_text(recipes.dumps(self.recipe), encoding="utf-8")
            self.student, self.origin = origin.start(self.recipe, self.run, model)
        (self.run.path / "env.json").write_text(json.dumps(environment(str(self.device)), indent=2), encoding="utf-8")
        self.run.trim_metrics(self.counters.step)
        self.student.to(self.device).train()
        self.tokenizer = checkpoint.load_tokenizer(self.run.tokenizer)
        self._vocabulary_fits()
        self.mixture = rows.training(self.recipe.data, self.tokenizer, self.recipe.seed)
        self.held_out = rows.held_out(self.recipe.data, self.tokenizer)
        if self._checkpoint is not None:
            self.mixture.restore(self._data_state)

    def _same_recipe(self) -> None:
        stored = self.run.path / "recipe.toml"
        if stored.exists() and stored.read_text(encoding="utf-8") != recipes.dumps(self.recipe):
            raise UsageError(
                f"the recipe is not the one that {self.run.path} was started with (see its recipe.toml); "
                "resume with the same recipe and --set, or start a new run"
            )

    def _newest_sound(self) -> Iterator[Event]:
        """Load the newest complete checkpoint; a damaged one is named and the one before is taken."""
        found = self.run.complete()
        for path in reversed(found):
            try:
                checkpoint.verify(path)
                self.counters, self._data_state = state.read(path / "training")
                self.student, self.origin = origin.resume(path)
                state.restore_masters(path / "training", self.student)
            except SupraError as error:
                self.counters = Counters()
                yield Note(f"checkpoint {path.name} is damaged ({error}); falling back to the one before it")
                continue
            self._checkpoint = path
            yield Note(f"resuming from {path.name}")
            return
        if found:
            raise SupraError(f"no checkpoint in {self.run.path} can be read; start over with --overwrite")

    def _vocabulary_fits(self) -> None:
        room = self.student.get_input_embeddings().weight.shape[0]
        if len(self.tokenizer) > room:
            raise SupraError(
                f"the tokenizer in {self.run.tokenizer} has {len(self.tokenizer)} tokens, "
                f"the model room for {room}; they do not belong together"
            )

    def train(self) -> Iterator[Event]:
        self.baseline: nn.Module | None = None
        if self._checkpoint is None:
            yield from self._validate(self._teacher_loss())
        while self.counters.stage < len(self.recipe.stages):
            yield from self._stage(self.recipe.stages[self.counters.stage])
        yield Finished(
            self.run.path / "last",
            self._last_loss,
            self.counters.teacher_loss,
            self.counters.tokens,
            self.counters.seconds,
        )

    _last_loss: float | None = None

    def _stage(self, spec: recipes.Stage) -> Iterator[Event]:
        stage_class = stages.get(spec.kind)
        stage = stage_class(stage_class.Options(**spec.options))
        if spec.untie:
            untie(self.student)
        trained = select(self.student, stage, spec)
        optimizer = adamw(trained, spec)
        if self._checkpoint is not None and self.counters.stage_step:
            state.restore_optimizer(self._checkpoint / "training", optimizer)
            state.restore_random(self._checkpoint / "training")
        self._checkpoint = None
        teacher = self._teacher(spec) if stage.teacher == "separate" else None
        steps = self.recipe.steps(spec)
        parameters = [parameter for _, parameter in trained]
        total = sum(parameter.numel() for parameter in self.student.parameters())
        yield StageStarted(self.counters.stage, spec.kind, steps, sum(p.numel() for p in parameters), total)
        with stage.attached(self.student):
            self._clock = time.perf_counter()
            while self.counters.stage_step < steps:
                set_lr(optimizer, lr_factor(self.counters.stage_step, steps, spec))
                yield self._step(stage, spec, teacher, optimizer, parameters)
                yield from self._between_steps(optimizer, steps, spec)
        self.counters.stage, self.counters.stage_step = self.counters.stage + 1, 0

    def _between_steps(self, optimizer: torch.optim.AdamW, steps: int, spec: recipes.Stage) -> Iterator[Event]:
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

    def _step(
        self,
        stage: Stage,
        spec: recipes.Stage,
        teacher: nn.Module | None,
        optimizer: torch.optim.AdamW,
        parameters: list,
    ) -> Step:
        counters, length = self.counters, self.recipe.seq_len(spec)
        micro_batches = self._micro_batches(self.recipe.rows(spec), self.recipe.micro_rows(spec), length)
        scored = sum(stage.scored(batch) for batch in micro_batches)
        sums: dict[str, Tensor] = {}
        for batch in micro_batches:
            loss = self._forward(stage, teacher, batch.to(self.device))
            (loss.sum / scored).backward()
            for name, value in {"loss": loss.sum.detach(), **loss.metrics}.items():
                sums[name] = sums.get(name, 0) + value
        norm = float(nn.utils.clip_grad_norm_(parameters, spec.clip_norm))
        means = {name: float(value) / scored for name, value in sums.items()}
        if not (math.isfinite(norm) and math.isfinite(means["loss"])):
            raise SupraError(
                f"loss or gradient is not finite in stage {counters.stage} ({spec.kind}), step {counters.step + 1}: "
                f"loss {means['loss']}, gradient norm {norm}; nothing was updated. Lower the learning rate and --resume"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens = self.recipe.rows(spec) * length
        seconds = self._lap()
        counters.stage_step += 1
        counters.step += 1
        counters.tokens += tokens
        counters.seconds += seconds
        step = Step(
            counters.stage,
            counters.stage_step,
            counters.step,
            counters.tokens,
            means.pop("loss"),
            norm,
            max(group["lr"] for group in optimizer.param_groups),
            tokens / seconds,
            seconds,
            means,
        )
        self.run.log({"event": "step", **dataclasses.asdict(step)})
        return step

    def _micro_batches(self, rows_in_step: int, rows_at_once: int, length: int) -> list[Batch]:
        return [
            self.mixture.batch(min(rows_at_once, rows_in_step - start), length)
            for start in range(0, rows_in_step, rows_at_once)
        ]

    def _forward(self, stage: Stage, teacher: nn.Module | None, batch: Batch) -> Loss:
        with self._computing():
            return stage.loss(self.student, teacher, batch)

    def _computing(self):
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def _lap(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        return seconds

    def _teacher(self, spec: recipes.Stage) -> nn.Module:
        name = spec.teacher or self.origin.base
        if name is None:
            raise UsageError(
                f"stage '{spec.kind}' learns from a teacher and this model has no base; name one as 'teacher'"
            )
        folder = hub.fetch(hub.resolve(name))
        teacher = checkpoint.load(folder, device=self.device, dtype=self.dtype).eval().requires_grad_(False)
        if teacher.config.vocab_size != self.student.config.vocab_size:
            raise UsageError(
                f"teacher {name} has a vocabulary of {teacher.config.vocab_size}, "
                f"the student {self.student.config.vocab_size}; logits can only be compared over one vocabulary"
            )
        return teacher

    def _teacher_loss(self) -> float | None:
        """The base's own held-out loss, measured once a run and kept with the counters."""
        if self.origin.base is None or not self.held_out:
            return None
        teacher = checkpoint.load(hub.fetch(hub.resolve(self.origin.base)), device=self.device, dtype=self.dtype)
        self.counters.teacher_loss = self._held_out_loss(teacher.eval())
        return self.counters.teacher_loss

    def _validate(self, teacher_loss: float | None) -> Iterator[Event]:
        if not self.held_out:
            return
        self.student.eval()
        loss = self._held_out_loss(self.student)
        self.student.train()
        counters = self.counters
        if counters.step and (counters.best_loss is None or loss < counters.best_loss):
            counters.best_loss, counters.best_step = loss, counters.step
        self._last_loss = loss
        self.run.log({"event": "validation", "step": counters.step, "loss": loss, "teacher": teacher_loss})
        yield Validated(counters.step, loss, teacher_loss)
        self._clock = time.perf_counter()

    @torch.no_grad()
    def _held_out_loss(self, model: nn.Module) -> float:
        total, targets = 0.0, 0
        for batch in self.held_out:
            batch = batch.to(self.device)
            with self._computing():
                nll, _ = model(
                    input_ids=batch.input_ids,
                    position_ids=batch.position_ids,
                    use_cache=False,
                    objective=lambda hidden, head, labels=batch.labels: chunked.cross_entropy(hidden, head, labels),
                )
            total += float(nll)
            targets += batch.targets
        return total / targets

    def _save(self, optimizer: torch.optim.AdamW) -> Iterator[Event]:
        counters = self.counters
        dtype = getattr(torch, self.recipe.checkpoint.dtype)
        masters = {} if dtype == torch.float32 else dict(self.student.named_parameters())
        with self.run.writing(counters.step) as folder:
            checkpoint.save(self.student, folder, source=self.run.tokenizer, provenance=self._provenance(), dtype=dtype)
            state.save(folder / "training", counters, optimizer, masters, self.mixture.state())
        path = self.run.step_path(counters.step)
        self.run.link("last", path)
        if counters.best_step == counters.step:
            self.run.link("best", path)
        self.run.prune(self.recipe.checkpoint.keep_last)
        yield Saved(path)
        self._clock = time.perf_counter()

    def _provenance(self) -> dict:
        rows_by_source = self.mixture.rows_by_source()
        return {
            "base": self.origin.base,
            "parent": self.origin.parent,
            "recipe": recipes.dumps(self.recipe),
            "step": self.counters.step,
            "tokens": self.counters.tokens,
            "seconds": round(self.counters.seconds, 3),
            "rows_by_source": rows_by_source,
            "data": self.mixture.digests(),
        }


def select(student: nn.Module, stage: Stage, spec: recipes.Stage) -> list[tuple[str, nn.Parameter]]:
    """The parameters that move in this stage, by name; all others are frozen."""
    chosen = []
    for name, parameter in student.named_parameters():
        moves = stage.trains(name) and (spec.train == "all" or ".mixer." in name)
        parameter.requires_grad_(moves)
        if moves:
            chosen.append((name, parameter))
    if not chosen:
        raise UsageError(f"stage '{spec.kind}' has nothing to train: the model has no parameter that it moves")
    return chosen


def untie(student: nn.Module) -> None:
    """Give the output head its own copy of the embedding's weights."""
    head, embedding = student.get_output_embeddings(), student.get_input_embeddings()
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone())
    student.config.tie_word_embeddings = False
