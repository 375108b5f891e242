"""Evaluation tasks by name: the bundled offline ones, the user's own, and all of lm-evaluation-harness."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import yaml

from supra_cli.core import hub
from supra_cli.core.errors import NotAuthorisedError, NotFoundError, SupraError, UsageError, first_line, near_miss


@dataclass(frozen=True)
class Tasks:
    """What `find` found, with its data: `leaves` are lm-eval Task objects by name, `groups` its Group objects."""

    asked: tuple[str, ...]
    leaves: dict[str, object]
    groups: dict[str, object]
    manager: object

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


def find(names: Sequence[str], include: Path | None = None) -> Tasks:
    """The tasks, groups and tags called `names`, their data sets loaded.

    NotFoundError: an unknown name, an `include` folder that is not there, data that is neither cached nor reachable.
    NotAuthorisedError: a gated data set. SupraError: a task definition that lm-eval cannot use.
    """
    if not names:
        raise UsageError(
            "no task was named; expected --tasks a,b with names of lm-evaluation-harness or of supra's own tasks"
        )
    if include is not None and not include.is_dir():
        raise NotFoundError(
            f"no folder '{include}' for --include-path; expected a folder of lm-eval task files (.yaml)"
        )
    manager = _manager(names, include)
    leaves, groups = {}, {}
    for name in dict.fromkeys(names):
        loaded = _load(manager, name, names)
        leaves |= loaded["tasks"]
        groups |= loaded.get("groups", {})
    return Tasks(tuple(dict.fromkeys(names)), leaves, groups, manager)


def _manager(names: Sequence[str], include: Path | None):
    """lm-eval's TaskManager over our folders and, of its own 14,000 files, those folders that define `names`.

    To parse them all takes from ten seconds to a minute, so it is done only for a name, or a group with a member,
    that no plain line `task: name` or `group: name` defines (a tag, say). NotFoundError for an unknown name.
    """
    from lm_eval.tasks import TaskManager

    own = [bundled(), *([include] if include else [])]
    manager = TaskManager(include_defaults=False, include_path=own)
    missing = {name for name in names if name not in manager.task_index}
    if not missing:
        return manager
    if include is not None:
        _check_files(include)
    shipped = _look_through(missing)
    known = [*manager.all_tasks, *shipped.names]
    for name in names:
        if name in missing - shipped.mentioned:
            raise _unknown(name, known)
    if shipped.folders.keys() == missing:
        folders = sorted(set(shipped.folders.values()))
        manager = TaskManager(include_defaults=False, include_path=[*folders, *own])
        if all(_is_whole(name, manager.task_index) for name in names):
            return manager
    manager = TaskManager(include_path=own)
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
    hint = near_miss(name, known)
    if hint.startswith("; known"):
        hint = "; no name is similar: `lm_eval ls tasks` lists them all, supra's own are stdlib_cloze and stdlib_ppl"
    return NotFoundError(f"unknown task '{name}'{hint}")


def _check_files(folder: Path) -> None:
    """lm-eval skips a task file that it cannot read without a word; a user who wrote one wants the word."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for path in sorted(folder.rglob("*.yaml")):
        try:
            load_yaml(path, resolve_func=False)
        except (yaml.YAMLError, ValueError, OSError) as error:
            raise SupraError(f"the task file {path} cannot be read: {' '.join(str(error).split())}") from error


def _load(manager, name: str, asked: Iterable[str]) -> dict:
    import datasets.exceptions
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    try:
        with nullcontext() if _is_bundled(manager.task_index[name]) else _without_waiting():
            return manager.load([name])
    except GatedRepoError as error:
        raise _gated(name) from error
    except (ConnectionError, TimeoutError, HfHubHTTPError, datasets.exceptions.DatasetNotFoundError) as error:
        if "gated" in str(error):
            raise _gated(name) from error
        raise NotFoundError(
            f"the data of task '{name}' is neither on this machine nor reachable ({first_line(error)}); "
            f"run `supra prefetch --tasks {','.join(asked)}` on a connected machine with the same Hugging Face cache"
        ) from error
    except ImportError as error:
        raise SupraError(f"task '{name}' needs a package that is not installed: {first_line(error)}") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise SupraError(f"lm-eval cannot load task '{name}': {type(error).__name__}: {first_line(error)}") from error


def _is_bundled(entry) -> bool:
    return entry.yaml_path is not None and entry.yaml_path.parent == bundled()


@contextmanager
def _without_waiting() -> Iterator[None]:
    """Where the hub takes no connection, its libraries are told so, instead of trying five times for half a minute."""
    import datasets
    import huggingface_hub

    with ExitStack() as stack:
        if hub.reach() != "reachable":
            stack.enter_context(mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True))
            stack.enter_context(mock.patch.object(datasets.config, "HF_HUB_OFFLINE", True))
        yield


def _gated(name: str) -> NotAuthorisedError:
    return NotAuthorisedError(
        f"the data of task '{name}' is gated: accept its terms on the hub, then run `hf auth login` or set HF_TOKEN"
    )
