"""`supra report`: one table of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from supra_cli.commands import console


def run(
    directory: Annotated[Path, typer.Argument(help="Run directory of `supra uptrain`, scored with `supra eval`.")],
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Show a run's scores before and after uptraining beside the teacher's, and what was spent."""
    from dataclasses import asdict

    from supra_cli.core import report

    found = report.read(directory)
    for note in found.notes:
        console.note(note)
    if json:
        console.document(asdict(found))
        return
    console.table(
        [
            [line.task, line.metric, *map(_figure, (line.teacher, line.before, line.after)), _share(line.recovery)]
            for line in found.lines
        ],
        ["task", "metric", "teacher", "before", "after", "recovery"],
    )
    spent = f"{console.number(found.tokens)} tokens of uptraining in {console.duration(found.seconds)}"
    console.result(f"\n{spent}; recovery is (student − chance) / (teacher − chance)")


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}" if value < 100 else f"{value:,.0f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"
