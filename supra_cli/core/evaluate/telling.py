"""What lm-eval, a task's data or its Python raises, as one sentence that names the task file and the field."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from supra_cli.core.errors import NotAuthorisedError, NotFoundError, SupraError, UsageError, first_line, near_miss

TEMPLATES = ("doc_to_text", "doc_to_target", "doc_to_choice")
NO_CHOICE = "doc_to_target is no choice in the documents tried; expected the number of a choice, from 0, or its text"

# A method of lm-eval's tasks → the field of a task file that it reads.
_FIELDS = {
    **{name: name for name in (*TEMPLATES, "process_results", "process_docs")},
    "doc_to_prefix": "gen_prefix",
    "resolve_field": "description or gen_prefix",
    "download": "dataset_path or dataset_kwargs",
    "training_docs": "training_split",
    "validation_docs": "validation_split",
    "test_docs": "test_split",
    "fewshot_docs": "fewshot_split or fewshot_config",
    "fewshot_context": "num_fewshot",
    "get_filter": "filter_list",
    "build_filter_ensemble": "filter_list",
    "apply_filters": "filter_list",
    "get_metric": "metric_list",
    "_model_generate": "generation_kwargs",
    "_compute_task_aggregations": "metric_list",
}


@contextmanager
def told(
    name: str, path: Path | None, others: tuple[str, ...] = (), *, of_ruler: bool = False, model: Any = None
) -> Iterator[None]:
    """What lm-eval, the data's library or the task's own Python raises, as a SupraError.

    `others` are the names to prefetch with it. A task `of_ruler` makes its prompts as it is loaded, from data that it
    then fetches itself, so there is nothing to prefetch. NotAuthorisedError and NotFoundError for data; errors from
    inside the forward pass of `model`, a `harness.Model`, are not the task's and go through.
    """
    import datasets.exceptions
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    try:
        yield
    except (SupraError, MemoryError):
        raise
    except Exception as error:  # the one place where another's Python runs: it may raise what it likes
        out_of_memory = isinstance(error, RuntimeError) and "memory" in str(error)
        if out_of_memory or (model is not None and model.is_computing):
            raise
        if isinstance(error, GatedRepoError) or (isinstance(error, OSError) and "gated" in str(error)):
            raise NotAuthorisedError(
                f"the data of task '{name}' is gated: accept its terms on the hub, then run `hf auth login` or set "
                "HF_TOKEN"
            ) from error
        asking = f"`supra eval MODEL --tasks {name} --lengths 512,1024`"
        offline = (ConnectionError, TimeoutError, HfHubHTTPError, datasets.exceptions.DatasetNotFoundError)
        if isinstance(error, offline + _of_requests()):
            if of_ruler:
                way_out = f"it is fetched as the prompts are made: run {asking} on a connected machine"
            else:
                prefetch = f"`supra prefetch --tasks {','.join(others or (name,))}`"
                way_out = f"run {prefetch} on a connected machine with the same Hugging Face cache"
            raise NotFoundError(
                f"the data of task '{name}' is neither on this machine nor reachable ({_unreached(error)}); {way_out}"
            ) from error
        if isinstance(error, ImportError) and of_ruler:
            raise SupraError(
                f"task '{name}' is of RULER, whose packages are not installed; `pip install '.[ruler]'` in a clone of "
                "supra brings them"
            ) from error
        if isinstance(error, AssertionError) and of_ruler and "tokenizer" in str(error):
            raise UsageError(
                f"task '{name}' makes its prompts for a model's tokenizer, of the lengths that are asked for: "
                f"{asking}, with nothing to prefetch"
            ) from error
        if isinstance(error, ImportError) and _python_line(error) is None:
            raise SupraError(
                f"{where(name, path)} needs a package that is not installed: {first_line(error)}"
            ) from error
        kind = NotFoundError if isinstance(error, FileNotFoundError) else SupraError
        raise kind(f"{where(name, path)}: {_sentence(error)}") from error


def _of_requests() -> tuple[type[Exception], ...]:
    """What `requests` raises where nobody answers: no ConnectionError of Python's. Who raises it has imported it."""
    requests = sys.modules.get("requests")
    return () if requests is None else (requests.exceptions.ConnectionError, requests.exceptions.Timeout)


def _unreached(error: Exception) -> str:
    """The host that did not answer, in place of the pool of connections that requests tells of; else what was said."""
    asked = getattr(error, "request", None) if isinstance(error, _of_requests()) else None
    host = urlsplit(asked.url).hostname if asked is not None else None
    return f"{host} does not answer" if host else first_line(error)


def where(name: str, path: Path | None) -> str:
    return f"task '{name}' ({path})" if path else f"task '{name}'"


def _sentence(error: Exception) -> str:
    """Field, cause and, where the task's own Python raised, its line."""
    import datasets.exceptions
    import jinja2

    field, task = _frame(error)
    if isinstance(error, datasets.exceptions.DatasetsError) and error.__cause__ is not None:
        error = error.__cause__  # theirs says only that "an error occurred while generating the dataset"
    begin = f"{field}: " if field else ""
    columns = list(getattr(task, "features", ()) or ())
    if isinstance(error, jinja2.UndefinedError) and (name := re.match(r"'(\w+)' is undefined", str(error))):
        return f"{begin}the documents have no '{name[1]}'{near_miss(name[1], columns)}"
    if line := _python_line(error):
        return f"{begin}{line} raised {type(error).__name__}: {first_line(error)}"
    if isinstance(error, TypeError) and (name := re.search(r"unexpected keyword argument '(\w+)'", str(error))):
        return f"there is no field '{name[1]}'{near_miss(name[1], _known_fields())}"
    if field in TEMPLATES and isinstance(error, TypeError) and not str(error):
        return f"{field} is missing, or neither text, list nor function"
    if isinstance(error, StopIteration) and field == _FIELDS["download"]:
        return f"{begin}there is not one document in the data"
    if isinstance(error, IndexError) and field is None:  # lm-eval tries the choices of the first document
        return "doc_to_choice: a choice has no text" if "string index" in str(error) else NO_CHOICE
    if isinstance(error, KeyError) and error.args == (None,) and (metric := _metric(error)) is not None:
        return _no_aggregation(metric, task)
    if isinstance(error, KeyError) and field == "filter_list":
        return f"{begin}{str(error.args[0]).splitlines()[0]}"
    if isinstance(error, KeyError):
        known = list(task.dataset) if field and field.endswith("_split") and hasattr(task, "dataset") else columns
        return f"{begin}there is no {error}{near_miss(str(error.args[0]) if error.args else '', map(str, known))}"
    return f"{begin}{first_line(error)} ({type(error).__name__})" if str(error) else f"{begin}{type(error).__name__}"


def _frame(error: BaseException) -> tuple[str | None, Any]:
    """(the field, the task) of the deepest frame inside lm-eval that reads a field."""
    from lm_eval.api.task import Task

    field = task = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if "lm_eval" in frame.f_code.co_filename and frame.f_code.co_name in _FIELDS:
            field = _FIELDS[frame.f_code.co_name]
        if isinstance(owner := frame.f_locals.get("self"), Task):
            task = owner
    return field, task


def _metric(error: BaseException) -> str | None:
    """The metric of metric_list at which lm-eval broke off while it made a task."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if "lm_eval" in frame.f_code.co_filename]
    return frames[-1].f_locals.get("metric_name") if frames else None


def _no_aggregation(metric: str, task) -> str:
    """lm-eval then looks up the name of its own aggregation for the metric, which may be none."""
    if task.config.process_results is None and task._metric_fn_list.get(metric) is None:
        return unknown_metric(metric)
    return (
        f"metric_list names no aggregation for '{metric}', and lm-eval has none of its own for it; add one, such as "
        "`aggregation: mean`"
    )


def unknown_metric(metric: str) -> str:
    from lm_eval.api.registry import metric_registry

    return f"metric_list names the metric '{metric}', which lm-eval does not know{near_miss(metric, metric_registry)}"


def _python_line(error: BaseException) -> str | None:
    """`file.py, line 7` of the deepest frame in Python that is neither installed nor ours."""
    ours = str(Path(__file__).parents[2])
    lines = [
        f"{Path(frame.f_code.co_filename).name}, line {number},"
        for frame, number in traceback.walk_tb(error.__traceback__)
        if not re.search(r"[/\\](site|dist)-packages[/\\]|^<|[/\\]lib[/\\]python3", frame.f_code.co_filename)
        and not frame.f_code.co_filename.startswith(ours)
        and frame.f_code.co_filename.endswith(".py")
    ]
    return lines[-1] if lines else None


def _known_fields() -> list[str]:
    from dataclasses import fields

    from lm_eval.config.task import TaskConfig

    return [field.name for field in fields(TaskConfig)]
