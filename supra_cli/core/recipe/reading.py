"""Recipes from TOML and back: read, override, validate, write; and the shipped ones by name."""

from __future__ import annotations

import logging
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from supra_cli.core.errors import UsageError, first_line, near_miss
from supra_cli.core.recipe import problems
from supra_cli.core.recipe.paths import anchor
from supra_cli.core.recipe.schema import Lookup, Recipe

_log = logging.getLogger(__name__)
_SHIPPED = Path(__file__).resolve().parent.parent.parent / "assets" / "recipes"


def load(path: Path, overrides: Iterable[str] = (), *, lookup: Lookup | None = None) -> Recipe:
    """Read, override and validate the recipe at `path`, a file or the name of a shipped one.

    `overrides` are `key.path=value` strings (values in TOML, bare words taken as text), as given to `--set`. Local
    paths come back absolute: those of the file are relative to its folder, those of `overrides` to the working
    directory. With `lookup`, for a recipe that is about to be run, the options of mixer and stages are checked, and
    what is valid and yet without effect is logged. Raises UsageError listing every problem with its key path.
    """
    path = Path(path)
    if not path.is_file():
        path = shipped().get(str(path), path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # Windows editors write a byte-order mark
    except FileNotFoundError:
        raise UsageError(f"no recipe at {path}; `supra recipe list` names the shipped ones") from None
    except IsADirectoryError:
        raise UsageError(f"{path} is a folder, expected a recipe; name the TOML file in it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the recipe {path}: {error}") from None
    except (ValueError, RecursionError) as error:  # tomllib's own, or a number of more digits than Python reads
        raise UsageError(f"{path} is not valid TOML: {first_line(error)}") from None
    anchor(raw, path.resolve().parent)
    for assignment in overrides:
        override(raw, assignment)
    anchor(raw, Path.cwd())
    recipe = validate(raw, str(path), lookup=lookup)
    for remark in problems.without_effect(recipe) if lookup is not None else ():
        _log.warning(remark)
    return recipe


def shipped() -> dict[str, Path]:
    """Name → file of the recipes that come with supra."""
    return {path.stem: path for path in sorted(_SHIPPED.glob("*.toml"))}


def find(name: str) -> Path:
    """The file of a shipped recipe; UsageError with a near miss for an unknown name."""
    known = shipped()
    if name not in known:
        raise UsageError(f"no shipped recipe '{name}'{near_miss(name, known)}")
    return known[name]


def validate(raw: dict[str, Any], where: str = "recipe", *, lookup: Lookup | None = None) -> Recipe:
    """A recipe from its parsed TOML; UsageError with all problems at once."""
    found: list[str] = []
    recipe = None
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        found += problems.of_tables(error)
    if lookup is not None:
        found += problems.of_options(raw, lookup) + problems.of_model(raw, lookup)
    if found:
        raise UsageError(f"{where} is not a valid recipe:\n" + "\n".join(f"  {problem}" for problem in found))
    return recipe


def dumps(recipe: Recipe) -> str:
    """The resolved recipe as TOML, defaults written out, so that a later default cannot change what it means."""
    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))


def override(raw: dict[str, Any], assignment: str) -> None:
    """Put one `key.path=value` of `--set` into `raw`: the value as in TOML, a bare word taken as text."""
    key, separator, value = assignment.partition("=")
    if not separator or not key.strip():
        raise UsageError(f"--set takes key=value, as in stages.0.lr=1e-4; got '{assignment}'")
    *path, last = key.strip().split(".")
    table: Any = raw
    for part in path:
        table = _descend(table, part, key)
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        parsed = value
    if isinstance(table, list):
        table[_index(table, last, key)] = parsed
    else:
        table[last] = parsed


def _descend(table: Any, part: str, key: str) -> Any:
    child = table[_index(table, part, key)] if isinstance(table, list) else table.setdefault(part, {})
    if not isinstance(child, dict | list):
        raise UsageError(f"--set {key}: '{part}' is a value, not a table")
    return child


def _index(table: list, part: str, key: str) -> int:
    if part not in map(str, range(len(table))):
        raise UsageError(f"--set {key}: '{part}' is not one of the {len(table)} entries there, counted from 0")
    return int(part)
