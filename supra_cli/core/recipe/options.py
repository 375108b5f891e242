"""Options from plain values: the one answer for a recipe's tables, for --set and for a model's config.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from supra_cli.core.errors import UsageError, near_miss

Options = TypeVar("Options")


def read(
    kind: type[Options], values: Mapping[str, Any], where: str, others: Iterable[str] = ()
) -> tuple[Options | None, list[str]]:
    """(the dataclass `kind` made of `values`, what is wrong with them); the first is None where there is a problem.

    A problem is a line that begins with its key path below `where`. `others` are further keys of the same table, for
    the near miss of an unknown one. A value has to be of its field's type: neither "3" nor true is a number.
    """
    fields = {field.name for field in dataclasses.fields(kind)}
    problems = [
        f"{where}.{key}: unknown key{near_miss(key, fields | {*others})}" for key in values if key not in fields
    ]
    known = {key: value for key, value in values.items() if key in fields}
    options = None
    try:
        # By way of JSON, because that is strict about types and yet takes a list for a tuple.
        options = TypeAdapter(kind).validate_json(json.dumps(known, default=str), strict=True)
    except UsageError as error:  # what the dataclass itself found
        problems.append(str(error) if str(error).startswith(where) else f"{where}: {error}")
    except ValidationError as error:
        for key, items in groupby(error.errors(), lambda item: item["loc"][:1]):
            errors = list(items)
            # Where a value may be of several kinds there is an error for each, with the kind in its path: that which
            # went furthest into the value is of the kind that was meant.
            meant = max(errors, key=lambda item: len(item["loc"]))
            path = meant["loc"] if len(errors) == 1 else (*key, *meant["loc"][2:])
            problems.append(".".join(map(str, (where, *path))) + f": {message(meant)}")
    return (None if problems else options), problems


def message(item: Mapping[str, Any]) -> str:
    """One of pydantic's errors as the end of a sentence, with what was got where it is short."""
    said = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":  # our own sentence, which says what was got
        return said
    said = said[0].lower() + said[1:]
    got = item.get("input")
    return f"{said}, got {got!r}" if isinstance(got, str | int | float) and item["type"] != "missing" else said
