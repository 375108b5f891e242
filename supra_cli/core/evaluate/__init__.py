"""Honest evaluation: lm-evaluation-harness with the teacher beside the student, and perplexity in nats."""

from __future__ import annotations

import gc
import logging
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from supra_cli.core import checkpoint
from supra_cli.core.evaluate.comparison import Records, compare, with_groups
from supra_cli.core.evaluate.nats import (
    Perplexity,
    Repeat,
    mean,
    next_tokens,
    perplexity,
    perplexity_by_position,
    surprise_of_repeats,
    token_nats,
)
from supra_cli.core.evaluate.scoring import Settings, language_model, score, task_key
from supra_cli.core.evaluate.store import Store, folder_of, model_key, weights_hash
from supra_cli.core.evaluate.tasks import Tasks, bundled, find

__all__ = [
    "Perplexity",
    "Repeat",
    "Settings",
    "Subject",
    "Tasks",
    "bundled",
    "compare",
    "context_length",
    "evaluate",
    "find",
    "language_model",
    "mean",
    "next_tokens",
    "perplexity",
    "perplexity_by_position",
    "score",
    "surprise_of_repeats",
    "token_nats",
    "weights_hash",
]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """A model to be judged, not loaded yet."""

    name: str
    """As the user calls it."""
    path: Path
    """Its directory."""
    load: Callable[[], tuple[Any, Any]]
    """() -> (model, tokenizer), called only when some task has to be scored."""
    device: str = "cpu"
    dtype: str = "float32"
    owned: bool = False
    """Written by supra and not part of a package or of the hub's cache, so that scores are kept beside it."""


def evaluate(
    student: Subject,
    teacher: Subject | None,
    tasks: Tasks,
    settings: Settings,
    *,
    fresh: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Score both on every task, one model in memory at a time, and compare.

    A task already scored for the same weights, settings, data and versions is not scored again, unless `fresh`; a run
    that was stopped goes on after its last finished task (each subject of a group like mmlu is one). Returns one JSON
    document: {"results": {task: {metric: {student, teacher, recovery, stderr, ...}}}, "tasks": {task: how it was
    asked}, "student", "teacher", "settings", "versions", "seconds"}; see `compare` for the figures.
    """
    start = time.monotonic()
    ours, about_student = _scores(student, tasks, settings, fresh, progress)
    theirs, about_teacher = (None, None) if teacher is None else _scores(teacher, tasks, settings, fresh, progress)
    results = compare(tasks, ours, theirs)
    document = {
        "results": results,
        "tasks": {name: _how(record) for name, record in with_groups(tasks, ours).items()},
        "student": about_student,
        "teacher": about_teacher,
        "settings": asdict(settings),
        "versions": versions(),
        "seconds": round(time.monotonic() - start, 1),
    }
    _note(Store(Path(about_student["records"])), document)
    return document


def context_length(path: Path, most: int = 4096) -> int:
    """Tokens of context of the model at `path`, as its base was trained: a recurrent student and its teacher are
    asked the same.
    """
    config = checkpoint.read_config(path)
    for name in ("max_position_embeddings", "n_positions"):
        if isinstance(length := getattr(config, name, None), int):
            return min(length, most)
    return most


def versions() -> dict[str, str]:
    names = ("supra", "torch", "transformers", "tokenizers", "lm_eval", "datasets")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


def _scores(subject: Subject, tasks: Tasks, settings: Settings, fresh: bool, progress: bool) -> tuple[Records, dict]:
    weights = weights_hash(subject.path)
    of_model = model_key(subject.path, weights, device=subject.device, dtype=subject.dtype)
    store = Store(folder_of(subject.path, weights, owned=subject.owned))
    keys = {name: {**of_model, **task_key(task, settings)} for name, task in tasks.leaves.items()}
    records = {} if fresh else {name: found for name in keys if (found := store.find(name, keys[name]))}
    if records:
        log.info("%s: already scored, taken from %s: %s", subject.name, store.folder, ", ".join(records))
    missing = [name for name in keys if name not in records]
    reused = list(records)
    if missing:
        lm = language_model(*subject.load(), settings)
        for number, name in enumerate(missing, 1):
            log.info("%s: %s (%d of %d)", subject.name, name, number, len(missing))
            begin = time.monotonic()
            record = score(lm, name, tasks, settings, progress=progress)
            records[name] = {**record, "seconds": round(time.monotonic() - begin, 1)}
            store.add(name, keys[name], {"model": subject.name, **records[name]})
        del lm
        gc.collect()
    return {name: records[name] for name in keys}, {
        "model": subject.name,
        "path": str(subject.path),
        "weights": f"sha256:{weights}",
        "device": subject.device,
        "dtype": subject.dtype,
        "records": str(store.folder),
        "reused": reused,
    }


def _how(record: dict[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in ("samples", "num_fewshot", "bos", "choices")}


def _note(store: Store, document: dict[str, Any]) -> None:
    for name, rows in document["results"].items():
        about = {part: document[part] for part in ("student", "teacher", "settings", "versions")}
        store.note(name, {"metrics": rows, **document["tasks"][name], **about})
