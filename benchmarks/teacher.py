"""Is the bundled teacher a language model, or a lookup table?

    python benchmarks/teacher.py [MODEL] [--json] [--output benchmarks/results/teacher.json]

On the held-out documents of the standard library, all with the model's own tokenizer:
- perplexity, beside n-gram models fitted on the training documents and asked about the same tokens (all but the begin
  token of each document; the model sees a document in windows of its context length, the n-grams see it whole);
- loss after 32 to 63 and after 256 to 511 tokens of the same window, for whole windows;
- surprise of a 64-token passage the first and the second time, in rows of begin token, 32 tokens of other text, the
  passage, a gap of 0 or 64 tokens of other text, the passage; passages of held-out text and of uniformly random tokens;
- stdlib_cloze through lm-eval, with its 95 % interval (Wilson).
"""

from __future__ import annotations

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "kernels")]

import argparse  # noqa: E402
import logging  # noqa: E402
import math  # noqa: E402
import time  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import NamedTuple  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.measure import machine, report  # noqa: E402
from benchmarks.ngrams import Interpolated, KneserNey  # noqa: E402
from supra_cli.core import checkpoint, corpus, evaluate, hub  # noqa: E402
from supra_cli.core.data.tokens import encode  # noqa: E402

Documents = Sequence[Sequence[int]]

EARLY, LATE = (32, 63), (256, 511)
PASSAGE, LEAD, GAPS, ROWS = 64, 32, (0, 64), 256


def documents(split: str, tokenizer) -> list[list[int]]:
    return list(encode((document.text for document in corpus.documents(split)), tokenizer))


def windows(held_out: Documents, length: int, fill: int) -> tuple[Tensor, Tensor]:
    """(tokens, labels) [N,length]: each document cut into windows so that every token but its first is predicted
    once.
    """
    rows = [
        (document[start : start + length], document[start + 1 : start + 1 + length])
        for document in held_out
        for start in range(0, len(document) - 1, length)
    ]
    tokens, labels = torch.full((len(rows), length), fill), torch.full((len(rows), length), -100)
    for n, (seen, following) in enumerate(rows):
        tokens[n, : len(seen)] = torch.tensor(seen)
        labels[n, : len(following)] = torch.tensor(following)
    return tokens, labels


def ngram_rows(train: Documents, held_out: Documents, vocabulary: int) -> list[dict]:
    models = {
        "unigram": lambda: Interpolated(train, 1, vocabulary),
        "bigram, interpolated": lambda: Interpolated(train, 2, vocabulary),
        "trigram, interpolated": lambda: Interpolated(train, 3, vocabulary),
        "trigram, Kneser-Ney": lambda: KneserNey(train, vocabulary),
    }
    rows = []
    for name, fit in models.items():
        nats = -np.log(fit().probabilities(held_out))
        rows.append(row("held-out perplexity", name, math.exp(nats.mean()), tokens=len(nats)))
    return rows


def row(
    measure: str, of: str, value: float, *, tokens: int, low: float | None = None, high: float | None = None
) -> dict:
    return {"measure": measure, "of": of, "value": value, "low": low, "high": high, "tokens": tokens}


def model_rows(path: Path, model, tokenizer, held_out: Documents) -> list[dict]:
    length = min(evaluate.context_length(path), 512)
    tokens, labels = windows(held_out, length, tokenizer.eos_token_id)
    nats = evaluate.token_nats(model, tokens, labels=labels)
    whole = evaluate.mean(nats)
    rows = [row("held-out perplexity", "model", whole.perplexity, tokens=whole.tokens)]
    full = nats[(labels != -100).all(dim=1)]
    for first, last in (EARLY, LATE):
        part = evaluate.mean(full[:, first - 1 : last])
        rows.append(row("held-out nats per token", f"after {first} to {last} tokens", part.nats, tokens=part.tokens))
    return rows


class Repeat(NamedTuple):
    first: evaluate.Perplexity
    second: evaluate.Perplexity

    @property
    def ratio(self) -> float:
        """Surprise at the second meeting over that at the first."""
        return self.second.nats / self.first.nats


def surprise_of_repeats(model, before: Tensor, passage: Tensor, between: Tensor, *, batch_size: int = 8) -> Repeat:
    """Surprise of `passage` [N,P] the first and the second time in rows `before, passage, between, passage`.

    before [N,A] with A ≥ 1, between [N,C] with C ≥ 0. All P tokens of the passage count, the first included, which
    nothing announces.
    """
    rows = torch.cat([before, passage, between, passage], dim=1)
    nats = evaluate.token_nats(model, rows, batch_size=batch_size)
    length, start = passage.shape[1], before.shape[1] - 1
    again = start + length + between.shape[1]
    return Repeat(evaluate.mean(nats[:, start : start + length]), evaluate.mean(nats[:, again : again + length]))


def repeat_rows(model, tokenizer, held_out: Documents, seed: int = 0) -> list[dict]:
    random = np.random.default_rng(seed)
    text = [np.asarray(document[1:-1]) for document in held_out if len(document) > PASSAGE + 2]
    ordinary = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)

    def excerpts(length: int) -> Tensor:
        starts = [(one, random.integers(len(one) - length + 1)) for one in random.choice(np.array(text, object), ROWS)]
        return torch.from_numpy(np.stack([one[start : start + length] for one, start in starts])).long()

    rows = []
    for kind in ("text", "random tokens"):
        for gap in GAPS:
            begin = torch.full((ROWS, 1), tokenizer.bos_token_id)
            passage = (
                excerpts(PASSAGE) if kind == "text" else torch.from_numpy(random.choice(ordinary, (ROWS, PASSAGE)))
            )
            repeat = surprise_of_repeats(
                model, torch.cat([begin, excerpts(LEAD)], dim=1), passage, excerpts(gap)[:, :gap]
            )
            name = (
                f"{PASSAGE} tokens of {kind}, {gap} between" if kind == "text" else f"{PASSAGE} {kind}, {gap} between"
            )
            for when, part in (("first time", repeat.first), ("second time", repeat.second)):
                rows.append(row(f"nats per token, {when}", name, part.nats, tokens=part.tokens))
            rows.append(row("second over first", name, repeat.ratio, tokens=repeat.second.tokens))
    return rows


def cloze_rows(path: Path, model, tokenizer) -> list[dict]:
    tasks = evaluate.find(["stdlib_cloze"])
    settings = evaluate.Settings(max_length=evaluate.context_length(path))
    subject = evaluate.Subject(str(path), path, lambda: (model, tokenizer))
    result = evaluate.evaluate(subject, None, tasks, settings, fresh=True)
    questions = result["tasks"]["stdlib_cloze"]["samples"]
    return [
        row("stdlib_cloze", metric, value["student"], tokens=questions, **wilson(value["student"], questions))
        for metric, value in result["results"]["stdlib_cloze"].items()
    ]


def wilson(share: float, count: int, z: float = 1.959964) -> dict[str, float]:
    """(p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n)."""
    middle = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return {"low": (middle - spread) / (1 + z * z / count), "high": (middle + spread) / (1 + z * z / count)}


def targets(rows: list[dict]) -> list[dict]:
    values = {(one["measure"], one["of"]): one for one in rows}

    def value(measure: str, of: str, field: str = "value") -> float:
        return values[measure, of][field]

    trigram = min(value("held-out perplexity", f"trigram, {kind}") for kind in ("interpolated", "Kneser-Ney"))
    gain = value("held-out nats per token", "after 32 to 63 tokens") - value(
        "held-out nats per token", "after 256 to 511 tokens"
    )
    listed = [
        (
            "perplexity over that of the better trigram",
            "at most",
            0.85,
            value("held-out perplexity", "model") / trigram,
        ),
        ("nats gained from 32-63 to 256-511 tokens of context", "at least", 0.1, gain),
    ]
    listed += [
        (f"second over first, {one['of']}", "at most", 0.7, one["value"])
        for one in rows
        if one["measure"] == "second over first"
    ]
    listed.append(("stdlib_cloze, low end of the interval", "at least", 0.25, value("stdlib_cloze", "acc", "low")))
    return [
        {"what": what, "bound": bound, "target": target, "measured": measured, "met": bool(met)}
        for what, bound, target, measured in listed
        for met in [measured >= target if bound == "at least" else measured <= target]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="tiny", help="directory or alias of a plain or converted model")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    start = time.monotonic()
    path = hub.fetch(hub.resolve(options.model))
    model, tokenizer = checkpoint.load(path, dtype=torch.float32), checkpoint.load_tokenizer(path)
    train, held_out = documents("train", tokenizer), documents("validation", tokenizer)
    rows = model_rows(path, model, tokenizer, held_out)
    rows += ngram_rows(train, held_out, len(tokenizer))
    rows += repeat_rows(model, tokenizer, held_out)
    rows += cloze_rows(path, model, tokenizer)
    result = {
        "benchmark": "teacher",
        "command": "python benchmarks/teacher.py " + " ".join(sys.argv[1:]),
        **machine(),
        "model": {
            "name": options.model,
            "weights": f"sha256:{evaluate.weights_hash(path)}",
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        },
        "tokens": {"train": sum(map(len, train)), "held_out": sum(map(len, held_out)), "vocabulary": len(tokenizer)},
        "seconds": round(time.monotonic() - start, 1),
        "rows": rows,
        "targets": targets(rows),
    }
    report(result, options.output, options.json)


if __name__ == "__main__":
    main()
