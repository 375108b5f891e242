"""Every shipped recipe loads, plans and is built on the meta device, without a network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from supra_cli.core import hub
from supra_cli.core import recipe as recipes
from supra_cli.core.lookup import lookup
from supra_cli.core.modeling import SupraConfig, SupraForCausalLM
from supra_cli.core.stages import stages
from supra_cli.core.swap import layer_kinds
from supra_cli.core.train.prepare import select

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_valid_and_its_model_can_be_built(path: Path) -> None:
    recipe = recipes.load(path, lookup=lookup)
    if recipe.model is not None:
        base = AutoConfig.for_model(**recipe.model, vocab_size=recipe.tokenizer.vocab_size)
    else:
        base = hub.base_config(hub.resolve(recipe.base))
    kinds = layer_kinds(base.num_hidden_layers, recipe.mixer.name, recipe.keep)
    config = SupraConfig.from_base(base, mixer=recipe.mixer.name, options=recipe.mixer.options, layers=kinds)
    with torch.device("meta"):
        model = SupraForCausalLM._from_config(config)
    for spec in recipe.stages:
        kind = stages.get(spec.kind)
        assert select(model, kind(kind.Options(**spec.options)), spec)
        assert recipe.steps(spec) >= 1


def test_the_recipes_that_the_documentation_names_are_there() -> None:
    assert {"demo", "tiny-teacher", "llama2-7b", "mistral", "t2r"} <= {path.stem for path in RECIPES}
