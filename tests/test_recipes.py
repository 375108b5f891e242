"""Every shipped recipe loads, plans and is built on the meta device, without a network."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from supra_cli.core import accounting, checkpoint, hub
from supra_cli.core import recipe as recipes
from supra_cli.core.lookup import lookup
from supra_cli.core.modeling import SupraConfig, SupraForCausalLM
from supra_cli.core.stages import stages
from supra_cli.core.train.build import prepare

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_valid_and_its_model_can_be_built(path: Path) -> None:
    recipe = recipes.load(path, lookup=lookup)
    if recipe.model is not None:
        shape = AutoConfig.for_model(**recipe.model, vocab_size=recipe.tokenizer.vocab_size)
        base = SupraConfig.from_base(shape)
    else:
        base = checkpoint.read_config(hub.config_folder(hub.resolve(recipe.base)))
    config = base.with_mixer(recipe.mixer.name, recipe.mixer.options, recipe.keep)
    with torch.device("meta"):
        model = SupraForCausalLM._from_config(config)
    for spec in recipe.stages:
        kind = stages.get(spec.kind)
        assert prepare(model, kind(kind.Options(**spec.options)), spec)
        assert recipe.steps(spec) >= 1


def test_the_recipes_that_the_documentation_names_are_there() -> None:
    named = {"small-budget", "demo", "tiny-teacher", "llama2-7b", "mistral", "t2r", "tinyllama-24gb", "mistral-80gb"}
    assert named <= {path.stem for path in RECIPES}


def named(path: Path) -> tuple[int, int] | None:
    """Of the GPUs that a recipe's first line names: how many, and the memory of each in GB."""
    first = path.read_text(encoding="utf-8").split("\n")[0]
    found = re.search(r"on (one|\d+) GPUs? of (\d+) GB", first)
    return found and (1 if found[1] == "one" else int(found[1]), int(found[2]))


def test_five_recipes_name_the_gpus_that_they_are_for() -> None:
    found = {path.stem: gpus for path in RECIPES if (gpus := named(path))}
    assert found == {
        "small-budget": (1, 24),
        "tinyllama-24gb": (1, 24),
        "mistral-80gb": (1, 80),
        "llama2-7b": (4, 80),
        "mistral": (4, 80),
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_what_its_first_line_says_and_nothing_smaller(path: Path, monkeypatch) -> None:
    """One that names no GPU is for any machine; half as many GPUs, or plain AdamW on one, would not do."""
    plan = accounting.plan(recipes.load(path, lookup=lookup))
    gpus, gigabytes = named(path) or (1, 1)
    monkeypatch.setitem(accounting.GPUS, "named", (gigabytes, 1))
    assert plan.fits("named", gpus)
    if gpus > 1:
        assert not plan.fits("named", gpus // 2)
    elif named(path):
        plain = [
            f"stages.{number}.{key}"
            for number, stage in enumerate(plan.stages)
            if stage.spec.kind != "transfer"
            for key in ("optimizer=adamw", "activation_checkpointing=false")
        ]
        assert accounting.plan(recipes.load(path, plain, lookup=lookup)).memory_bytes() > gigabytes * 1e9
