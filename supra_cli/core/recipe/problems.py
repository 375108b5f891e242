"""A recipe's problems, all at once, each as one line with its key path and the nearest known key."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import TypeAdapter, ValidationError

from supra_cli.core.errors import UsageError, near_miss
from supra_cli.core.recipe.schema import Lookup, Mixer, OpenTable, Recipe, Stage


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
        fields = {field.name for field in dataclasses.fields(options)}
        known = fields | set(model.model_fields)
        problems += [f"{where}.{key}: unknown key{near_miss(key, known)}" for key in values if key not in fields]
        try:
            TypeAdapter(options).validate_python({key: value for key, value in values.items() if key in fields})
        except UsageError as error:
            problems.append(str(error) if str(error).startswith(where) else f"{where}: {error}")
        except ValidationError as error:
            problems += [f"{where}.{'.'.join(map(str, item['loc']))}: {_message(item)}" for item in error.errors()]
    return problems


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
    return f"{where}: {_message(item)}" if where else _message(item)


def _message(item: dict[str, Any]) -> str:
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":  # our own sentence, which says what was got
        return message
    message = message[0].lower() + message[1:]
    got = item.get("input")
    return f"{message}, got {got!r}" if isinstance(got, str | int | float) and item["type"] != "missing" else message


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
