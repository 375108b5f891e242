"""Multi-query associative recall: values by their keys, over the number of pairs and the distance."""

from __future__ import annotations

import torch

from supra_cli.core.evaluate.measures import Material, Value, measures, ratio
from supra_cli.core.evaluate.nats import judging, with_head

PAIRS = (4, 8, 16, 32, 64)
GAPS = (0, 128)
QUERIES = 16


@measures.register("recall_pairs")
def recall_pairs(model, material: Material, *, teacher=None) -> dict[str, Value]:
    """Accuracy and nats of the values in the second part of rows

        [begin | k₁ v₁ … k_n v_n | gap tokens of ordinary text | k_j v_j of up to 16 of the pairs, in random order]

    of random tokens, all keys and values of a row different. Accuracy is over the whole vocabulary, so chance is zero.

    Source: MQAR (Arora et al. 2024, arXiv:2312.04927), with text in place of their random filler.
    """
    results = {}
    for pairs in (pairs for pairs in PAIRS if 2 * pairs <= len(material.words)):
        for gap in material.gaps(GAPS, 2 * (pairs + min(pairs, QUERIES))):
            accuracy, nats = _ask(model, material, pairs, gap)
            results[f"accuracy, {pairs} pairs, gap {gap}"] = ratio(accuracy)
            results[f"nats, {pairs} pairs, gap {gap}"] = ratio(nats)
    return results


def _ask(model, material: Material, pairs: int, gap: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(share of right values, mean nats of a value), each [rows]."""
    rows, generator = material.rows, material.generator(pairs, gap)
    shown = material.distinct(rows, 2 * pairs, generator).view(rows, pairs, 2)
    order = torch.stack([torch.randperm(pairs, generator=generator)[:QUERIES] for _ in range(rows)])
    asked = shown.gather(1, order[..., None].expand(-1, -1, 2))
    between = material.passages(rows, gap, generator)
    tokens = material.opened(shown.flatten(1), between, asked.flatten(1))
    keys = torch.arange(tokens.shape[1] - asked[0].numel(), tokens.shape[1], 2)

    def at_keys(hidden: torch.Tensor, head) -> torch.Tensor:
        return head(hidden[:, keys.to(hidden.device)])

    accuracy, nats = [], []
    with judging(model):
        for batch, values in zip(
            tokens.split(material.batch(tokens.shape[1])),
            asked[..., 1].split(material.batch(tokens.shape[1])),
            strict=True,
        ):
            logits = with_head(model, batch.to(model.device), at_keys).float().cpu()
            accuracy.append((logits.argmax(-1) == values).double().mean(1))
            nats.append(torch.nn.functional.cross_entropy(logits.mT, values, reduction="none").double().mean(1))
    return torch.cat(accuracy), torch.cat(nats)
