"""The verb: a model and its teacher on every task, one in memory at a time, nothing scored twice."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from supra_cli.core import checkpoint
from supra_cli.core.data.tokenizer import check_chat_template
from supra_cli.core.environment import versions
from supra_cli.core.errors import UsageError
from supra_cli.core.evaluate import checks, keys
from supra_cli.core.evaluate.comparison import Records, compare, letters, with_groups
from supra_cli.core.evaluate.scoring import Settings, language_model, score, shots
from supra_cli.core.evaluate.store import Store, folder_of
from supra_cli.core.evaluate.tasks import Tasks
from supra_cli.core.files import dumps, finite

log = logging.getLogger(__name__)

Progress = Callable[[str, str, int, int], None]
"""Called with model, what is being done, requests answered and requests in all (0 and 0 where nothing is counted)."""


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
    changes: dict[str, Any] = field(default_factory=dict)
    """What `load` makes of the model at `path`, where that is another one: a part of the key of its scores."""


def evaluate(
    student: Subject,
    teacher: Subject | None,
    tasks: Tasks,
    settings: Settings,
    *,
    baselines: Mapping[str, Subject] | None = None,
    fresh: bool = False,
    progress: Progress = lambda model, what, done, total: None,
) -> dict[str, Any]:
    """Score both on every task, one model in memory at a time, and compare.

    A task already scored for the same weights, settings, data and versions (`keys`) is not scored again, unless
    `fresh`; a run that was stopped goes on after its last finished task (each subject of a group like mmlu is one).
    Returns one JSON document: {"results": {task: {metric: {student, teacher, recovery, stderr, ...}}}, "tasks": {task:
    how it was asked}, "student", "teacher", "settings", "versions", "seconds"}; see `compare` for the figures.
    UsageError where a task, or a model, cannot be asked with these settings.
    """
    start = time.monotonic()
    for subject in (student, teacher):
        if subject is not None:
            _check_model(subject, settings)
    examples = {name: shots(task, settings) for name, task in tasks.leaves.items()}
    for name, task in tasks.leaves.items():
        checks.check_settings(name, task, tasks.file(name), examples[name], settings.max_length)
    asked = {name: keys.task_key(task, settings, examples[name]) for name, task in tasks.leaves.items()}
    ours, about_student, store = _scores(student, tasks, settings, asked, fresh, progress)
    theirs, about_teacher = None, None
    if teacher is not None:
        theirs, about_teacher, _ = _scores(teacher, tasks, settings, asked, fresh, progress)
    results, others, scored = compare(tasks, ours, theirs), {}, {}
    for role, subject in (baselines or {}).items():
        scored[role], others[role], _ = _scores(subject, tasks, settings, asked, fresh, progress)
        for task, rows in compare(tasks, scored[role], None).items():
            for metric, row in rows.items():
                beside = results[task][metric].setdefault("baselines", {})
                beside[role] = {"score": row["student"], "stderr": row["stderr"]}
    document = finite(
        {
            "results": results,
            "letters": letters(tasks, {"student": ours, **({"teacher": theirs} if theirs else {}), **scored}),
            "tasks": {name: _how(record) for name, record in with_groups(tasks, ours).items()},
            "student": about_student,
            "teacher": about_teacher,
            **({"baselines": others} if others else {}),
            "settings": asdict(settings),
            "versions": versions("lm_eval", "datasets"),
            "seconds": round(time.monotonic() - start, 1),
        }
    )
    _note(store, document, tasks, asked)
    document["student"]["records"] = store.place
    return document


def context_length(student: Subject, teacher: Subject | None, most: int = 4096) -> int:
    """Tokens of context as the student's base was trained, where both have positions for so many: a recurrent student
    and its teacher are asked the same.
    """
    config = checkpoint.read_config(student.path)
    trained = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    return min(length for length in (*trained, positions(student, teacher), most) if isinstance(length, int))


def positions(*subjects: Subject | None) -> int | None:
    """How many positions all of `subjects` have, None where there is no end."""
    limits = (checkpoint.read_config(subject.path).limit() for subject in subjects if subject is not None)
    return min(filter(None, limits), default=None)


def _check_model(subject: Subject, settings: Settings) -> None:
    limit = positions(subject)
    if limit is not None and settings.max_length > limit:
        raise UsageError(
            f"--max-length is {settings.max_length} and {subject.name} has {limit} positions; give at most that"
        )
    if settings.apply_chat_template:
        check_chat_template(checkpoint.load_tokenizer(subject.path))


def _scores(
    subject: Subject, tasks: Tasks, settings: Settings, asked: dict[str, dict], fresh: bool, progress: Progress
) -> tuple[Records, dict, Store]:
    weights, of_model, store = known(subject, progress)
    key = {name: {**of_model, **of_task} for name, of_task in asked.items()}
    records = {} if fresh else {name: record for name in key if (record := store.find(name, key[name]))}
    if records:
        log.info("%s: already scored, taken from %s: %s", subject.name, store.folder, ", ".join(records))
    missing = [name for name in key if name not in records]
    reused = list(records)
    if missing:
        progress(subject.name, "loading", 0, 0)
        lm = language_model(*subject.load(), settings)
        for number, name in enumerate(missing, 1):
            begin = time.monotonic()

            def count(done: int, total: int, name: str = name) -> None:
                progress(subject.name, name, done, total)

            count(0, 0)
            log.info("%s: %s (%d of %d)", subject.name, name, number, len(missing))
            record = score(lm, name, tasks, settings, progress=count)
            records[name] = finite({**record, "seconds": round(time.monotonic() - begin, 1)})
            store.add(name, key[name], {"model": subject.name, **records[name]})
        del lm
        gc.collect()
    return {name: records[name] for name in key}, about(subject, weights, store, reused), store


def known(subject: Subject, progress: Progress) -> tuple[str, dict[str, Any], Store]:
    """(hash of the weights, the model's part of the key of a score, where its scores are kept)."""
    progress(subject.name, "reading the weights' hash", 0, 0)
    weights = checkpoint.identity(subject.path)
    of_model = keys.model_key(subject.path, weights, device=subject.device, dtype=subject.dtype)
    if subject.changes:
        of_model["changes"] = subject.changes
    return weights, of_model, Store(folder_of(subject.path, weights, owned=subject.owned))


def about(subject: Subject, weights: str, store: Store, reused: list[str]) -> dict[str, Any]:
    return {
        "model": subject.name,
        "path": str(subject.path),
        "weights": f"sha256:{weights}",
        "device": subject.device,
        "dtype": subject.dtype,
        "records": store.place,
        "reused": reused,
        **({"changes": subject.changes} if subject.changes else {}),
    }


def _how(record: dict[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in ("samples", "num_fewshot", "bos", "cut", "outside", "choices")}


def _note(store: Store, document: dict[str, Any], tasks: Tasks, asked: dict[str, dict]) -> None:
    """Leave each comparison beside the student's records, with the hash of what was asked: only figures of the same
    questions can stand in one row of a report.
    """
    for name, rows in document["results"].items():
        leaves = [name] if name in asked else [task.task_name for task in tasks.groups[name].get_all_tasks()]
        about = {part: document[part] for part in ("student", "teacher", "settings", "versions")}
        questions = keys.digest(dumps([asked[leaf] for leaf in leaves], sort_keys=True))
        what = {"metrics": rows, "letters": document["letters"].get(name, {}), **document["tasks"][name]}
        store.note(name, document["student"]["weights"], {**what, "questions": questions, **about})
