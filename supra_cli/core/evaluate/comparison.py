"""A student's records beside its teacher's: what was recovered, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from supra_cli.core.evaluate.measures import ratio
from supra_cli.core.evaluate.scoring import PERPLEXITIES, ratio_stderr
from supra_cli.core.evaluate.tasks import Tasks

Records = dict[str, dict[str, Any]]


def compare(tasks: Tasks, student: Records, teacher: Records | None) -> dict[str, dict[str, dict[str, float | None]]]:
    """{task or group: {metric: {student, teacher, recovery, stderr, ...}}}; what does not apply is None.

    recovery = (s − chance) / (t − chance), for metrics whose chance is known and passed by the teacher; its standard
    error is that of the paired ratio, by the delta method: sd(s_i − r t_i − (1−r) c) / (√n (t − c)). difference = (Σ
    nats of the student − Σ nats of the teacher) / Σ tokens, for perplexities: nats per token of the student. A metric
    has lm-eval's name without the filter; a second filter of the same metric keeps it (`exact_match,flexible`).
    """
    student = with_groups(tasks, student)
    teacher = with_groups(tasks, teacher) if teacher is not None else {}
    results: dict[str, dict[str, dict[str, float | None]]] = {}
    for task, record in student.items():
        rows = results[task] = {}
        for key in record["metrics"]:
            metric, comma, _ = key.partition(",")
            absent = metric.isdigit() and record["metrics"][key] == -1  # RULER: no question of that length
            if comma and not absent and not metric.endswith("_stderr"):
                row = _row(key, record, teacher.get(task))
                rows[metric if metric not in rows else key] = row
    return results


def with_groups(tasks: Tasks, records: Records) -> Records:
    """`records` after one for each group that lm-eval aggregates (`mmlu`: the mean over its subjects, by size)."""
    groups: Records = {}
    for name, group in tasks.groups.items():
        leaves = [records[task.task_name] for task in group.get_all_tasks()]
        if not group.has_aggregation:
            continue
        metrics = group.aggregate({record["task"]: record["metrics"] for record in leaves})
        groups[name] = {
            "task": name,
            "samples": sum(record["samples"] for record in leaves),
            "num_fewshot": _common([record["num_fewshot"] for record in leaves]),
            "bos": _common([record["bos"] for record in leaves]),
            "cut": sum(record["cut"] for record in leaves),
            "outside": sum(record["outside"] for record in leaves),
            "metrics": {key: value for key, value in metrics.items() if isinstance(value, int | float)},
            **_pooled(group, leaves),
            "choices": None,
        }
    return groups | records


def letters(tasks: Tasks, subjects: Mapping[str, Records]) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """{task or group: {"A": {role: share of the questions in which it is picked}}}, and the share in which it is right,
    for tasks whose choices are letters; groups are the sums of their tasks. A model that answers by the letter and not
    by the question picks one of them far more often than it is right. Intervals are a bootstrap over questions.
    """
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for name in (*tasks.groups, *tasks.leaves):
        leaves = [task.task_name for task in tasks.groups[name].get_all_tasks()] if name in tasks.groups else [name]
        names = {_letters(tasks.leaves[leaf]) for leaf in leaves}
        if len(names) != 1 or None in names:
            continue
        counts = {role: [records[leaf]["choices"] for leaf in leaves] for role, records in subjects.items()}
        counted = {role: _sums(choices, "picked") for role, choices in counts.items()}
        counted["right"] = _sums(counts["student"], "right")
        for number, letter in enumerate(*names):
            shares = {role: _share(values[number], sum(values)) for role, values in counted.items() if sum(values)}
            found.setdefault(name, {})[letter] = shares
    return found


def _letters(task) -> tuple[str, ...] | None:
    choices = task.config.doc_to_choice
    single = isinstance(choices, list) and all(isinstance(text, str) and len(text.strip()) == 1 for text in choices)
    return tuple(text.strip() for text in choices) if single and task.OUTPUT_TYPE == "multiple_choice" else None


def _sums(choices: list[dict], which: str) -> list[int]:
    return [sum(counts) for counts in zip(*(choice[which] for choice in choices), strict=True)]


def _share(count: int, total: int) -> dict[str, float]:
    return ratio(torch.arange(total) < count)._asdict()


def _pooled(group, leaves: list[dict]) -> dict[str, dict]:
    """Chance and documents of a group, for the metrics that are a plain mean over all its questions."""
    chance, documents = {}, {}
    for metric in group.aggregate_metric_list:
        keys = [key for key in leaves[0]["chance"] if key.split(",")[0] == metric.metric]
        for key in keys:
            if not all(key in leaf["chance"] for leaf in leaves):
                continue
            weights = [leaf["samples"] if metric.weight_by_size else 1 for leaf in leaves]
            chance[key] = sum(w * leaf["chance"][key] for w, leaf in zip(weights, leaves, strict=True)) / sum(weights)
            if metric.weight_by_size:
                documents[key] = [value for leaf in leaves for value in leaf["documents"][key]]
    return {"chance": chance, "documents": documents}


def _row(key: str, student: dict, teacher: dict | None) -> dict[str, float | None]:
    metric, _, name = key.partition(",")
    deviation = f"{metric}_stderr,{name}"
    score, chance = student["metrics"][key], student["chance"].get(key)
    row = {
        "student": score,
        "teacher": None,
        "recovery": None,
        "stderr": student["metrics"].get(deviation),
        "teacher_stderr": None,
        "recovery_stderr": None,
        "chance": chance,
        "difference": None,
        "difference_stderr": None,
    }
    if teacher is None or key not in teacher["metrics"]:
        return row
    reference = teacher["metrics"][key]
    row |= {"teacher": reference, "teacher_stderr": teacher["metrics"].get(deviation)}
    if chance is not None and reference > chance:
        row["recovery"] = (score - chance) / (reference - chance)
        row["recovery_stderr"] = _recovery_stderr(key, student, teacher, row["recovery"])
    if metric in (*PERPLEXITIES, "nats_per_token") and "nats" in student["documents"]:
        row |= _difference(student["documents"], teacher["documents"])
    return row


def _recovery_stderr(key: str, student: dict, teacher: dict, recovery: float) -> float | None:
    ours, theirs = student["documents"].get(key, []), teacher["documents"].get(key, [])
    if len(ours) < 2 or len(ours) != len(theirs):
        return None
    chance = student["chance"][key]
    residuals = [s - recovery * t - (1 - recovery) * chance for s, t in zip(ours, theirs, strict=True)]
    return ratio_stderr(residuals, len(ours)) / (teacher["metrics"][key] - chance)


def _difference(student: dict, teacher: dict) -> dict[str, float | None]:
    gaps = [ours - theirs for ours, theirs in zip(student["nats"], teacher["nats"], strict=True)]
    tokens = student["tokens"]
    difference = math.fsum(gaps) / math.fsum(tokens)
    if len(gaps) < 2:
        return {"difference": difference, "difference_stderr": None}
    residuals = [gap - difference * count for gap, count in zip(gaps, tokens, strict=True)]
    return {"difference": difference, "difference_stderr": ratio_stderr(residuals, math.fsum(tokens))}


def _common(values: list) -> Any:
    """The one value of all, or None where they differ."""
    return values[0] if all(value == values[0] for value in values) else None
