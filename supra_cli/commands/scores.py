"""How the scores of `supra eval` are shown: tables on stdout, and what a figure does not say as notes beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from supra_cli.commands import console


def show(document: Mapping[str, Any], tasks: Iterable[str]) -> None:
    """Tasks, with the teacher and the baselines beside the student, then measures, then how it was asked."""
    from supra_cli.core.evaluate import showing

    compared, roles = document["teacher"] is not None, list(document.get("baselines", ()))
    rows = [
        _cells(task, metric, row, document["tasks"][task], compared)
        + [showing.figure(*row["baselines"][role].values()) for role in roles]
        for task in tasks
        for metric, row in document["results"][task].items()
    ]
    header = ["task", "metric", "n-shot", "questions", "student" if compared else "score"]
    if rows:
        console.table(rows, [*header, *(["teacher", "recovery"] if compared else []), *roles])
    for shown in (document.get("measures"), document["letters"]):
        if shown:
            show_figures(shown, ("student", "teacher"))
    settings, student, took = document["settings"], document["student"], console.duration(document["seconds"])
    rows = f"{settings['batch_size']} rows a pass" + (" (auto)" if settings["batch_size_auto"] else "")
    begin = "a" if any(document["tasks"][task]["bos"] for task in tasks) else "no"
    asked = f", {settings['max_length']} tokens of context, {begin} begin token" if document["results"] else ""
    beside = [*document.get("baselines", {}).values(), *document.get("subjects", {}).values()]
    places = [subject["records"] for subject in (student, document["teacher"], *beside) if subject]
    kept = "not all was kept" if None in places else f"kept in {places[0]}"
    console.note(f"{rows}{asked}, {student['dtype']} on {student['device']}, {took}; {kept}")


def show_figures(measures: Mapping[str, Any], first: tuple[str, ...]) -> None:
    """A line a figure, a column a model, `first` before the others: the value and its 95 % interval."""
    from supra_cli.core.evaluate import showing

    roles, rows = showing.measured(measures, first)
    console.table(rows, ["measure", "of", "n", *(["score"] if roles == ["student"] else roles)])


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
    from supra_cli.core.evaluate import showing

    shots = showing.shots(how["num_fewshot"])
    cells = [task, metric, shots, str(how["samples"]), showing.figure(row["student"], row["stderr"])]
    if not compared:
        return cells
    return [*cells, showing.figure(row["teacher"], row["teacher_stderr"]), showing.recovery(metric, row)]
