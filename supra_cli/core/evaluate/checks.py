"""What a task, its data and its Python can say wrong: one sentence that names the task file and the field.

lm-eval takes a word that is no column as the text itself, a null as the text "None", an unknown metric as none at all,
and shows what is raised inside it as it came. `check` asks all this of a few documents before any weights are read;
`telling.told` words what only the rest of the documents, or a model's answers, bring out.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from supra_cli.core.errors import SupraError, UsageError, near_miss
from supra_cli.core.evaluate.telling import NO_CHOICE, TEMPLATES, told, unknown_metric, where

_WORD = re.compile(r"[A-Za-z_]\w*")
_DOCUMENTS_TRIED = 8


def check(name: str, task, path: Path | None) -> None:
    """SupraError for a loaded task that cannot give a score, or would give another one than it says.

    Looks at the fields, and asks a few documents as scoring will, with an answer made up for the first one.
    """
    with told(name, path):
        documents = task.eval_docs
        if len(documents) == 0:
            raise SupraError(f"{where(name, path)}: there is not one document to ask in its data")
        if getattr(task, "UNSAFE_CODE", False):
            raise SupraError(f"{where(name, path)} runs code that a model writes, which supra does not do")
        if getattr(task, "MULTIMODAL", False):
            raise SupraError(f"{where(name, path)} shows images or sound; supra's models read text alone")
        if hasattr(task, "features"):  # else a task in Python, without fields
            _check_fields(name, task, path)
            _check_metrics(name, task, path)
            _check_nulls(name, task, path)
            _check_generation(name, task, path)
        _rehearse(name, task, path)


def check_settings(name: str, task, path: Path | None, shots: int, max_length: int) -> None:
    """UsageError for a number of examples, or a length of context, that this task cannot have."""
    if shots:
        with told(name, path):
            pool, asked = len(list(task.fewshot_docs() or ())), _draws_from_what_is_asked(task)
        if pool < shots + asked:
            raise UsageError(
                f"{where(name, path)} has {pool} documents to draw examples from, too few for {shots} examples"
                f"{' and a question' if asked else ''}; give a smaller --num-fewshot"
            )
    if task.OUTPUT_TYPE == "generate_until":
        from lm_eval.models.utils import normalize_gen_kwargs

        wanted = normalize_gen_kwargs(task.config.generation_kwargs or {})["max_gen_toks"]
        if wanted >= max_length:
            raise UsageError(
                f"{where(name, path)} generates up to {wanted} tokens, which leaves no room for a prompt in "
                f"{max_length} tokens of context; give a larger --max-length"
            )


def _draws_from_what_is_asked(task) -> bool:
    """Whether examples come from the documents that are asked: lm-eval then draws one more, to leave out the question.

    So it does where the two splits have one name; where no split, sample or other document is named, they are the same.
    """
    examples = getattr(task, "fewshot_cfg", None)
    if examples is None or examples.split == task.config.test_split:
        return True
    return not (examples.split or examples.samples or task.has_training_docs() or task.has_validation_docs())


def _check_fields(name: str, task, path: Path | None) -> None:
    for field in TEMPLATES:
        value = getattr(task.config, field)
        if isinstance(value, str) and _WORD.fullmatch(value) and value not in task.features:
            raise SupraError(
                f"{where(name, path)}: {field} names '{value}', which the documents do not have"
                f"{near_miss(value, task.features)}"
            )


def _check_metrics(name: str, task, path: Path | None) -> None:
    """lm-eval keeps None for a metric or an aggregation that it does not know."""
    from lm_eval.api.registry import aggregation_registry

    if task.config.process_results is None:
        for metric, function in task._metric_fn_list.items():
            if function is None:
                raise SupraError(f"{where(name, path)}: {unknown_metric(metric)}")
    for metric, function in task._aggregation_list.items():
        if function is None:
            entry = next(entry for entry in task.config.metric_list if entry["metric"] == metric)
            wrong = str(entry.get("aggregation", "none"))
            raise SupraError(
                f"{where(name, path)}: metric_list has the aggregation '{wrong}' for '{metric}', which lm-eval does "
                f"not know{near_miss(wrong, aggregation_registry)}"
            )


def _check_nulls(name: str, task, path: Path | None) -> None:
    """A field that some documents lack is read as null, and written into a prompt as "None"."""
    from datasets import Dataset
    from jinja2 import meta
    from lm_eval.utils import env

    documents = task.eval_docs
    if not isinstance(documents, Dataset):
        return
    partly = {column for column in documents.column_names if documents.data.column(column).null_count}
    if not partly:
        return
    strict = env.overlay(finalize=_no_null)
    for field in TEMPLATES:
        value = getattr(task.config, field)
        if not isinstance(value, str):
            continue
        names = {value} if value in task.features else meta.find_undeclared_variables(env.parse(value))
        template = None if value in task.features else strict.from_string(value)
        if not names & partly:
            continue
        for number, document in enumerate(documents):
            missing = next((column for column in names & partly if document[column] is None), None)
            if missing is None:
                continue
            try:
                _no_null(document[missing] if template is None else template.render(**document))
            except _NullError:
                raise SupraError(
                    f"{where(name, path)}: {field} asks for '{missing}', which document {number} does not have (it is "
                    "null); give it one, or leave the document out"
                ) from None


def _check_generation(name: str, task, path: Path | None) -> None:
    """transformers refuses an unknown option too, but only after the weights were loaded."""
    from lm_eval.models.utils import normalize_gen_kwargs
    from transformers import GenerationConfig

    if task.OUTPUT_TYPE != "generate_until":
        return
    known = {*vars(GenerationConfig()), "until", "max_gen_toks"}
    for option in normalize_gen_kwargs(task.config.generation_kwargs or {}):
        if option not in known:
            raise SupraError(
                f"{where(name, path)}: generation_kwargs has '{option}', which transformers does not know"
                f"{near_miss(option, known)}"
            )


class _NullError(Exception):
    pass


def _no_null(value: Any) -> Any:
    if value is None:
        raise _NullError
    return value


def _rehearse(name: str, task, path: Path | None) -> None:
    """Ask some documents from the first to the last as scoring does, and take the first one's answer for granted."""
    documents = task.eval_docs
    count = len(documents)
    task.set_fewshot_seed(0)
    outside = tried = 0
    for index in sorted({step * (count - 1) // max(1, _DOCUMENTS_TRIED - 1) for step in range(_DOCUMENTS_TRIED)}):
        document = documents[index]
        shots = task.config.num_fewshot or 0
        context = task.fewshot_context(document, num_fewshot=shots, gen_prefix=task.doc_to_prefix(document))
        requests = task.construct_requests(doc=document, ctx=context, metadata=(name, index, task.config.repeats))
        requests = requests if isinstance(requests, list) else [requests]
        for request in requests:
            if request.request_type.startswith("loglikelihood") and request.args[-1] == "":
                raise SupraError(f"{where(name, path)}: document {index} has an empty text to score")
        if task.OUTPUT_TYPE == "multiple_choice":
            tried += 1
            outside += is_outside(task, document)
        if index == 0:
            _take(name, task, path, document, requests)
    if tried and outside == tried:
        raise SupraError(f"{where(name, path)}: {NO_CHOICE}")


def is_outside(task, document) -> bool:
    """Whether the right answer is none of the choices: lm-eval counts such a question as wrong."""
    return None in right_answers(task, document)


def right_answers(task, document) -> set[int | None]:
    """The numbers of the right answers, from 0, whether the task tells numbers or texts; None stands for what is none
    of the choices. Of a task in Python without fields they are not known.
    """
    if not hasattr(task, "features"):
        return set()
    choices = task.doc_to_choice(document)
    target = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    numbers = [
        choices.index(answer) if answer in choices else answer
        for answer in (target if isinstance(target, list) else [target])
    ]
    return {number if isinstance(number, int) and 0 <= number < len(choices) else None for number in numbers}


def _take(name: str, task, path: Path | None, document, requests: list) -> None:
    """Score an answer made up: the target where a text is wanted. A metric that does not come out is told."""
    target = task.doc_to_target(document) if task.OUTPUT_TYPE == "generate_until" else None
    made_up = {
        "loglikelihood_rolling": -1.0,
        "generate_until": str(target[0] if isinstance(target, list) and target else target),
    }
    for request in requests:
        request.resps = [made_up.get(request.request_type, (-1.0, False))]
    metrics: set[str] = set()
    for ensemble in task._filters:
        ensemble.apply(requests)
        metrics |= task.process_results(
            document, [request.filtered_resps[ensemble.name] for request in requests]
        ).keys()
    if not hasattr(task, "features") or task.config.process_results is not None:
        return
    if task.OUTPUT_TYPE != "generate_until" and (
        missing := [key for key in task._metric_fn_list if key not in metrics]
    ):
        raise SupraError(
            f"{where(name, path)}: the metric '{missing[0]}' of metric_list is not one that output_type "
            f"{task.OUTPUT_TYPE} gives; it would be left out"
        )
