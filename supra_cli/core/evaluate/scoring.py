"""One model on one task through lm-evaluation-harness: a record that says everything the score depends on."""

from __future__ import annotations

import contextlib
import math
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from supra_cli.core.errors import SupraError
from supra_cli.core.evaluate import checks, telling

# lm-eval draws 100,000 samples again for the error of a metric that is no mean (f1, mcc, a perplexity), minutes for a
# dozen questions. Two hundred know the error to 5 %; for bleu, chrf and ter it takes a hundred by itself.
RESAMPLES = 200
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
    batch_size_auto: bool = False
    """Whether `rows_that_fit` chose their number."""
    max_length: int = 2048
    """Tokens of context; longer prompts lose their beginning, longer texts are cut into windows."""
    seed: int = 1234
    """Chooses the examples in the prompt."""
    apply_chat_template: bool = False
    """Whether prompts are put into the model's chat template."""


def language_model(model, tokenizer, settings: Settings):
    """lm-eval's wrapper around a live model."""
    from supra_cli.core.evaluate.harness import Model

    return Model(model, tokenizer, batch_size=settings.batch_size, max_length=settings.max_length)


def shots(task, settings: Settings) -> int:
    """Examples in the prompt: the setting or the task's own number; a task that fixes zero keeps zero."""
    own = task.config.num_fewshot
    return own or 0 if settings.num_fewshot is None or own == 0 else settings.num_fewshot


def score(
    lm, name: str, tasks, settings: Settings, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """The record of one leaf task for the model inside `lm`, as JSON types. `progress(done, total)` counts requests.

    metrics    {"acc,none": 0.5, "acc_stderr,none": 0.02, ...} and `sample_len`, as lm-eval names them; perplexity
               tasks also have `nats_per_token` (the model's own tokens, the begin token that lm-eval predicts included)
    chance     {metric: expected score without knowledge}, where that is known
    documents  {metric: one value a question}, for paired comparisons
    choices    how often each answer was picked and right, first answer first (multiple choice)
    num_fewshot (the effective one), bos (whether a begin token opens the prompt), samples (questions asked), cut
    (prompts that lost their beginning), outside (questions whose right answer is none of their choices)
    """
    from lm_eval import evaluator

    task = tasks.leaves[name]
    lm.begin(name, progress)
    with telling.told(name, tasks.file(name), model=lm), _quietly(), _in_one_process(), _asked(task, settings):
        answer = evaluator.evaluate(
            lm=lm,
            task_dict={"tasks": {name: task}, "groups": {}},
            limit=settings.limit,
            bootstrap_iters=RESAMPLES,
            apply_chat_template=settings.apply_chat_template,
            fewshot_as_multiturn=settings.apply_chat_template,  # as on its command line: an example is a turn
        )
    samples, config = answer["samples"][name], answer["configs"][name]
    if not samples:
        raise SupraError(f"task '{name}' was asked no question")
    metrics = {
        key: value if isinstance(value, int) else float(value)
        for key, value in answer["results"][name].items()
        if _is_number(value)
    }
    first_filter = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    documents = _documents(samples)
    choices = None
    match config.get("output_type"):
        case "multiple_choice":
            choices = _choices(task, first_filter)
        case "loglikelihood_rolling" | "loglikelihood":
            documents |= _likelihoods(first_filter, lm)
            metrics |= _nats_per_token(documents, samples[0]["filter"])
    return {
        "task": name,
        "samples": len(first_filter),
        "num_fewshot": answer["n-shot"][name],
        "bos": lm.tok_encode("a")[:1] == [lm.tokenizer.bos_token_id],
        "cut": len(lm.cut),
        "outside": sum(checks.is_outside(task, sample["doc"]) for sample in first_filter) if choices else 0,
        "metrics": metrics,
        "chance": _chance(config, documents, first_filter),
        "documents": documents,
        "choices": choices,
    }


@contextlib.contextmanager
def _asked(task, settings: Settings) -> Iterator[None]:
    """The number of examples, the seed that draws them and the global seeds as lm-eval's `simple_evaluate` sets them,
    which besides asks git and every installed package for their versions, again for each task (57 times in mmlu).
    """
    import numpy as np
    import torch
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    own = task.config.num_fewshot
    task.set_config("num_fewshot", shots(task, settings))
    task.set_fewshot_seed(seed=settings.seed)
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    try:
        yield
    finally:
        task.set_config("num_fewshot", own)


@contextlib.contextmanager
def _in_one_process() -> Iterator[None]:
    """lm-eval resamples in as many processes as there are cores, each a copy of this one and its model."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


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
        tokens.append(float(_scored_tokens(lm, text, *context)))
    return {"nats": nats, "tokens": tokens}


def _scored_tokens(lm, text: str, context: str | None = None) -> int:
    """Tokens that lm-eval scores: of a text alone all, its begin token too; of one after a context that is empty
    neither that nor the token that it takes for the context.
    """
    if context is None:
        return len(lm.tok_encode(text))
    if context:
        return len(lm._encode_pair(context, text)[1])
    ids = lm.tok_encode(text, add_special_tokens=False)
    return len(ids) - (ids[0] == lm.prefix_token_id)


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


def _choices(task, samples: list[dict]) -> dict[str, list[int]]:
    widest = max(_count(sample) for sample in samples)
    picked, right = [0] * widest, [0] * widest
    for sample in samples:
        likelihoods = [answer[0] for answer in sample["filtered_resps"][: _count(sample)]]
        picked[likelihoods.index(max(likelihoods))] += 1
        for number in checks.right_answers(task, sample["doc"]) - {None}:
            right[number] += 1
    return {"picked": picked, "right": right}


def _count(sample: dict) -> int:
    """How many choices a question has: acc_mutual_info asks for each with the context and, after these, without it."""
    return len(sample["arguments"]) // (2 if "acc_mutual_info" in sample["metrics"] else 1)


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
    right = len(set(sample["target"])) if isinstance(sample["target"], list) else 1
    return right / _count(sample)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without lm-eval's prints and bars: stdout carries our result alone, and progress is ours. Log records have their
    own stream and come through.
    """
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
        yield


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) or (hasattr(value, "dtype") and getattr(value, "ndim", 1) == 0)
