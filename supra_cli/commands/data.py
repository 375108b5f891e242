"""`supra data`: look at what a recipe trains on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from supra_cli.commands import console

app = typer.Typer(help="Look at the text that a recipe trains on.")


@app.callback()
def _group() -> None:
    """A group even while it has one command."""


@app.command()
def peek(
    recipe: Annotated[Path, typer.Argument(help="Recipe: a TOML file, or a shipped one's name.")],
    rows: Annotated[int, typer.Option("--rows", "-n", min=1, help="How many rows to show.")] = 2,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Override a key, as in uptrain.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Show the first rows, the first stage's, exactly as the model will see them, document by document."""
    from supra_cli.core import recipe as recipes
    from supra_cli.core.lookup import lookup
    from supra_cli.core.train.peek import peek as look

    found = look(recipes.load(recipe, overrides or (), lookup=lookup), rows)
    if json:
        console.document(found)
        return
    for number, row in enumerate(found):
        console.result(f"row {number} from {row['source']}: {row['tokens']} tokens, {len(row['documents'])} documents")
        for document in row["documents"]:
            console.result(f"  [{document['tokens']} tokens] {document['text']!r}")
