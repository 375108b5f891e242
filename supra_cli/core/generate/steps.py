"""Passes of a model: over the prompts piece by piece, then over one token after another, also compiled.

Works on every model that `checkpoint.load` returns. Where softmax layers are left, their keys and values grow as ever.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from supra_cli.core import cache as caches
from supra_cli.core.errors import SupraError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache, CacheLayerMixin

    Step = Callable[[PreTrainedModel, Tensor, Tensor, Tensor | None, Cache], tuple[Tensor, Cache]]

PIECE = 2048
"""Tokens of each prompt that one pass reads: enough to fill a device, few enough for the memory of a laptop."""


@torch.no_grad()
def prefill(
    model: PreTrainedModel, input_ids: Tensor, mask: Tensor | None, *, piece: int = PIECE
) -> tuple[Tensor, Cache]:
    """Logits [B,vocab] after each prompt's last token, and the cache that `decode` goes on from.

    input_ids [B,T] and mask [B,T] (1 on real tokens, None if all are) are padded on the left. The model reads `piece`
    columns at a time, each from the cache that the one before left, so what a pass holds does not grow with T. All at
    once where the base's positions are others in a text of that length.
    """
    cache, switch = None, model.config.switch()
    if switch is not None and input_ids.shape[1] > switch:
        piece = input_ids.shape[1]
    for start in range(0, input_ids.shape[1], piece):
        end = start + piece
        output = model(
            input_ids=input_ids[:, start:end],
            # Of all columns so far: where a row's text began, and so its positions, shows in them alone.
            attention_mask=None if mask is None else mask[:, :end],
            cache=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = caches.of(output)
    return output.logits[:, -1], cache


@torch.no_grad()
def decode(
    model: PreTrainedModel, token: Tensor, position: Tensor, mask: Tensor | None, cache: Cache
) -> tuple[Tensor, Cache]:
    """Logits [B,vocab] after one more token [B] at position [B], and the cache; mask [B, past + 1] or None."""
    output = model(
        input_ids=token[:, None],
        attention_mask=mask,
        position_ids=position[:, None],
        cache=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1], caches.of(output)


def compiled(model: PreTrainedModel, token: Tensor, position: Tensor, mask: Tensor | None, cache: Cache) -> Step:
    """`decode` through torch.compile, the same up to rounding, for the given token [B] and those after it.

    mask [B, past] or None. Two tokens are decoded on a copy of the cache: the first compiles for what is given, the
    second for what it sees grow, the count of tokens and with softmax layers their keys. No later one compiles, but
    some while the sliding window of a softmax layer fills. SupraError where it cannot be compiled, as without a C++
    compiler on a CPU.
    """
    # As PyTorch's own loops, which share out 32,768 numbers and no less: the compiler's shorter ones would stand at a
    # barrier many times a token, on a busy machine each time for as long as a neighbour computes.
    step = torch.compile(decode, options={"cpp.min_chunk_size": 1 << 15})
    trial = copy.deepcopy(cache)
    try:
        with _quiet("torch._dynamo"):
            for ahead in range(2):
                mask = grown(mask)
                logits, trial = step(model, token, position + ahead, mask, trial)
        logits[0, 0].item()  # waits for the device, so that the first token after it is not timed with these two
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = first_line(error)
        raise SupraError(
            f"the decode step does not compile here ({reason}); mend that or leave out --compile"
        ) from error
    return step


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Without its warnings: that a graph is cut where padding stands beside softmax layers is no news to a user."""
    log = logging.getLogger(logger)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def grown(mask: Tensor | None) -> Tensor | None:
    """`mask` for one more real token in each row."""
    return None if mask is None else torch.cat([mask, mask.new_ones((len(mask), 1))], dim=-1)


def cache_bytes(cache: Cache) -> int:
    """Bytes of every tensor that the cache's layers hold: recurrent states, keys, values."""
    return sum(t.nbytes for layer in cache.layers for t in tree_leaves(_held(layer)) if isinstance(t, Tensor))


def _held(layer: CacheLayerMixin) -> Any:
    return layer.state if isinstance(layer, caches.RecurrentLayer) else [layer.keys, layer.values]
