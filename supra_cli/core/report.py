"""What a run was worth: all that was scored, before and after uptraining beside the teacher, and what was spent."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from supra_cli.core import checkpoint
from supra_cli.core.errors import NotFoundError, SupraError
from supra_cli.core.evaluate.measures import OF_ONE_LENGTH
from supra_cli.core.evaluate.measuring import BEFORE, Figures
from supra_cli.core.files import read_json


@dataclass(frozen=True)
class Line:
    """One metric of a task, with its standard errors. None is what was not scored or has no meaning."""

    task: str
    metric: str
    num_fewshot: int | None
    questions: int | None
    teacher: float | None
    teacher_stderr: float | None
    before: float | None
    before_stderr: float | None
    after: float
    after_stderr: float | None
    recovery: float | None
    recovery_stderr: float | None
    difference: float | None
    """Nats per token above the teacher's."""
    difference_stderr: float | None


@dataclass(frozen=True)
class Report:
    lines: list[Line]
    measures: Figures
    """Of the roles "teacher", "before", "after" and the baselines."""
    letters: Figures
    """Likewise of {task: {letter: ...}}."""
    tokens: int
    """Tokens of uptraining."""
    seconds: float
    """Seconds of uptraining, validation and saving left out."""
    notes: list[str]
    """Sentences on figures that are left out."""


def read(run: Path) -> Report:
    """The report of a run directory from what `supra eval` left in it. NotFoundError before anything was scored.

    Of all that was scored in the run, the figures of the model that `last` is, whichever step was scored last; from
    before uptraining those of the same questions, asked in the same way, by an evaluation of `converted` or as a
    baseline of this one.
    """
    provenance = run / "last" / "supra.json"
    if not provenance.is_file():
        raise NotFoundError(f"{run} is no finished run: it holds no last/supra.json; run `supra uptrain` first")
    after = results(run / "eval", run / "last")
    if not after:
        raise NotFoundError(f"{run / 'last'} was not scored yet; run `supra eval {run / 'last'}` first")
    before = results(run / "converted" / "eval", run / "converted")
    spent = checkpoint.read_provenance(run / "last")
    if not {"tokens", "seconds"} <= set(spent):
        raise SupraError(f"{provenance} does not tell of the model beside it what its training took; restore that file")
    # Where the run began with a trained model, the baseline is what that one was before it. The save says so itself:
    # `converted` is then a link, and that model may be gone.
    is_new = not spent.get("tokens_before")
    found = Report([], {}, {}, spent["tokens"], spent["seconds"], [])
    for task, result in sorted(after.items()):
        other = before.get(task, {})
        is_same = other.get("questions") == result["questions"]
        lines = _lines(task, result, other if is_same else {}, is_new)
        figures, letters = (
            _beside(result.get(kind, {}), other.get(kind, {}) if is_same else {}, is_new)
            for kind in ("figures", "letters")
        )
        found.lines.extend(lines)
        found.measures.update({task: figures} if figures else {})
        found.letters.update({task: letters} if letters else {})
        is_left_out = any(line.before is None for line in lines) or any("before" not in row for row in figures.values())
        if other and not is_same and is_left_out:
            # Of these no option says the length, which is that of each model's own training.
            unless = ", which differ where rows of training do" if task in OF_ONE_LENGTH else ""
            found.notes.append(
                f"{task}: {run / 'converted'} was asked other questions{unless}, or in another way; "
                "score both with the same options"
            )
    return found


def results(folder: Path, model: Path) -> dict[str, dict[str, Any]]:
    """task → the newest comparison of `model` that was noted in `folder`."""
    files = sorted(folder.glob("*.json"))
    weights = f"sha256:{checkpoint.identity(model)}" if files else ""
    results = {path.stem: read_json(path).get("results", {}).get(weights) for path in files}
    return {task: result for task, result in results.items() if result}


def _lines(task: str, result: dict[str, Any], before: dict[str, Any], is_new: bool) -> list[Line]:
    """Of each metric a line; before nats per token the perplexity that they are, unless the task has one of its own."""
    lines, metrics = [], result.get("metrics", {})
    for metric, row in metrics.items():
        was = before.get("metrics", {}).get(metric, {})
        baseline = row.get("baselines", {}).get(BEFORE, {}) if is_new else {}
        line = Line(
            task,
            metric,
            num_fewshot=result.get("num_fewshot"),
            questions=result.get("samples"),
            teacher=row.get("teacher"),
            teacher_stderr=row.get("teacher_stderr"),
            before=was.get("student", baseline.get("score")),
            before_stderr=was.get("stderr", baseline.get("stderr")),
            after=row["student"],
            after_stderr=row.get("stderr"),
            recovery=row.get("recovery"),
            recovery_stderr=row.get("recovery_stderr"),
            difference=row.get("difference"),
            difference_stderr=row.get("difference_stderr"),
        )
        lines += [_perplexity(line)] if metric == "nats_per_token" and "perplexity" not in metrics else []
        lines.append(line)
    return lines


def _perplexity(nats: Line) -> Line:
    """exp of nats per token; its error is perplexity × theirs."""
    found: dict[str, Any] = {"metric": "perplexity", "difference": None, "difference_stderr": None}
    for name in ("teacher", "before", "after"):
        value, deviation = getattr(nats, name), getattr(nats, f"{name}_stderr")
        found[name] = None if value is None else math.exp(value)
        found[f"{name}_stderr"] = None if deviation is None else found[name] * deviation
    return replace(nats, **found)


def _beside(after: dict[str, dict], before: dict[str, dict], is_new: bool) -> dict[str, dict[str, dict[str, float]]]:
    """{label: {role: figure}} of a measure, with the student's own and what it was before under these names."""
    found = {}
    for label, row in after.items():
        others = dict(row)
        figures = {"teacher": others.pop("teacher", None), "after": others.pop("student", None)}
        baseline = others.pop(BEFORE, None) if is_new else None
        figures["before"] = before.get(label, {}).get("student", baseline)
        found[label] = {role: figure for role, figure in {**figures, **others}.items() if figure is not None}
    return found
