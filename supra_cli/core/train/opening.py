"""Where a run goes on from: the beginning, or its newest sound checkpoint.

Whatever can fail is tried before anything is written or cleared.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from supra_cli.core import checkpoint, hub
from supra_cli.core import device as devices
from supra_cli.core import recipe as recipes
from supra_cli.core.data import rows
from supra_cli.core.data.packing import Batch
from supra_cli.core.data.tokenizer import check_ids
from supra_cli.core.environment import environment
from supra_cli.core.errors import SupraError, UsageError
from supra_cli.core.files import read_json, write_json
from supra_cli.core.modeling import SupraConfig
from supra_cli.core.parallel import World
from supra_cli.core.train import origin, state
from supra_cli.core.train.build import check_stages, frozen
from supra_cli.core.train.events import Event, Note
from supra_cli.core.train.held_out import held_out_loss
from supra_cli.core.train.run import RunDirectory
from supra_cli.core.train.state import Counters
from supra_cli.core.train.trackers import Log, library, open_trackers


class Material(NamedTuple):
    """What a run learns from and what judges it, and where its figures go besides metrics.jsonl."""

    mixture: rows.Mixture
    held_out: Batch | None
    check_ids: Callable[[Batch], None]
    """Raises SupraError for a token that the model has no embedding for."""
    trackers: list[Log]


@dataclass(frozen=True)
class Standing:
    """Where a run stands, and what it goes on with."""

    counters: Counters
    origin: origin.Origin
    dtype: torch.dtype
    """What the passes compute in."""
    same: dict[str, Any]
    """What a process that goes on from a save must share with the one that began: dtype, held-out rows, models."""
    material: Material
    checkpoint: Path | None = None
    """The save that the next stage builds from; None before the first."""


class _Save(NamedTuple):
    path: Path
    counters: Counters
    data: dict[str, Any]
    same: dict[str, Any]


class Opening:
    """Of one run, by each rank of a world alike."""

    def __init__(self, recipe: recipes.Recipe, run: RunDirectory, device: torch.device, world: World):
        self.recipe = recipe
        self.run = run
        self.device = device
        self.world = world

    def begin(self, model: Path | None, dtype: torch.dtype | None) -> Standing:
        """A new run, in `dtype` or what suits the device, from a converted `model` or what the recipe names."""
        world, recipe = self.world, self.recipe
        dtype, counters, commits = dtype or devices.dtype("auto", str(self.device)), Counters(), {}
        if recipe.base is None and model is None:  # a tokenizer is trained, which one rank does for all
            start = world.shared(origin.look(recipe, self.run, model) if world.leads else None)
        else:
            with world.first():
                start = origin.look(recipe, self.run, model)
        material = self._material(start.tokenizer, start.config, start.base, counters, commits)
        if start.base is not None and material.held_out is not None:
            teacher = frozen(hub.open(start.base), world, self.device, dtype)
            counters.teacher_loss = held_out_loss(teacher, material.held_out, self.device, dtype, world)
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
            text = {"held_out": _digest(material.held_out), "held_out_commits": commits}
            began = found, {"dtype": _word(dtype), **text, "models": weights}
        found, same = world.shared(began)
        return Standing(counters, found, dtype, same, material)

    def go_on(self, model: Path | None, dtype: torch.dtype | None) -> Generator[Event, None, Standing | None]:
        """The run that is here, from its newest sound save or the beginning; None where it is finished.

        UsageError where recipe, `model`, `dtype`, held-out text or the models that it stands on are not what they were.
        """
        if self.world.leads:
            self._same_recipe()
        save = yield from self._newest_sound()
        if save is None:
            yield Note(f"no complete checkpoint in {self.run.path}; starting from the beginning")
            return self.begin(model, dtype)
        path, counters, data, same = save
        if counters.finished:
            return None
        if counters.stage_step == self.recipe.steps(self.recipe.stages[counters.stage]):
            counters.stage, counters.stage_step = counters.stage + 1, 0  # nothing of a stage that is over is needed
        leads, world = self.world.leads, self.world
        dtype = dtype or getattr(torch, same["dtype"])
        config, known = checkpoint.read_config(path), checkpoint.read_provenance(path)
        began = origin.Origin(known.get("base"), known.get("parent"), known.get("tokens_before") or 0)
        found = world.shared(origin.same_models(self.recipe, began, same["models"], counters.stage) if leads else None)
        tokenizer = checkpoint.load_tokenizer(self.run.tokenizer)
        commits = same.setdefault("held_out_commits", {})  # which an older supra did not save
        material = self._material(tokenizer, config, found.base, counters, commits)
        material.mixture.restore(data)
        _same_sums(same, dtype, material.held_out)
        if leads:
            origin.same_start(self.run, found, model)
            yield from self._same_machine()
            self.run.trim_metrics(counters.step)
            write_json(self.run.path / "env.json", self._conditions())
        return Standing(counters, found, dtype, same, material, path)

    def _material(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: SupraConfig,
        base: str | None,
        counters: Counters,
        commits: dict[str, str],
    ) -> Material:
        """Open the data, held-out text at its `commits` or into them, and raise whatever else would end the run later
        than it could be known.
        """
        recipe = self.recipe
        with self.world.first():
            check_stages(recipe.stages[counters.stage :], config, tokenizer, base, self.world)
        longest, limit, switch = max(map(recipe.seq_len, recipe.stages)), config.limit(), config.switch()
        if limit is not None and longest > limit:
            raise UsageError(f"seq_len is {longest} and the base has {limit} positions; lower data.seq_len")
        if switch is not None and longest > switch and recipe.data.documents != "joined":
            raise UsageError(
                f"seq_len is {longest} and the base's positions are others in texts of more than {switch} tokens, of "
                "which documents in one row can be on both sides; lower data.seq_len, or set data.documents = 'joined'"
            )
        mixture = rows.training(recipe.data, tokenizer, recipe.seed, longest, self.world)
        held_out = rows.held_out(recipe.data, tokenizer, commits) if self.world.leads else None
        held_out = self.world.shared(held_out)
        # Only here can a token that was added without an embedding be met: on a GPU it would end the process.
        known = partial(_check_ids, tokenizer, config)
        if held_out is not None:
            known(held_out)
            if base is not None and not counters.step:
                with self.world.first():
                    hub.open(base)
        for name in recipe.track:
            library(name)
        track = recipe.track if self.world.leads else ()
        return Material(mixture, held_out, known, open_trackers(track, self.run.path, recipe.model_dump(mode="json")))

    def _newest_sound(self) -> Generator[Event, None, _Save | None]:
        """The newest complete checkpoint; a damaged one is named and the one before is taken."""
        complete = self.world.shared(self.run.complete())
        self._in_sight(complete)
        for path in reversed(complete):
            save, fault = None, None
            try:
                if self.world.leads:
                    checkpoint.verify(path)
                save = _Save(path, *state.read(path / "training", self.world))
            except state.OlderState:
                raise  # sound, so nothing to fall back from
            except (SupraError, OSError) as error:
                fault = str(error)
            fault = next(filter(None, self.world.gathered(fault)), None)
            if fault is None:
                if self.world.leads:  # a kill may have come between a save and its links
                    best = save.counters.best_step
                    self.run.link("last", path)
                    if best is not None and self.run.step_path(best).exists():
                        self.run.link("best", self.run.step_path(best))
                yield Note(f"resuming from {path.name}")
                return save
            yield Note(f"checkpoint {path.name} is damaged ({fault}); falling back to the one before it")
        if complete:
            raise SupraError(f"no checkpoint in {self.run.path} can be read; start over with --overwrite")
        return None

    def _in_sight(self, saves: list[Path]) -> None:
        """SupraError where a rank does not see the saves that rank 0 sees: not one of them is damaged by that."""
        seen = self.world.gathered(all(path.is_dir() for path in saves))
        if not all(seen):
            raise SupraError(
                f"rank {seen.index(False)} does not see {self.run.path} as rank 0 does; see to its disk, which all "
                "machines are to share, and resume"
            )

    def _same_recipe(self) -> None:
        stored, now = self.run.path / "recipe.toml", self.recipe.trajectory()
        before = recipes.load(stored).trajectory() if stored.exists() else now
        if changed := [key for key in now if before[key] != now[key]]:
            raise UsageError(
                f"the recipe is not the one that {self.run.path} was started with: it differs in {', '.join(changed)} "
                "(see the run's recipe.toml); resume with the same recipe and --set, or start a new run"
            )

    def _conditions(self) -> dict[str, Any]:
        return environment(str(self.device)) | {"ranks": self.world.size, "launch": self.world.launch}

    def _same_machine(self) -> Iterator[Event]:
        """Say where versions, processors, ranks or threads are not the run's so far: then its last bits may differ."""
        with suppress(SupraError, OSError):
            before, now = read_json(self.run.path / "env.json"), self._conditions()
            differing = (key for key in now if before.get(key, now[key]) != now[key])
            keys = [key for key in differing if key not in ("command", "cpus", "launch")]
            if keys:
                changed = ", ".join(f"{key} {before[key]} → {now[key]}" for key in keys)
                yield Note(f"going on under other conditions ({changed}): the last bits need not be those of one run")


def _same_sums(same: dict[str, Any], dtype: torch.dtype, held_out: Batch | None) -> None:
    """UsageError where the losses so far and those to come would not be of one computation or one text."""
    if same["dtype"] != _word(dtype):
        raise UsageError(
            f"this run computes in {same['dtype']}, got {_word(dtype)}; "
            f"resume with --dtype {same['dtype']}, or start a new run"
        )
    if same["held_out"] != _digest(held_out):
        raise UsageError(
            "the held-out text changed since the run began, so its losses could not be compared; "
            "put back the same data.validation, or start a new run"
        )


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _digest(batch: Batch | None) -> str | None:
    """Of what held-out rows say, wherever their text lies."""
    return None if batch is None else hashlib.sha256(b"".join(rows.numpy().tobytes() for rows in batch)).hexdigest()


def _check_ids(tokenizer: PreTrainedTokenizerBase, config: SupraConfig, batch: Batch) -> None:
    """SupraError where the text holds a token that the model has no embedding for."""
    check_ids((int(batch.input_ids.max()),), tokenizer, config)
