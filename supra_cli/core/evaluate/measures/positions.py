"""Loss by position, to 16 times the length of training."""

from __future__ import annotations

from supra_cli.core.evaluate.measures import Material, Value, measures, ratio
from supra_cli.core.evaluate.nats import token_nats

FARTHEST = 16
FIRST = 16


@measures.register("positions")
def positions(model, material: Material, *, teacher=None) -> dict[str, Value]:
    """Mean nats of the tokens with so many before them, in bins 1–15, 16–31, 32–63, ... of rows of held-out text.

    A model that reads its past gets better to the right; one that was trained on short rows may get worse beyond them.
    """
    length = max(material.lengths, default=FARTHEST * material.train_length)
    length = min(length, material.longest or length, len(material.text) // 2)
    rows = material.few(length)
    tokens = material.opened(material.passages(rows, length, material.generator(length)))[:, :length]
    nats = token_nats(model, tokens, batch_size=material.batch(length))[:, :-1]
    results, start, end = {}, 1, FIRST
    while start < length:
        end = min(end, length)
        results[f"{start}–{end - 1}"] = ratio(nats[:, start - 1 : end - 1].double().mean(1))
        start, end = end, 2 * end
    return results
