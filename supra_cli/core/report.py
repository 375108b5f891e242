"""What a run was worth: its scores before and after uptraining beside the teacher's, and what was spent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supra_cli.core import checkpoint
from supra_cli.core.errors import NotFoundError
from supra_cli.core.files import read_json


@dataclass(frozen=True)
class Line:
    """One figure. `recovery` is None where it has no meaning (perplexities) or nothing to compare with."""

    task: str
    metric: str
    teacher: float | None
    before: float | None
    after: float | None
    recovery: float | None


@dataclass(frozen=True)
class Report:
    lines: list[Line]
    tokens: int
    """Tokens of uptraining."""
    seconds: float
    """Seconds of uptraining, validation and saving left out."""
    notes: list[str]
    """Sentences on figures that are left out."""


def read(run: Path) -> Report:
    """The report of a run directory from what `supra eval` left in it. NotFoundError before anything was scored.

    Of all that was scored in the run, the figures of the model that `last` is, whichever step was scored last; from
    before uptraining those of the same questions, asked in the same way.
    """
    provenance = run / "last" / "supra.json"
    if not provenance.is_file():
        raise NotFoundError(f"{run} is no finished run: it holds no last/supra.json; run `supra uptrain` first")
    after = results(run / "eval", run / "last")
    if not after:
        raise NotFoundError(f"{run / 'last'} was not scored yet; run `supra eval {run / 'last'}` first")
    before = results(run / "converted" / "eval", run / "converted")
    lines, notes = [], []
    for task, result in sorted(after.items()):
        other = before.get(task, {})
        if other and other["questions"] != result["questions"]:
            notes.append(
                f"{task}: {run / 'converted'} was asked other questions, or in another way; "
                "score both with the same options"
            )
            other = {}
        for name, row in result["metrics"].items():
            lines += _lines(task, name, row, other.get("metrics", {}).get(name, {}))
    spent = checkpoint.read_provenance(run / "last")
    return Report(lines, spent["tokens"], spent["seconds"], notes)


def results(folder: Path, model: Path) -> dict[str, dict[str, Any]]:
    """task → the newest comparison of `model` that was noted in `folder`."""
    files = sorted(folder.glob("*.json"))
    weights = f"sha256:{checkpoint.identity(model)}" if files else ""
    results = {path.stem: read_json(path).get("results", {}).get(weights) for path in files}
    return {task: result for task, result in results.items() if result}


def _lines(task: str, metric: str, row: dict[str, Any], before: dict[str, Any]) -> list[Line]:
    """A metric that can be recovered, or nats per token and the perplexity that they are; others are in the records."""
    figures = row.get("teacher"), before.get("student"), row["student"]
    if metric == "nats_per_token":
        perplexities = (None if value is None else math.exp(value) for value in figures)
        return [Line(task, "perplexity", *perplexities, None), Line(task, metric, *figures, None)]
    return [Line(task, metric, *figures, row["recovery"])] if row.get("recovery") is not None else []
