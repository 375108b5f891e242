"""The student and the tokenizer that a run starts from, or goes on with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig

from supra_cli.core import checkpoint, hub
from supra_cli.core.data import sources
from supra_cli.core.data import tokenizer as bpe
from supra_cli.core.errors import UsageError
from supra_cli.core.modeling import SupraConfig, SupraForCausalLM
from supra_cli.core.recipe import Recipe
from supra_cli.core.swap import layer_kinds
from supra_cli.core.train.run import RunDirectory


@dataclass(frozen=True)
class Origin:
    """`tokenizer_folder` holds the tokenizer's files; `base` is the pretrained model the student came from, if any."""

    tokenizer_folder: Path
    base: str | None


def start(recipe: Recipe, run: RunDirectory, model: Path | None) -> tuple[SupraForCausalLM, Origin]:
    """The fp32 student before its first step: a converted model, a base converted now, or fresh weights."""
    torch.manual_seed(recipe.seed)
    if model is not None:
        return _converted(recipe, model)
    if recipe.init == "scratch":
        return _scratch(recipe, run)
    base = hub.fetch(hub.resolve(recipe.base))
    folder = checkpoint.convert(
        base,
        run.path / "converted",
        mixer=recipe.mixer.name,
        options=recipe.mixer.options,
        keep=recipe.keep,
        seed=recipe.seed,
        overwrite=True,
    )
    return checkpoint.load(folder, dtype=torch.float32), Origin(folder, str(base))


def resume(recipe: Recipe, folder: Path) -> tuple[SupraForCausalLM, Origin]:
    """The student as it was saved in the checkpoint `folder`."""
    base = checkpoint.read_provenance(folder).get("base")
    return checkpoint.load(folder, dtype=torch.float32), Origin(folder, base)


def _converted(recipe: Recipe, folder: Path) -> tuple[SupraForCausalLM, Origin]:
    student = checkpoint.load(folder, dtype=torch.float32)
    wanted = layer_kinds(len(student.supra.layers), recipe.mixer.name, recipe.keep)
    if list(student.supra.layers) != wanted:
        raise UsageError(
            f"{folder} has layers {_summary(student.supra.layers)}, the recipe asks for {_summary(wanted)}; "
            "convert again or change the recipe's mixer and keep"
        )
    return student, Origin(folder, checkpoint.read_provenance(folder).get("base"))


def _scratch(recipe: Recipe, run: RunDirectory) -> tuple[SupraForCausalLM, Origin]:
    if recipe.base is not None:
        folder = hub.fetch(hub.resolve(recipe.base))
        base_config = AutoConfig.from_pretrained(folder)
    else:
        folder = run.path / "tokenizer"
        words = bpe.train(_training_texts(recipe), recipe.tokenizer.vocab_size)
        words.save_pretrained(folder)
        settings = {"vocab_size": len(words), **recipe.model}
        base_config = AutoConfig.for_model(
            **settings,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
        base_config.save_pretrained(folder)
    kinds = layer_kinds(base_config.num_hidden_layers, recipe.mixer.name, recipe.keep)
    config = SupraConfig.from_base(base_config, mixer=recipe.mixer.name, options=recipe.mixer.options, layers=kinds)
    student = SupraForCausalLM._from_config(config, dtype=torch.float32)
    for _, layer in student.swapped_layers():
        layer.mixer.reset_parameters()
    return student, Origin(folder, None)


def _training_texts(recipe: Recipe):
    for source in recipe.data.sources:
        if source.path != sources.COPY:
            yield from sources.texts(source, "train", recipe.data.skip_share)


def _summary(kinds) -> str:
    """Layer kinds in short: `supra ×6`, or `supra ×4, softmax ×2 (3, 5)`."""
    parts = []
    for kind in sorted(set(kinds)):
        where = [str(index) for index, other in enumerate(kinds) if other == kind]
        parts.append(f"{kind} ×{len(where)}" + (f" ({', '.join(where)})" if len(where) < len(kinds) else ""))
    return ", ".join(parts)
