"""The first rows of a recipe, decoded."""

from __future__ import annotations

import itertools
from typing import Any

from supra_cli.core import checkpoint, hub
from supra_cli.core.data import rows, sources
from supra_cli.core.data import tokenizer as bpe
from supra_cli.core.recipe import Recipe


def tokenizer_of(recipe: Recipe):
    """The base's tokenizer; for a shape without a base, one trained on the training text now."""
    if recipe.base is not None:
        return checkpoint.load_tokenizer(hub.fetch(hub.resolve(recipe.base)))
    return bpe.train(sources.all_texts(recipe.data), recipe.tokenizer.vocab_size)


def peek(recipe: Recipe, count: int) -> list[dict[str, Any]]:
    """[{source, tokens, documents: [{tokens, text}]}] of the first `count` rows, special tokens shown."""
    tokenizer = tokenizer_of(recipe)
    mixture = rows.training(recipe.data, tokenizer, recipe.seed)
    shown = []
    for _ in range(count):
        before = mixture.tokens_by_source()
        batch = mixture.batch(1, recipe.data.seq_len)
        source = next(name for name, drawn in mixture.tokens_by_source().items() if drawn > before[name])
        ids, positions = batch.input_ids[0], batch.position_ids[0]
        starts = [*(positions == 0).nonzero()[:, 0].tolist(), len(ids)]
        pieces = [ids[start:end] for start, end in itertools.pairwise(starts)]
        documents = [{"tokens": len(piece), "text": tokenizer.decode(piece)} for piece in pieces]
        shown.append({"source": source, "tokens": len(ids), "documents": documents})
    return shown
