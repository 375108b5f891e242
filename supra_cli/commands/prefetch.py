"""`supra prefetch`: fetch what a machine without a network will need."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from supra_cli.commands import console


def run(
    models: Annotated[list[str] | None, typer.Argument(metavar="[MODEL]...", help="Aliases or hub ids.")] = None,
    tasks: Annotated[
        list[str] | None, typer.Option("--tasks", "-t", help="Tasks whose data to fetch: a,b or -t a -t b.")
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with lm-eval task files of your own.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Download models and evaluation data to the Hugging Face cache, for machines that are offline."""
    from supra_cli.core import evaluate, hub
    from supra_cli.core.errors import UsageError

    evaluate.hush()
    measures, wanted = evaluate.split_names(tasks or ())
    if not models and not measures and not wanted:
        raise UsageError("nothing to fetch: name models, or tasks with --tasks a,b")
    if include_path is not None and not wanted:
        raise UsageError("--include-path is where --tasks are looked for, and no task is named; give --tasks a,b")
    fetched: dict[str, Any] = {"models": {}, "tasks": {}, "measures": measures}
    for model in models or ():
        source = hub.resolve(model)
        console.note(f"model: {source}")
        fetched["models"][model] = str(hub.fetch(source))
    if wanted:
        found = evaluate.find(wanted, include_path)
        fetched["tasks"] = {name: len(task.eval_docs) for name, task in found.leaves.items()}
    if json:
        console.document(fetched)
        return
    rows = [(name, path) for name, path in fetched["models"].items()]
    rows += [(name, f"{count} questions") for name, count in fetched["tasks"].items()]
    console.table([*rows, *((name, "a measure, which needs no download") for name in measures)])
