"""Surprise of a causal language model, in nats per token.

Works on any model that supra loads (the vocabulary projection runs in chunks, inside the model's own forward) and on
a plain transformers model (whole logits).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from supra_cli.core.data.packing import IGNORED
from supra_cli.core.errors import NonFiniteError

Head = Callable[[Tensor], Tensor]

# Logits that live at once: 64 MiB of them in fp32.
LOGITS_AT_ONCE = 1 << 24


class Perplexity(NamedTuple):
    nats: float
    """Mean −ln p over the predicted tokens."""
    tokens: int
    """How many tokens were predicted."""

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats)


def token_nats(
    model,
    tokens: Tensor,
    positions: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    batch_size: int = 8,
    device: torch.device | None = None,
    numbers: Sequence[int] | None = None,
) -> Tensor:
    """`−ln p(labels[n,t] | tokens[n,:t+1])` as fp32 [N,T] on the CPU, NaN where there is no label (−100).

    tokens [N,T] int64; positions [N,T] restart at 0 with each document of a row, None is one document a row; labels
    [N,T] default to the next token of the same document. `device` is where the model computes, by default where its
    weights are. The model is in eval mode during the call. SupraError on a non-finite value, which names the row:
    where these rows are some of others, by its own of `numbers`.
    """
    if labels is None:
        labels = next_tokens(tokens, positions)
    result = []
    with judging(model):
        for start, rows in _batches(len(tokens), batch_size):
            batch = [
                None if part is None else part[rows].to(device or model.device) for part in (tokens, positions, labels)
            ]
            nats = _forward(model, *batch).cpu()
            if not torch.isfinite(nats[labels[rows].cpu() != IGNORED]).all():
                row = start + int((~torch.isfinite(nats) & (labels[rows].cpu() != IGNORED)).any(dim=1).nonzero()[0, 0])
                row = row if numbers is None else numbers[row]
                raise NonFiniteError.of(f"the model's loss on row {row} is")
            result.append(nats)
    return torch.cat(result)


def perplexity(
    model, tokens: Tensor, positions: Tensor | None = None, labels: Tensor | None = None, *, batch_size: int = 8
) -> Perplexity:
    """The mean over all predicted tokens, each counted once whatever its row. Arguments as `token_nats`."""
    return mean(token_nats(model, tokens, positions, labels, batch_size=batch_size))


def mean(nats: Tensor) -> Perplexity:
    """The mean of what is not NaN, summed in float64."""
    known = nats[~nats.isnan()].double()
    if known.numel() == 0:
        raise ValueError("no token to take the mean of")
    return Perplexity(float(known.mean()), known.numel())


def next_tokens(tokens: Tensor, positions: Tensor | None = None) -> Tensor:
    """labels[n,t] = tokens[n,t+1], −100 at the end of a row and where the next token opens another document."""
    labels = torch.full_like(tokens, IGNORED)
    labels[:, :-1] = tokens[:, 1:]
    if positions is not None:
        labels[:, :-1] = labels[:, :-1].masked_fill(positions[:, 1:] == 0, IGNORED)
    return labels


def _batches(rows: int, batch_size: int) -> Iterator[tuple[int, slice]]:
    for start in range(0, rows, batch_size):
        yield start, slice(start, start + batch_size)


def _forward(model, tokens: Tensor, positions: Tensor | None, labels: Tensor) -> Tensor:
    def objective(hidden: Tensor, head: Head) -> Tensor:
        chunk = max(1, LOGITS_AT_ONCE // (hidden.shape[0] * model.config.vocab_size))
        parts = zip(hidden.split(chunk, dim=1), labels.split(chunk, dim=1), strict=True)
        return torch.cat([_nats(head(part), wanted) for part, wanted in parts], dim=1)

    return with_head(model, tokens, objective, positions)


def _nats(logits: Tensor, labels: Tensor) -> Tensor:
    losses = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view_as(labels).masked_fill(labels == IGNORED, math.nan)


def with_head(model, tokens: Tensor, objective: Callable[[Tensor, Head], Any], positions: Tensor | None = None) -> Any:
    """`objective(hidden, head)` of one pass over tokens [B,T], where `head(hidden)` is logits.

    A model without supra's `objective` gives whole logits, and its head is the identity.
    """
    given = {"input_ids": tokens, "position_ids": positions, "use_cache": False}
    if not hasattr(model, "supra"):
        return objective(model(**given).logits, lambda logits: logits)
    return model(**given, objective=objective)


@contextmanager
def judging(*models: Any) -> Iterator[None]:
    """In eval mode and without gradients; each model is left in the mode in which it came."""
    before = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for model, mode in zip(models, before, strict=True):
            model.train(mode)
