"""`supra recipe`: the shipped recipes, and whether one's own is right."""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from supra_cli.commands import console
from supra_cli.core.files import dumps, write

app = typer.Typer(help="List, show, copy and validate recipes; print their schema and the options of mixers.")


@app.command("list")
def names(json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False) -> None:
    """List the shipped recipes, each with its first comment."""
    from supra_cli.core import recipe as recipes

    found = recipes.shipped()
    if json:
        console.document({name: {"path": str(path), "about": _about(path)} for name, path in found.items()})
        return
    console.table([[name, _about(path)] for name, path in found.items()], ["recipe", "about"])


@app.command()
def show(name: Annotated[str, typer.Argument(help="Shipped recipe.")]) -> None:
    """Print a shipped recipe."""
    from supra_cli.core import recipe as recipes

    console.result(recipes.find(name).read_text(encoding="utf-8").rstrip())


@app.command()
def copy(
    name: Annotated[str, typer.Argument(help="Shipped recipe.")],
    target: Annotated[Path, typer.Argument(help="File to write, or folder to write it into.")] = Path("."),
) -> None:
    """Copy a shipped recipe, to change it."""
    from supra_cli.core import recipe as recipes
    from supra_cli.core.errors import UsageError

    source = recipes.find(name)
    path = target / source.name if target.is_dir() else target
    if path.exists():
        raise UsageError(f"{path} exists already; choose another name")
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent}; make it, or choose another place")
    write(path, source.read_text(encoding="utf-8"))
    console.result(str(path))


@app.command()
def validate(
    path: Annotated[Path, typer.Argument(help="Recipe: a TOML file, or a shipped one's name.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Override a key, as in uptrain.")] = None,
) -> None:
    """Check a recipe: every problem at once, each with its key; the resolved recipe on stdout when there is none.

    What it says of files is checked too where they are on this machine.
    """
    from supra_cli.core import recipe as recipes
    from supra_cli.core.data import sources
    from supra_cli.core.lookup import lookup

    recipe = recipes.load(path, overrides or (), lookup=lookup)
    for sentence in sources.overlap(recipe.data):
        console.note(sentence)
    console.result(recipes.dumps(recipe).rstrip())


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe, with what each key means."""
    from supra_cli.core import recipe as recipes

    console.document(recipes.Recipe.model_json_schema())


@app.command()
def options(
    name: Annotated[str | None, typer.Argument(help="Mixer or stage.", show_default="all")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Print the options of mixers and stages: the further keys of [mixer] and [[stages]], with what each means."""
    from supra_cli.core.errors import UsageError, near_miss
    from supra_cli.core.mixers import mixers
    from supra_cli.core.recipe.options import describe
    from supra_cli.core.stages import stages

    known = {(registry.kind, one): registry.get(one) for registry in (mixers, stages) for one in registry}
    found = {key: item for key, item in known.items() if name in (None, key[1])}
    if not found:
        raise UsageError(f"no mixer or stage '{name}'{near_miss(name, [one for _, one in known])}")
    if json:
        document: dict[str, dict[str, Any]] = {}
        for (kind, one), item in found.items():
            document.setdefault(kind, {})[one] = describe(item.Options)
        console.document(document)
        return
    for (kind, one), item in found.items():
        about = (inspect.getmodule(item).__doc__ or "").strip().split("\n")[0]
        console.result(f"{kind} {one}: {about}")
        for key, option in describe(item.Options).items():
            values = ", ".join(map(str, option["choices"] or ())) or option["type"]
            console.result(f"  {key} = {dumps(option['default'])}  ({values})")
            console.result(textwrap.fill(option["help"], 100, initial_indent="      ", subsequent_indent="      "))


def _about(path: Path) -> str:
    """The first sentence of the comment at the top of a recipe."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return " ".join(lines).split(". ")[0].rstrip(".")
