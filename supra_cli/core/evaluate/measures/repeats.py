"""Whether a passage is easier at its second meeting, by what lies between the two."""

from __future__ import annotations

from supra_cli.core.evaluate.measures import Material, Value, measures, ratio
from supra_cli.core.evaluate.nats import token_nats

PASSAGE = 32
GAPS = (0, 32, 96, 160, 200, 400)


@measures.register("repeats")
def repeats(model, material: Material, *, teacher=None) -> dict[str, Value]:
    """Σ nats of a passage's second meeting / Σ nats of its first, over its 32 tokens and over rows of

        [begin | passage | gap tokens of ordinary text | passage],

    for passages of random tokens and of held-out text. 1 is no memory at all. A perfect copy has 0 but for the first
    token, of which nothing says that the passage comes again: about 1/32. Without a begin token, which would predict
    that first token, it is left out of both meetings.
    """
    results = {}
    skipped = 0 if len(material.begin) else 1
    for kind in ("random", "text"):
        for gap in material.gaps(GAPS, 2 * PASSAGE):
            generator = material.generator(gap, kind == "text")
            draw = material.passages if kind == "text" else material.distinct
            passage = draw(material.rows, PASSAGE, generator)
            between = material.passages(material.rows, gap, generator)
            tokens = material.opened(passage, between, passage)
            nats = token_nats(model, tokens, batch_size=material.batch(tokens.shape[1]))
            start = len(material.begin) - 1 + skipped  # here the first scored token is predicted
            first, again = (
                nats[:, at : at + PASSAGE - skipped].double().sum(1) for at in (start, start + PASSAGE + gap)
            )
            results[f"{kind}, gap {gap}"] = ratio(again, first)
    return results
