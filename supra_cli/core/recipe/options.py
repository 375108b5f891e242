"""Options from plain values: the one answer for a recipe's tables, for --set and for a model's config.json."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
from collections.abc import Iterable, Mapping
from itertools import groupby, pairwise
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

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


def describe(kind: type) -> dict[str, dict[str, Any]]:
    """Name → {"type", "choices", "default", "help"} of each option of the dataclass `kind`; the help is the text that
    stands under the field in its source, empty where there is none.
    """
    hints, told = _hints(kind), _texts(kind)
    return {
        field.name: {
            "type": field.type.__name__ if isinstance(field.type, type) else str(field.type),
            "choices": get_args(hint) if get_origin(hint := hints.get(field.name)) is Literal else None,
            "default": _default(field),
            "help": told.get(field.name, ""),
        }
        for field in dataclasses.fields(kind)
    }


def _hints(kind: type) -> dict[str, Any]:
    try:
        return get_type_hints(kind)
    except NameError:  # a package may import what its hints name for type checkers alone
        return {}


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _texts(kind: type) -> dict[str, str]:
    """Field → the text under it, on one line; those of the classes that `kind` extends, too."""
    found: dict[str, str] = {}
    for part in filter(dataclasses.is_dataclass, reversed(kind.__mro__)):
        try:
            source = textwrap.dedent(inspect.getsource(part))
        except (OSError, TypeError):  # a package that was installed without its source
            continue
        for field, text in pairwise(ast.parse(source).body[0].body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return found


def message(item: Mapping[str, Any]) -> str:
    """One of pydantic's errors as the end of a sentence, with what was got where it is short."""
    said = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":  # our own sentence, which says what was got
        return said
    said = said[0].lower() + said[1:]
    got = item.get("input")
    return f"{said}, got {got!r}" if isinstance(got, str | int | float) and item["type"] != "missing" else said
