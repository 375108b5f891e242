"""Evaluation tasks by name: the bundled offline ones, the user's own, and all of lm-evaluation-harness."""

from __future__ import annotations

import io
import logging
import random
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import yaml

from supra_cli.core import connection
from supra_cli.core.errors import NotFoundError, SupraError, UsageError, near_miss
from supra_cli.core.evaluate import checks, telling
from supra_cli.core.evaluate.keys import definition
from supra_cli.core.evaluate.measures import measures

_DRAWS_ITSELF = "lm_eval.tasks.ruler.cwe_utils"


@dataclass(frozen=True)
class Tasks:
    """What `find` found, with its data: `leaves` are lm-eval Task objects by name, `groups` its Group objects."""

    asked: tuple[str, ...]
    leaves: dict[str, object]
    groups: dict[str, object]
    manager: object

    def file(self, name: str) -> Path | None:
        """The task file that defines `name`."""
        return _file(self.manager, name) if self.manager is not None else None

    @property
    def headline(self) -> list[str]:
        """What a table shows: a group that lm-eval aggregates, not its members, unless they were asked for."""
        whole = {name: group for name, group in self.groups.items() if group.has_aggregation}
        members = {task.task_name for group in whole.values() for task in group.get_all_tasks()}
        members |= {inner.name for group in whole.values() for inner in group.get_all_groups()}
        return [name for name in (*whole, *self.leaves) if name in self.asked or name not in members]


def bundled() -> Path:
    """The folder of the offline tasks; usable as lm-eval's own `--include_path`."""
    return Path(__file__).parents[2] / "assets" / "tasks"


def split_names(options: Iterable[str]) -> tuple[list[str], list[str]]:
    """The names of `-t a,b -t c`: (those of measures, those of lm-eval's tasks)."""
    found = dict.fromkeys(name.strip() for option in options for name in option.split(",") if name.strip())
    return [name for name in found if name in measures], [name for name in found if name not in measures]


def hush() -> None:
    """lm-eval and its libraries warn about what is meant to be; `--debug` lets them."""
    if not logging.getLogger("supra_cli").isEnabledFor(logging.DEBUG):
        for name in ("lm_eval", "huggingface_hub", "datasets", "transformers", "httpx"):
            logging.getLogger(name).setLevel(logging.ERROR)


def find(names: Sequence[str], include: Path | None = None, *, metadata: dict | None = None) -> Tasks:
    """The tasks, groups and tags called `names`, their data sets loaded, and each checked (`checks.check`).

    `metadata` is what tasks that make their own data are told, as lm-eval's RULER: {"tokenizer": folder,
    "max_seq_lengths": [512, 1024]}.

    NotFoundError: an unknown name, an `include` folder that is not there, data that is neither cached nor reachable.
    NotAuthorisedError: a gated data set. SupraError: a task that cannot be asked or would be asked something else.
    """
    if not names:
        raise UsageError(
            "no task was named; expected --tasks a,b with names of lm-evaluation-harness or of supra's own tasks"
        )
    if include is not None and not include.is_dir():
        raise NotFoundError(
            f"no folder '{include}' for --include-path; expected a folder of lm-eval task files (.yaml)"
        )
    if include is not None:
        _check_files(include, names)
    manager = _manager(names, include, metadata)
    leaves, groups = {}, {}
    for name in dict.fromkeys(names):
        loaded = _load(manager, name, names)
        for leaf, task in loaded["tasks"].items():
            if leaf in leaves and definition(leaves[leaf]) != definition(task):
                raise UsageError(
                    f"task '{leaf}' is asked for in two ways, alone and as a group redefines it; score them in two runs"
                )
        leaves |= loaded["tasks"]
        if metadata:
            for task in loaded["tasks"].values():
                _alternate(task, metadata["max_seq_lengths"])
        groups |= loaded.get("groups", {})
    for name, task in leaves.items():
        checks.check(name, task, _file(manager, name))
    return Tasks(tuple(dict.fromkeys(names)), leaves, groups, manager)


def _manager(names: Sequence[str], include: Path | None, metadata: dict | None = None):
    """lm-eval's TaskManager over our folders and, of its own 14,000 files, those folders that define `names`.

    To parse them all takes from ten seconds to a minute, so it is done only for a name, or a group with a member,
    that no plain line `task: name` or `group: name` defines (a tag, say). NotFoundError for an unknown name.
    """
    from lm_eval.tasks import TaskManager

    own = [bundled(), *([include] if include else [])]
    manager = TaskManager(include_defaults=False, include_path=own, metadata=metadata)
    missing = {name for name in names if name not in manager.task_index}
    if not missing:
        return manager
    shipped = _look_through(missing)
    known = [*manager.all_tasks, *shipped.names]
    for name in names:
        if name in missing - shipped.mentioned:
            raise _unknown(name, known)
    if shipped.folders.keys() == missing:
        folders = sorted(set(shipped.folders.values()))
        manager = TaskManager(include_defaults=False, include_path=[*folders, *own], metadata=metadata)
        if all(_is_whole(name, manager.task_index) for name in names):
            return manager
    manager = TaskManager(include_path=own, metadata=metadata)
    for name in names:
        if name not in manager.task_index:
            raise _unknown(name, manager.all_tasks)
    return manager


class Shipped(NamedTuple):
    """What the text of lm-eval's task files says about some names."""

    folders: dict[str, Path]
    """Top folder of the file with the line that defines a name."""
    mentioned: set[str]
    """Names that stand anywhere in any file: what does not can be no task, group or tag."""
    names: list[str]
    """All names that a line defines, for near misses."""


def _look_through(wanted: set[str]) -> Shipped:
    """Read the files without parsing them, which takes a second or two."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    definition = re.compile(r"""^["']?(?:task|group)["']?:[ \t]*["']?([^\s"']+)["']?[ \t]*$""", re.MULTILINE)
    shipped = Shipped({}, set(), [])
    for path in sorted(root.rglob("*.yaml")):
        text = path.read_text(encoding="utf-8", errors="replace")
        defined = definition.findall(text)
        shipped.names.extend(defined)
        shipped.mentioned.update(name for name in wanted if name in text)
        for name in wanted.intersection(defined):
            shipped.folders.setdefault(name, root / path.relative_to(root).parts[0])
    return shipped


def _is_whole(name: str, index: dict) -> bool:
    """Whether `name` and, if it is a group, all its members by name are in the index."""
    if name not in index:
        return False
    members = (index[name].cfg or {}).get("task")
    if not isinstance(members, list):
        return True
    return all(isinstance(member, str) and _is_whole(member, index) for member in members)


def _unknown(name: str, known: Iterable[str]) -> NotFoundError:
    hint = near_miss(name, [*known, *measures])
    if hint.startswith("; known"):
        hint = (
            "; no name is similar: `lm_eval ls tasks` lists them all, supra's own are "
            f"{', '.join([*sorted(_bundled_names()), *measures])}"
        )
    return NotFoundError(f"unknown task '{name}'{hint}")


def _check_files(folder: Path, names: Sequence[str]) -> None:
    """lm-eval leaves out without a word a task file that it cannot read, and all but one with the same name.

    A file that cannot be read is told if it mentions a name that is asked for, or no name can be found in any other.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    defined: dict[str, Path] = {}
    broken: dict[Path, Exception] = {}
    for path in sorted(folder.rglob("*.yaml")):
        try:
            config = load_yaml(path, resolve_func=False)
        except (yaml.YAMLError, ValueError, OSError) as error:
            broken[path] = error
            continue
        name = config.get("group", config.get("task")) if isinstance(config, dict) else None
        if isinstance(name, str) and name in names and name in defined:
            raise SupraError(f"two files define '{name}': {defined[name]} and {path}; rename one of them")
        if isinstance(name, str):
            defined[name] = path
    for path, error in broken.items():
        if set(names) - defined.keys() - set(_bundled_names()):
            raise SupraError(f"the task file {path} cannot be read: {' '.join(str(error).split())}") from error


def _bundled_names() -> list[str]:
    return [path.stem for path in bundled().glob("*.yaml")]


def _load(manager, name: str, asked: Sequence[str]) -> dict:
    entry = manager.task_index[name]
    if entry.kind.name == "TASK":
        _check_data(name, entry)
    local = entry.yaml_path is not None and entry.yaml_path.parent == bundled()
    reading = nullcontext() if local else _without_waiting()
    nowhere, of_ruler = io.StringIO(), _is_of_ruler(manager, name)
    # RULER prints, and its nltk tells stderr where there is no network, which those that fetch nothing do not need.
    quiet = redirect_stderr(nowhere) if of_ruler else nullcontext()
    fetched = tuple(other for other in asked if not _is_of_ruler(manager, other))
    told = telling.told(name, entry.yaml_path, fetched, of_ruler=of_ruler)
    with told, reading, redirect_stdout(nowhere), quiet, _seeded():
        return manager.load([name])


def _is_of_ruler(manager, name: str) -> bool:
    """Whether lm-eval's RULER defines `name`, or all that a tag of this name stands for."""
    entry = manager.task_index.get(name)
    if entry is None:
        return False
    if entry.yaml_path is None:
        return bool(entry.tags) and all(_is_of_ruler(manager, member) for member in entry.tags)
    return entry.yaml_path.parent.parts[-3:] == ("lm_eval", "tasks", "ruler")


def is_of_lengths(task) -> bool:
    """Whether the task has made documents of the lengths that were asked for, and says of each which."""
    return "max_length" in getattr(_made(task), "column_names", ())


def _made(task):
    return task.dataset.get(task.config.test_split) if isinstance(getattr(task, "dataset", None), dict) else None


def _alternate(task, lengths: Sequence[int]) -> None:
    """Put a question of each length in turn, where a task has made as many of each, one length after the other: any
    `--limit` then asks all lengths alike.
    """
    if is_of_lengths(task):
        documents, split = _made(task), task.config.test_split
        of = {length: [n for n, found in enumerate(documents["max_length"]) if found == length] for length in lengths}
        order = [number for numbers in zip(*of.values(), strict=False) for number in numbers]
        task.dataset[split] = documents.select(order)


def _check_data(name: str, entry) -> None:
    """Where the data lie is looked at first: lm-eval answers a file that is not there with a search of the hub."""
    config = entry.cfg or {}
    where = f"task '{name}' ({entry.yaml_path})"
    if not config.get("dataset_path") and not config.get("custom_dataset"):
        raise SupraError(f"{where} has no dataset_path; expected a data set of the hub, or json with data_files")
    if config.get("dataset_path") in ("json", "csv", "parquet", "text", "arrow"):
        files = (config.get("dataset_kwargs") or {}).get("data_files")
        for path in _flat(files):
            if "://" not in path and not any(mark in path for mark in "*?[") and not Path(path).exists():
                raise NotFoundError(f"{where}: dataset_kwargs names the file {path}, which is not there")


def _flat(value) -> list[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [path for item in value for path in _flat(item)]
    return [value] if isinstance(value, str) else []


def _file(manager, name: str) -> Path | None:
    entry = manager.task_index.get(name)
    return entry.yaml_path if entry is not None else None


@contextmanager
def _seeded() -> Iterator[None]:
    """The seeds that lm-eval's command line sets, there once before it loads all tasks, here before each makes data:
    RULER draws its questions from them, and they are to be the same when they are asked again, whatever is asked or
    imported before them. Nothing of it is left to the caller.
    """
    import numpy as np
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    before, others_before, download = random.getstate(), np.random.get_state(), ConfigurableTask.download

    def seed() -> None:
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)

    def seeded(task, *given, **named):
        seed()  # again, as a package that its Python imports may draw the first time
        return download(task, *given, **named)

    # ruler_cwe draws from a generator that its module makes when it is imported, too.
    sys.modules.pop(_DRAWS_ITSELF, None)
    seed()
    ConfigurableTask.download = seeded
    try:
        yield
    finally:
        ConfigurableTask.download = download
        random.setstate(before)
        np.random.set_state(others_before)


@contextmanager
def _without_waiting() -> Iterator[None]:
    """Where the hub takes no connection, its libraries are told so, instead of trying five times for half a minute.

    They read the environment once, when they are imported; what they ask afterwards is these two.
    """
    import datasets
    import huggingface_hub.constants

    if connection.reach() == "reachable":
        yield
        return
    places = (huggingface_hub.constants, datasets.config)
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value
