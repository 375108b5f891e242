"""`supra report`: all that was scored in a run, in tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from supra_cli.commands import console, scores

if TYPE_CHECKING:
    from supra_cli.core.report import Line


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
    if found.lines:
        header = ["task", "metric", "n-shot", "questions", "teacher", "before", "after", "recovery"]
        console.table(map(_cells, found.lines), header)
    for figures in (found.measures, found.letters):
        if figures:
            scores.show_figures(figures, ("teacher", "before", "after"))
    spent = f"{console.number(found.tokens)} tokens of uptraining in {console.duration(found.seconds)}"
    console.result(f"\n{spent}; recovery is (student − chance) / (teacher − chance)")


def _cells(line: Line) -> list[str]:
    from supra_cli.core.evaluate import showing

    figures = [
        showing.figure(value, deviation)
        for value, deviation in (
            (line.teacher, line.teacher_stderr),
            (line.before, line.before_stderr),
            (line.after, line.after_stderr),
        )
    ]
    questions = "–" if line.questions is None else str(line.questions)
    recovery = showing.recovery(line.metric, vars(line))
    return [line.task, line.metric, showing.shots(line.num_fewshot), questions, *figures, recovery]
