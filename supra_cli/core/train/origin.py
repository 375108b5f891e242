"""The student and the tokenizer that a run starts from, or goes on with."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from supra_cli.core import checkpoint, device, hub
from supra_cli.core.checkpoint.writing import companions
from supra_cli.core.data import sources
from supra_cli.core.data import tokenizer as bpe
from supra_cli.core.errors import NotFoundError, ResourceError, UsageError
from supra_cli.core.modeling import SupraConfig, SupraForCausalLM
from supra_cli.core.recipe import Recipe, dumps
from supra_cli.core.train.build import stage_of
from supra_cli.core.train.run import RunDirectory


@dataclass(frozen=True)
class Origin:
    """Where the student comes from; recorded in every checkpoint."""

    base: str | None
    """The pretrained model behind it, which is also its teacher; None for a model from scratch."""
    parent: str | None
    """Hash of the weights it started from, where supra wrote them."""
    tokens: int = 0
    """That it had been trained on before this run."""


@dataclass(frozen=True)
class Start:
    """What a new run begins with: read and checked, while nothing is written or cleared yet."""

    config: SupraConfig
    """Of the student."""
    tokenizer: PreTrainedTokenizerBase
    beside: dict[str, bytes]
    """Name → content of the files that belong beside every checkpoint's weights."""
    weights: Path | None
    """The model to convert, or the converted one; None for weights drawn afresh."""
    base: str | None
    """As in `Origin`."""


def look(recipe: Recipe, run: RunDirectory, model: Path | None) -> Start:
    """What the run will begin with: a converted model, a base to convert, or a shape.

    Raises what is wrong with it, and UsageError when it lies in the run that is cleared for it.
    """
    _apart(run, (stage.teacher for stage in recipe.stages))
    if model is None and recipe.base is None:
        return _own_shape(recipe)
    source = hub.resolve(recipe.base) if model is None else None
    folder = hub.fetch(source) if model is None else model
    config = checkpoint.read_config(folder) if model is None else student_of(folder, recipe)
    _apart(run, [str(folder), checkpoint.read_provenance(folder).get("base")])
    if model is not None:
        weights, base = folder, checkpoint.read_provenance(folder).get("base")
    elif recipe.init == "scratch":
        config, weights, base = _swapped(config, recipe), None, None
        _has_room(config)
    else:
        config = checkpoint.planned(folder, mixer=recipe.mixer.name, options=recipe.mixer.options, keep=recipe.keep)
        weights, base = folder, hub.lasting_name(source, folder)
    return Start(config, checkpoint.load_tokenizer(folder), _beside(folder), weights, base)


def student_of(model: Path, recipe: Recipe) -> SupraConfig:
    """The config of a student that is given in place of the base; NotFoundError where there is none, UsageError for one
    that is not the recipe's.
    """
    _is_there(model)
    config = checkpoint.read_config(model)
    checkpoint.check(config, model)
    _same_swap(model, config, _swapped(config, recipe))
    return config


def _is_there(model: Path) -> None:
    if not model.is_dir():
        raise NotFoundError(
            f"--model {model} is no directory here, expected a student that `supra convert` has written: write one by "
            "`supra convert MODEL -o STUDENT`, or leave --model out to have the recipe's base converted"
        )


def _apart(run: RunDirectory, needed: Iterable[str | None]) -> None:
    """UsageError when a model that the run needs lies in the run's own directory."""
    for name in needed:
        if name and Path(name).exists() and Path(name).resolve().is_relative_to(run.path.resolve()):
            raise UsageError(f"{name} lies in {run.path}, which a new run clears; choose another --output")


def begin(start: Start, recipe: Recipe, run: RunDirectory, model: Path | None) -> Origin:
    """Put the student before its first step into the run's `converted`, and what belongs beside its weights into its
    `tokenizer`.
    """
    run.tokenizer.mkdir()
    for name, content in start.beside.items():
        (run.tokenizer / name).write_bytes(content)
    converted = run.path / "converted"
    if start.weights is None:
        torch.manual_seed(recipe.seed)
        student = SupraForCausalLM._from_config(start.config, dtype=torch.float32)
        for _, layer in student.swapped_layers():
            layer.mixer.reset_parameters()
        checkpoint.save(student, converted, source=run.tokenizer, provenance={"recipe": dumps(recipe), "tokens": 0})
        return Origin(None, None)
    if model is not None:
        converted.symlink_to(model.resolve(), target_is_directory=True)
    else:
        checkpoint.convert(
            start.weights,
            converted,
            mixer=recipe.mixer.name,
            options=recipe.mixer.options,
            keep=recipe.keep,
            seed=recipe.seed,
            base=start.base,
        )
    known = checkpoint.read_provenance(converted)
    seen = sum(known.get(key) or 0 for key in ("tokens", "tokens_before"))
    return Origin(start.base, checkpoint.identity(converted), seen)


def identities(recipe: Recipe, base: str | None, stage: int = 0) -> dict[str, tuple[str, str]]:
    """Role → (name, hash of its weights) of the models that the run stands on from `stage` on: `base`, what the recipe
    calls so, where it lies in a directory here; `stages.N.teacher`; and `origin`, the student's own base.
    """
    learning = {n: spec for n, spec in enumerate(recipe.stages) if stage_of(spec).teacher == "separate" and n >= stage}
    names = {f"stages.{n}.teacher": spec.teacher for n, spec in learning.items() if spec.teacher}
    if recipe.init == "pretrained" and _lies_here(recipe.base):
        names["base"] = recipe.base
    if base is not None and (_lies_here(base) or any(spec.teacher is None for spec in learning.values())):
        names["origin"] = base
    folders = {role: hub.open(name).resolve() for role, name in names.items()}
    hashes = {folder: checkpoint.identity(folder) for folder in set(folders.values())}
    return {role: (name, hashes[folders[role]]) for role, name in names.items()}


def same_models(recipe: Recipe, origin: Origin, known: Mapping[str, str], stage: int) -> Origin:
    """`origin`, with its base under the name that it has now, for a run that goes on in `stage`.

    Models are compared by `known`, the hashes of their weights by role when the run began, so they may have been moved.
    UsageError for one that has other weights, NotFoundError for one that is needed and gone.
    """
    moved = origin.base is not None and Path(origin.base).is_absolute() and not Path(origin.base).exists()
    if moved and _lies_here(recipe.base) and "base" in known and known["base"] == known.get("origin"):
        origin = replace(origin, base=str(Path(recipe.base).resolve()))
    for role, (name, weights) in identities(recipe, origin.base, stage).items():
        if known.get(role, weights) != weights:
            raise UsageError(
                f"{name} ({role}) has other weights than when this run began; "
                "resume with the model that was there, or start a new run"
            )
    return origin


def same_start(run: RunDirectory, origin: Origin, model: Path | None) -> None:
    """UsageError when `model`, given to a run that goes on, is not the one that it began with; the run's link to it is
    made anew, as it may have been moved.
    """
    if model is None:
        return
    _is_there(model)
    if checkpoint.identity(model) != origin.parent:
        raise UsageError(f"{model} is not the converted model that this run began with; resume without --model")
    converted = run.path / "converted"
    if converted.is_symlink():
        converted.unlink()
        converted.symlink_to(model.resolve(), target_is_directory=True)


def _lies_here(name: str | None) -> bool:
    return name is not None and Path(name).is_absolute() and Path(name).is_dir()


def tokenizer_of(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The base's tokenizer; for a shape without a base, one trained on the training text now."""
    if recipe.base is None:
        return _own_shape(recipe).tokenizer
    return checkpoint.load_tokenizer(hub.without_weights(hub.resolve(recipe.base)))


def _own_shape(recipe: Recipe) -> Start:
    """The recipe's [model], with a tokenizer trained now and read back as every later resume will read it."""
    _has_room(checkpoint.own_shape({"vocab_size": recipe.tokenizer.vocab_size, **recipe.model}))
    words = bpe.train(sources.all_texts(recipe.data), recipe.tokenizer.vocab_size)
    ends = {key: getattr(words, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    shape = checkpoint.own_shape({"vocab_size": len(words), **recipe.model}, **ends)
    with tempfile.TemporaryDirectory() as folder:
        words.save_pretrained(folder)
        shape.plain().save_pretrained(folder)
        tokenizer, beside = checkpoint.load_tokenizer(folder), _beside(Path(folder))
    return Start(_swapped(shape, recipe), tokenizer, beside, None, None)


def _has_room(shape: SupraConfig) -> None:
    """ResourceError if this machine cannot hold the weights of a model that starts from scratch."""
    needed = 4 * sum(parameter.numel() for parameter in checkpoint.skeleton(shape).parameters())
    if (room := device.memory_bytes()) is not None and needed > room:
        raise ResourceError(
            f"a model from scratch of this shape has {needed / 2**30:,.0f} GiB of weights in fp32, more than the "
            f"{room / 2**30:,.0f} GiB of memory in this machine; describe a smaller one"
        )


def _swapped(config: SupraConfig, recipe: Recipe) -> SupraConfig:
    """`config` with the recipe's mixer in the layers that the recipe does not keep."""
    return config.with_mixer(recipe.mixer.name, recipe.mixer.options, recipe.keep)


def _same_swap(folder: Path, config: SupraConfig, wanted: SupraConfig) -> None:
    has, asked = config.swap, wanted.swap
    if asked.any and not has.any:
        raise UsageError(
            f"{folder} is not converted, and the recipe asks for {_summary(asked.layers)}; write a student by "
            f"`supra convert {folder} -o STUDENT` and give that, or leave --model out to have the base converted"
        )
    if has.layers != asked.layers or (has.any and has.options != asked.options):
        raise UsageError(
            f"{folder} has {_summary(has.layers)} with {has.options}, the recipe asks for "
            f"{_summary(asked.layers)} with {asked.options}; convert again or change the recipe's mixer and keep"
        )


def _beside(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ["config.json", *companions(folder)]}


def _summary(kinds) -> str:
    """Layer kinds in short: `supra ×6`, or `supra ×4, softmax ×2 (3, 5)`."""
    parts = []
    for kind in sorted(set(kinds)):
        where = [str(index) for index, other in enumerate(kinds) if other == kind]
        parts.append(f"{kind} ×{len(where)}" + (f" ({', '.join(where)})" if len(where) < len(kinds) else ""))
    return ", ".join(parts)
