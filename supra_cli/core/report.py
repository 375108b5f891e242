"""What a run was worth: its scores before and after uptraining beside the teacher's, and what was spent."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supra_cli.core.errors import NotFoundError


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


def read(run: Path) -> Report:
    """The report of a run directory from what `supra eval` left in it. NotFoundError before anything was scored."""
    provenance = run / "last" / "supra.json"
    if not provenance.is_file():
        raise NotFoundError(f"{run} is no finished run: it holds no last/supra.json; run `supra uptrain` first")
    after = _results(run / "eval")
    if not after:
        raise NotFoundError(f"nothing was scored in {run} yet; run `supra eval {run / 'last'}` first")
    before = _results(run / "converted" / "eval")
    lines = [
        line
        for task, metrics in sorted(after.items())
        for name, row in metrics.items()
        for line in _lines(task, name, row, before.get(task, {}).get(name, {}))
    ]
    spent = json.loads(provenance.read_text(encoding="utf-8"))
    return Report(lines, spent["tokens"], spent["seconds"])


def _results(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """task → metric → the newest comparison that was noted."""
    files = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}
    return {task: content["results"]["metrics"] for task, content in files.items() if content.get("results")}


def _lines(task: str, metric: str, row: dict[str, Any], before: dict[str, Any]) -> list[Line]:
    """A metric that can be recovered, or nats per token and the perplexity that they are; others are in the records."""
    figures = row.get("teacher"), before.get("student"), row["student"]
    if metric == "nats_per_token":
        perplexities = (None if value is None else math.exp(value) for value in figures)
        return [Line(task, "perplexity", *perplexities, None), Line(task, metric, *figures, None)]
    return [Line(task, metric, *figures, row["recovery"])] if row.get("recovery") is not None else []
