"""How a score is written in a table of `supra eval`, in a run's report and on a model's card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def shots(count: int | None) -> str:
    """Examples in the prompt, of a group those of all its tasks."""
    return "mixed" if count is None else str(count)


def figure(value: float | None, deviation: float | None = None) -> str:
    """A score and its standard error."""
    if value is None:
        return "–"
    digits = 3 if abs(value) < 100 else 1
    return f"{value:,.{digits}f}" + _spread(deviation, digits)


def recovery(metric: str, row: Mapping[str, Any]) -> str:
    """What was recovered of the teacher or, of nats per token, how many the student has more."""
    if metric == "nats_per_token" and row["difference"] is not None:
        return f"{row['difference']:+.3f} nats" + _spread(row["difference_stderr"], 3)
    if row["recovery"] is not None:
        return f"{100 * row['recovery']:.1f}%" + _spread(row["recovery_stderr"], 1, 100)
    return "–"


def measured(measures: Mapping[str, Mapping[str, Mapping[str, Any]]], first: tuple[str, ...]) -> tuple[list, list]:
    """(roles, rows) of {measure: {label: {role: figure}}}: a row a figure, of measure, label, n and for each role the
    value with its 95 % interval; the roles of `first` come before the others.
    """
    found = [role for figures in measures.values() for figure in figures.values() for role in figure]
    roles = sorted(dict.fromkeys(found), key=lambda role: (*first, role).index(role))
    rows = [
        [name, label, next(iter(figure.values()))["n"], *(_interval(figure.get(role)) for role in roles)]
        for name, figures in measures.items()
        for label, figure in figures.items()
    ]
    return roles, rows


def _interval(figure: Mapping[str, float] | None) -> str:
    return "–" if figure is None else f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def _spread(deviation: float | None, digits: int, scale: float = 1) -> str:
    return "" if deviation is None else f" ± {scale * deviation:.{digits}f}"
