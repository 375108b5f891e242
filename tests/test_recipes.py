"""Every shipped recipe loads, plans and is built on the meta device, without a network."""

from __future__ import annotations

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
    named = {"demo", "tiny-teacher", "llama2-7b", "mistral", "t2r", "tinyllama-24gb", "mistral-80gb"}
    assert named <= {path.stem for path in RECIPES}


@pytest.mark.parametrize(("name", "gigabytes"), [("tinyllama-24gb", 24), ("mistral-80gb", 80)])
def test_a_recipe_for_one_gpu_fits_it_by_its_plan_and_would_not_with_plain_adamw(name: str, gigabytes: int) -> None:
    """A tenth of the memory is left to what no plan sees: the CUDA context, the allocator's gaps, the kernels."""
    path = recipes.find(name)
    plan = accounting.plan(recipes.load(path, lookup=lookup))
    assert plan.memory_bytes < 0.9 * gigabytes * 1e9
    plain = [
        f"stages.{number}.{key}"
        for number, stage in enumerate(plan.stages)
        if stage.kind != "transfer"
        for key in ("optimizer=adamw", "activation_checkpointing=false")
    ]
    assert accounting.plan(recipes.load(path, plain, lookup=lookup)).memory_bytes > gigabytes * 1e9
