"""Recipes from TOML and back: read, override, validate, write; and the shipped ones by name."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from supra_cli.core.errors import UsageError, near_miss
from supra_cli.core.recipe import problems
from supra_cli.core.recipe.schema import Lookup, Recipe, Source

_SHIPPED = Path(__file__).resolve().parent.parent.parent / "assets" / "recipes"


def load(path: Path, overrides: Iterable[str] = (), *, lookup: Lookup | None = None) -> Recipe:
    """Read, override and validate the recipe at `path`, a file or the name of a shipped one; its relative data paths
    come back absolute.

    `overrides` are `key.path=value` strings (values in TOML, bare words taken as text), as given to `--set`.
    Raises UsageError listing every problem with its key path.
    """
    path = Path(path)
    if not path.is_file():
        path = shipped().get(str(path), path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"no recipe at {path}; `supra recipe list` names the shipped ones") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the recipe {path}: {error}") from None
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from None
    for override in overrides:
        _override(raw, override)
    return _anchor(validate(raw, str(path), lookup=lookup), path.resolve().parent)


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
        found += problems.of_options(raw, lookup)
    if found:
        raise UsageError(f"{where} is not a valid recipe:\n" + "\n".join(f"  {problem}" for problem in found))
    return recipe


def dumps(recipe: Recipe) -> str:
    """The resolved recipe as TOML, defaults written out, so that a later default cannot change what it means."""
    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))


def _override(raw: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key.strip():
        raise UsageError(f"--set takes key=value, as in stages.0.lr=1e-4; got '{override}'")
    *path, last = key.strip().split(".")
    table: Any = raw
    for part in path:
        table = _descend(table, part, key)
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    if isinstance(table, list):
        table[_index(table, last, key)] = parsed
    else:
        table[last] = parsed


def _descend(table: Any, part: str, key: str) -> Any:
    if isinstance(table, list):
        return table[_index(table, part, key)]
    child = table.setdefault(part, {})
    if not isinstance(child, dict | list):
        raise UsageError(f"--set {key}: '{part}' is a value, not a table")
    return child


def _index(table: list, part: str, key: str) -> int:
    if not part.isdecimal() or int(part) >= len(table):
        raise UsageError(f"--set {key}: '{part}' is not one of the {len(table)} entries there, counted from 0")
    return int(part)


def _anchor(recipe: Recipe, folder: Path) -> Recipe:
    """Local paths made absolute: those that exist relative to the recipe's folder."""

    def anchor(name: str) -> str:
        path = folder / name
        is_pattern = any(mark in name for mark in "*?[")
        looks_local = name.startswith((".", "/", "~")) or is_pattern or Path(name).suffix in _TEXT_SUFFIXES
        return str(Path(name).expanduser() if name.startswith("~") else path) if looks_local or path.exists() else name

    def sources(group: tuple[Source, ...]) -> tuple[Source, ...]:
        return tuple(source.model_copy(update={"path": anchor(source.path)}) for source in group)

    data = recipe.data.model_copy(
        update={"sources": sources(recipe.data.sources), "validation": sources(recipe.data.validation)}
    )
    update: dict[str, Any] = {"data": data}
    if recipe.base is not None:
        update["base"] = anchor(recipe.base)
    update["stages"] = tuple(
        stage.model_copy(update={"teacher": anchor(stage.teacher)}) if stage.teacher else stage
        for stage in recipe.stages
    )
    return recipe.model_copy(update=update)


_TEXT_SUFFIXES = {".txt", ".jsonl", ".json", ".parquet", ".gz", ".zst", ".md", ".py"}
