"""One model on one task through lm-evaluation-harness: a record that says everything the score depends on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any
from unittest import mock

FORMAT = 1
PERPLEXITIES = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")

# lm-eval's accuracies over choices: the ones that guessing scores above zero.
_CHOSEN = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")
# Scores of a text or of a yes/no that an answer without knowledge has at zero.
_FROM_ZERO = ("acc", "exact_match", "mcc", "em", "pass@1", "bleu", "rouge1", "rouge2", "rougeL", "contains")


@dataclass(frozen=True)
class Settings:
    """What a score depends on beside model and task."""

    limit: int | None = None
    """Questions a task; None is all."""
    num_fewshot: int | None = None
    """Examples in the prompt; None is the task's own number, and a task that fixes zero keeps zero."""
    batch_size: int = 8
    """Rows a forward pass."""
    max_length: int = 2048
    """Tokens of context; longer prompts lose their beginning, longer texts are cut into windows."""
    seed: int = 1234
    """Chooses the examples in the prompt."""


def language_model(model, tokenizer, settings: Settings):
    """lm-eval's wrapper around a live model."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=settings.batch_size,
        max_length=settings.max_length,
    )


def task_key(task, settings: Settings) -> dict[str, Any]:
    """What must be equal for a score of this task to be used again, the model aside: settings, task definition, its
    data and the version of lm-eval. Device, dtype and weights are the model's part."""
    config = json.dumps(task.dump_config(), sort_keys=True, default=str)
    count = len(task.eval_docs) if settings.limit is None else min(settings.limit, len(task.eval_docs))
    data = json.dumps([task.eval_docs[index] for index in range(count)], sort_keys=True, default=str)
    return {
        "format": FORMAT,
        **asdict(settings),
        "task_version": str(task.VERSION),
        "task_config": _digest(_without_shots(config)),
        "task_data": _digest(data),
        "lm_eval": metadata.version("lm_eval"),
    }


def score(lm, name: str, tasks, settings: Settings, *, progress: bool = False) -> dict[str, Any]:
    """The record of one leaf task for the model inside `lm`, as JSON types.

    metrics    {"acc,none": 0.5, "acc_stderr,none": 0.02, ...} and `sample_len`, as lm-eval names them; perplexity
    tasks also
               have `nats_per_token` (the model's own tokens, the begin token that lm-eval predicts included)
    chance     {metric: expected score without knowledge}, where that is known
    documents  {metric: one value a question}, for paired comparisons
    choices    how often each answer was picked and right, first answer first (multiple choice)
    num_fewshot (the effective one), bos (whether a begin token opens the prompt), samples (questions asked)
    """
    from lm_eval import evaluator

    with _quietly(progress and tasks.leaves[name].OUTPUT_TYPE != "loglikelihood_rolling"), _unasked(evaluator):
        answer = evaluator.simple_evaluate(
            model=lm,
            tasks=[tasks.leaves[name]],
            task_manager=tasks.manager,
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            fewshot_random_seed=settings.seed,
        )
    samples, config = answer["samples"][name], answer["configs"][name]
    metrics = {key: value for key, value in answer["results"][name].items() if _is_number(value)}
    first_filter = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    documents = _documents(samples)
    choices = None
    match config.get("output_type"):
        case "multiple_choice":
            choices = _choices(first_filter)
        case "loglikelihood_rolling" | "loglikelihood":
            documents |= _likelihoods(first_filter, lm)
            metrics |= _nats_per_token(documents, samples[0]["filter"])
    return {
        "task": name,
        "samples": len(first_filter),
        "num_fewshot": answer["n-shot"][name],
        "bos": lm.tok_encode("a")[:1] == [lm.tokenizer.bos_token_id],
        "metrics": metrics,
        "chance": _chance(config, documents, first_filter),
        "documents": documents,
        "choices": choices,
    }


def _documents(samples: list[dict]) -> dict[str, list[float]]:
    """{"acc,none": one value a question} for the metrics whose score is the mean of such values."""
    documents: dict[str, list[float]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            documents.setdefault(f"{metric},{sample['filter']}", []).append(sample[metric])
    return {
        metric: [float(value) for value in values]
        for metric, values in documents.items()
        if all(_is_number(value) for value in values) and metric.split(",")[0] not in PERPLEXITIES
    }


def _likelihoods(samples: list[dict], lm) -> dict[str, list[float]]:
    """Nats and tokens of each question's text, or of its answer where there is a context."""
    nats, tokens = [], []
    for sample in samples:
        *context, text = sample["arguments"][0]
        answer = sample["filtered_resps"][0]
        nats.append(-float(answer[0] if context else answer))
        tokens.append(len(lm._encode_pair(context[0], text)[1]) if context and context[0] else len(lm.tok_encode(text)))
    return {"nats": nats, "tokens": [float(count) for count in tokens]}


def _nats_per_token(documents: dict[str, list[float]], name: str) -> dict[str, float]:
    """Σ nats / Σ tokens, and the standard error of this ratio over documents."""
    nats, tokens = documents["nats"], documents["tokens"]
    mean = sum(nats) / sum(tokens)
    result = {f"nats_per_token,{name}": mean}
    if len(nats) > 1:
        result[f"nats_per_token_stderr,{name}"] = ratio_stderr(
            [a - mean * b for a, b in zip(nats, tokens, strict=True)], sum(tokens)
        )
    return result


def ratio_stderr(residuals: list[float], total: float) -> float:
    """√(n/(n−1) Σ r²) / total: the standard error of Σa / Σb over n documents, r = a − (Σa/Σb) b and total = Σb."""
    count = len(residuals)
    return math.sqrt(count / (count - 1) * math.fsum(value * value for value in residuals)) / total


def _choices(samples: list[dict]) -> dict[str, list[int]]:
    widest = max(len(sample["arguments"]) for sample in samples)
    picked, right = [0] * widest, [0] * widest
    for sample in samples:
        likelihoods = [answer[0] for answer in sample["filtered_resps"]]
        picked[likelihoods.index(max(likelihoods))] += 1
        if isinstance(sample["target"], int) and 0 <= sample["target"] < widest:
            right[sample["target"]] += 1
    return {"picked": picked, "right": right}


def _chance(config: dict, documents: dict[str, list[float]], samples: list[dict]) -> dict[str, float]:
    """{metric: its expected value for a guess}: the mean of 1 over the number of choices for an accuracy over
    choices, zero for a score of a text. Unknown, and so left out, where a task scores in a way of its own."""
    chance: dict[str, float] = {}
    over_choices = config.get("output_type") == "multiple_choice"
    for key in documents:
        metric = key.split(",")[0]
        if over_choices and metric in _CHOSEN and not config.get("process_results"):
            chance[key] = sum(_guess(sample) for sample in samples) / len(samples)
        elif not over_choices and metric in _FROM_ZERO:
            chance[key] = 0.0
    return chance


def _guess(sample: dict) -> float:
    both = (
        2 if "acc_mutual_info" in sample["metrics"] else 1
    )  # that metric asks for each choice with and without the context
    right = len(set(sample["target"])) if isinstance(sample["target"], list) else 1
    return right / (len(sample["arguments"]) // both)


def _without_shots(config: str) -> str:
    """lm-eval writes the effective number of examples into the definition; it stands in the key by itself."""
    return json.dumps({**json.loads(config), "num_fewshot": None}, sort_keys=True)


@contextlib.contextmanager
def _quietly(progress: bool) -> Iterator[None]:
    """lm-eval prints, and its bars need a terminal (and are one a batch for rolling likelihoods): stdout carries our
    result alone. Log records have their own stream and come through."""
    with contextlib.ExitStack() as stack:
        if not progress:
            stack.enter_context(contextlib.redirect_stderr(stack.enter_context(open(os.devnull, "w"))))
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield


@contextlib.contextmanager
def _unasked(evaluator) -> Iterator[None]:
    """Without lm-eval's questions to git and to every installed package, asked again for each task (57 times in
    mmlu); what a score depends on is recorded by us.
    """
    with (
        mock.patch.object(evaluator, "get_git_commit_hash", return_value=None, create=True),
        mock.patch.object(evaluator, "add_env_info", return_value=None, create=True),
    ):
        yield


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) or (hasattr(value, "dtype") and getattr(value, "ndim", 1) == 0)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
