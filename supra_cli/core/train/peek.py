"""The first rows of a recipe, decoded."""

from __future__ import annotations

import itertools
from typing import Any

from supra_cli.core.data import rows
from supra_cli.core.recipe import Recipe
from supra_cli.core.train.origin import tokenizer_of


def peek(recipe: Recipe, count: int) -> list[dict[str, Any]]:
    """[{source, tokens, documents: [{tokens, text}]}] of the first `count` rows, special tokens shown; they are those
    of the first stage.
    """
    tokenizer, length = tokenizer_of(recipe), recipe.seq_len(recipe.stages[0])
    mixture = rows.training(recipe.data, tokenizer, recipe.seed, length)
    shown = []
    for _ in range(count):
        before = mixture.tokens_by_source()
        batch = mixture.batch(1, length)
        source = next(name for name, drawn in mixture.tokens_by_source().items() if drawn > before[name])
        ids, positions = batch.input_ids[0], batch.position_ids[0]
        starts = [*(positions == 0).nonzero()[:, 0].tolist(), len(ids)]
        pieces = [ids[start:end] for start, end in itertools.pairwise(starts)]
        if recipe.data.documents == "cut":
            del pieces[1:]  # what one document left empty
        documents = [{"tokens": len(piece), "text": tokenizer.decode(piece)} for piece in pieces]
        shown.append({"source": source, "tokens": len(ids), "documents": documents})
    return shown
