"""The student and the tokenizer that a run starts from, or goes on with."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig

from supra_cli.core import checkpoint, hub
from supra_cli.core.checkpoint.writing import companions
from supra_cli.core.data import sources
from supra_cli.core.data import tokenizer as bpe
from supra_cli.core.errors import UsageError
from supra_cli.core.modeling import SupraConfig, SupraForCausalLM
from supra_cli.core.recipe import Recipe
from supra_cli.core.swap import layer_kinds
from supra_cli.core.train.run import RunDirectory


@dataclass(frozen=True)
class Origin:
    """Where the student comes from; recorded in every checkpoint."""

    base: str | None
    """The pretrained model behind it, which is also its teacher; None for a model from scratch."""
    parent: str | None
    """Hash of the weights it started from, where supra wrote them."""


def check(recipe: Recipe, run: RunDirectory, model: Path | None) -> None:
    """Fetch the model to start from, so that one that is not there does not cost the run that is cleared for it.

    UsageError when it lies in that run.
    """
    if model is None and recipe.base is None:
        return
    folder = model if model is not None else hub.fetch(hub.resolve(recipe.base))
    checkpoint.read_config(folder)
    if folder.resolve().is_relative_to(run.path.resolve()):
        raise UsageError(f"{folder} lies in {run.path}, which a new run clears; choose another --output")


def start(recipe: Recipe, run: RunDirectory, model: Path | None) -> tuple[SupraForCausalLM, Origin]:
    """The fp32 student before its first step: a converted model, a base converted now, or fresh weights.

    The tokenizer and what else belongs beside the weights is put into the run's `tokenizer` folder.
    """
    torch.manual_seed(recipe.seed)
    if model is not None:
        (run.path / "converted").symlink_to(model.resolve(), target_is_directory=True)
        return _from_directory(recipe, run, model)
    if recipe.init == "scratch":
        return _from_scratch(recipe, run)
    source = hub.resolve(recipe.base)
    base = hub.fetch(source)
    folder = checkpoint.convert(
        base,
        run.path / "converted",
        mixer=recipe.mixer.name,
        options=recipe.mixer.options,
        keep=recipe.keep,
        seed=recipe.seed,
        base=hub.lasting_name(source, base),
        overwrite=True,
    )
    return _from_directory(recipe, run, folder)


def resume(folder: Path) -> tuple[SupraForCausalLM, Origin]:
    """The student as it was saved in the checkpoint `folder`."""
    known = checkpoint.read_provenance(folder)
    return checkpoint.load(folder, dtype=torch.float32), Origin(known.get("base"), known.get("parent"))


def _from_directory(recipe: Recipe, run: RunDirectory, folder: Path) -> tuple[SupraForCausalLM, Origin]:
    student = checkpoint.load(folder, dtype=torch.float32)
    record = student.supra
    wanted = SupraConfig.from_base(
        student.config,
        mixer=recipe.mixer.name,
        options=recipe.mixer.options,
        layers=layer_kinds(len(record.layers), recipe.mixer.name, recipe.keep),
    ).swap
    if record.layers != wanted.layers or (record.any and record.options != wanted.options):
        raise UsageError(
            f"{folder} has {_summary(record.layers)} with {record.options}, the recipe asks for "
            f"{_summary(wanted.layers)} with {wanted.options}; convert again or change the recipe's mixer and keep"
        )
    _bring_companions(folder, run)
    return student, Origin(checkpoint.read_provenance(folder).get("base"), checkpoint.fingerprint(folder))


def _from_scratch(recipe: Recipe, run: RunDirectory) -> tuple[SupraForCausalLM, Origin]:
    if recipe.base is not None:
        folder = hub.fetch(hub.resolve(recipe.base))
        base_config = AutoConfig.from_pretrained(folder)
        _bring_companions(folder, run)
    else:
        words = bpe.train(sources.all_texts(recipe.data), recipe.tokenizer.vocab_size)
        words.save_pretrained(run.tokenizer)
        base_config = AutoConfig.for_model(
            **{"vocab_size": len(words), **recipe.model},
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
        base_config.save_pretrained(run.tokenizer)
    kinds = layer_kinds(base_config.num_hidden_layers, recipe.mixer.name, recipe.keep)
    config = SupraConfig.from_base(base_config, mixer=recipe.mixer.name, options=recipe.mixer.options, layers=kinds)
    student = SupraForCausalLM._from_config(config, dtype=torch.float32)
    for _, layer in student.swapped_layers():
        layer.mixer.reset_parameters()
    return student, Origin(None, None)


def _bring_companions(folder: Path, run: RunDirectory) -> None:
    run.tokenizer.mkdir(exist_ok=True)
    for name in ["config.json", *companions(folder)]:
        shutil.copyfile(folder / name, run.tokenizer / name)


def _summary(kinds) -> str:
    """Layer kinds in short: `supra ×6`, or `supra ×4, softmax ×2 (3, 5)`."""
    parts = []
    for kind in sorted(set(kinds)):
        where = [str(index) for index, other in enumerate(kinds) if other == kind]
        parts.append(f"{kind} ×{len(where)}" + (f" ({', '.join(where)})" if len(where) < len(kinds) else ""))
    return ", ".join(parts)
