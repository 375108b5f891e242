"""How the scores of `supra eval` are shown: tables on stdout, and what a figure does not say as notes beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from supra_cli.commands import console


def show(document: Mapping[str, Any], tasks: Iterable[str]) -> None:
    """Tasks, with the teacher and the baselines beside the student, then measures, then how it was asked."""
    compared, roles = document["teacher"] is not None, list(document.get("baselines", ()))
    rows = [
        _cells(task, metric, row, document["tasks"][task], compared)
        + [_figure(*row["baselines"][role].values()) for role in roles]
        for task in tasks
        for metric, row in document["results"][task].items()
    ]
    header = ["task", "metric", "n-shot", "questions", "student" if compared else "score"]
    if rows:
        console.table(rows, [*header, *(["teacher", "recovery"] if compared else []), *roles])
    for shown in (document.get("measures"), document["letters"]):
        if shown:
            _show_figures(shown)
    settings, student, took = document["settings"], document["student"], console.duration(document["seconds"])
    rows = f"{settings['batch_size']} rows a pass" + (" (auto)" if settings["batch_size_auto"] else "")
    begin = "a" if any(document["tasks"][task]["bos"] for task in tasks) else "no"
    asked = f", {settings['max_length']} tokens of context, {begin} begin token" if document["results"] else ""
    console.note(f"{rows}{asked}, {student['dtype']} on {student['device']}, {took}; kept in {student['records']}")


def _show_figures(measures: Mapping[str, Any]) -> None:
    """A line a figure, a column a model: the value and its 95 % interval."""
    found = [figure for figures in measures.values() for figure in figures.values()]
    first = ("student", "teacher")  # also where a measure asks nothing of the teacher
    roles = sorted(
        dict.fromkeys(role for figure in found for role in figure), key=lambda role: (*first, role).index(role)
    )
    rows = [
        (name, label, next(iter(figure.values()))["n"], *(_interval(figure.get(role)) for role in roles))
        for name, figures in measures.items()
        for label, figure in figures.items()
    ]
    console.table(rows, ["measure", "of", "n", *(["score"] if roles == ["student"] else roles)])


def _interval(figure: Mapping[str, float] | None) -> str:
    return "–" if figure is None else f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def warn(document: Mapping[str, Any], tasks: Iterable[str]) -> None:
    """What a figure does not show of how it came about."""
    for task in tasks:
        how = document["tasks"][task]
        _warn_of_bias(task, how["choices"])
        if how["cut"]:
            length = document["settings"]["max_length"]
            console.note(f"{task}: {how['cut']} prompts lost their beginning, being longer than {length} tokens")
        if how["outside"]:
            console.note(f"{task}: {how['outside']} questions have a right answer that is none of their choices")
        asked = document["settings"]["num_fewshot"]
        if asked is not None and how["num_fewshot"] not in (asked, None):
            console.note(f"{task}: the task fixes {how['num_fewshot']} examples; --num-fewshot {asked} has no effect")


def _warn_of_bias(task: str, choices: Mapping[str, list[int]] | None) -> None:
    if choices is None or sum(choices["right"]) < 20:
        return
    asked = sum(choices["picked"])
    for number, (picked, right) in enumerate(zip(choices["picked"], choices["right"], strict=True), 1):
        if picked > 0.5 * asked and picked > 1.5 * right:
            console.note(f"{task}: answer {number} is picked in {picked} of {asked} questions and right in {right}")


def _cells(task: str, metric: str, row: Mapping[str, Any], how: Mapping[str, Any], compared: bool) -> list[str]:
    shots = "mixed" if how["num_fewshot"] is None else str(how["num_fewshot"])
    cells = [task, metric, shots, str(how["samples"]), _figure(row["student"], row["stderr"])]
    if not compared:
        return cells
    if metric == "nats_per_token" and row["difference"] is not None:
        recovery = f"{row['difference']:+.3f} nats" + _spread(row["difference_stderr"], 3)
    elif row["recovery"] is not None:
        recovery = f"{100 * row['recovery']:.1f}%" + _spread(row["recovery_stderr"], 1, 100)
    else:
        recovery = "–"
    return [*cells, _figure(row["teacher"], row["teacher_stderr"]), recovery]


def _figure(value: float | None, deviation: float | None) -> str:
    if value is None:
        return "–"
    digits = 3 if abs(value) < 100 else 1
    return f"{value:.{digits}f}" + _spread(deviation, digits)


def _spread(deviation: float | None, digits: int, scale: float = 1) -> str:
    return "" if deviation is None else f" ± {scale * deviation:.{digits}f}"
