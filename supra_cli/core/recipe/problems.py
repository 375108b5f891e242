"""A recipe's problems, all at once, each as one line with its key path and the nearest known key."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from supra_cli.core.errors import UsageError, near_miss
from supra_cli.core.recipe.options import message, read
from supra_cli.core.recipe.schema import Lookup, Mixer, OpenTable, Recipe, Stage

# No fields of any config since transformers 5, which still reads them.
_OLD_ROPE = {"rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_pct", "rotary_emb_base"}


def of_tables(error: ValidationError) -> list[str]:
    """What pydantic found, without the knock-on complaints about a table whose own keys are wrong."""
    items = error.errors()
    inner = {item["loc"][:depth] for item in items for depth in range(len(item["loc"]))}
    return [_describe(item) for item in items if item["loc"] not in inner or not item["loc"]]


def of_options(raw: dict[str, Any], lookup: Lookup) -> list[str]:
    """What is wrong with the options of the mixer and of each stage, once they name something that is registered."""
    problems = []
    for kind, name, table, model, where in _open_tables(raw):
        try:
            options = lookup(kind, name)
        except UsageError as error:
            problems.append(f"{where}: {error}")
            continue
        values = {key: value for key, value in table.items() if key not in model.model_fields}
        problems += read(options, values, where, model.model_fields)[1]
    return problems


def of_model(raw: dict[str, Any], lookup: Lookup) -> list[str]:
    """The keys of [model] that its `model_type` does not have, which transformers would keep and never read."""
    model = raw.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("model_type"), str):
        return []
    try:
        config = lookup("model", model["model_type"])
    except UsageError as error:
        return [f"model.model_type: {error}"]
    known = (
        {field.name for field in dataclasses.fields(config)} | set(config.attribute_map) | _OLD_ROPE | {"model_type"}
    )
    return [f"model.{key}: unknown key{near_miss(key, known)}" for key in model if key not in known]


def without_effect(recipe: Recipe) -> list[str]:
    """A sentence for each thing that a valid recipe says in vain."""
    rows = sum(recipe.rows(stage) * recipe.steps(stage) for stage in recipe.stages)
    total = sum(source.weight for source in recipe.data.sources)
    drawn = [
        f"data.sources.{number}: with a weight of {source.weight:g} of {total:g}, {source.path} is due less than one "
        f"of the run's {rows:,} rows"
        for number, source in enumerate(recipe.data.sources)
        if source.weight * rows < total
    ]
    return drawn + [
        f"stages.{number}.warmup_steps is {stage.warmup_steps} and the stage has {recipe.steps(stage)} steps: it never "
        "reaches its rate"
        for number, stage in enumerate(recipe.stages)
        if stage.warmup_steps >= recipe.steps(stage)
    ]


def _open_tables(raw: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any], type[OpenTable], str]]:
    """(kind, name, table, its model, key path) of the mixer and the stages, as far as they are tables with a name."""
    mixer = raw.get("mixer", {})
    if isinstance(mixer, dict) and isinstance(mixer.get("name", ""), str):
        yield "mixer", mixer.get("name", Mixer().name), mixer, Mixer, "mixer"
    stages = raw.get("stages", [])
    for number, stage in enumerate(stages if isinstance(stages, list) else []):
        if isinstance(stage, dict) and isinstance(stage.get("kind"), str):
            yield "stage", stage["kind"], stage, Stage, f"stages.{number}"


def _describe(item: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        *parents, key = item["loc"]
        return f"{where}: unknown key{near_miss(str(key), _keys_at(parents))}"
    return f"{where}: {message(item)}" if where else message(item)


def _keys_at(location: list[str | int]) -> set[str]:
    """The keys that the schema allows in the table at `location`."""
    annotation: Any = Recipe
    for part in location:
        if isinstance(part, str):
            annotation = annotation.model_fields[part].annotation
        annotation = _model_in(annotation)
    return set(annotation.model_fields)


def _model_in(annotation: Any) -> Any:
    """The table type inside an optional or a tuple of tables."""
    if typing.get_origin(annotation) in (tuple, typing.Union, types.UnionType):
        inner = [arg for arg in typing.get_args(annotation) if arg not in (type(None), Ellipsis)]
        return _model_in(inner[0])
    return annotation
