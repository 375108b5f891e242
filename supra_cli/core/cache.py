"""A recurrent state in the Hugging Face cache: one layer of it for each mixer, beside the keys and values of the rest.

transformers asks a cache three kinds of things: how far it is (`get_seq_length`), how large a mask has to be, and of an
offloaded one to bring the next layer back. It asks the last two of *one* layer for all of them, by rules that differ
between versions: up to 5.20 of the first that is not sliding, later of the first that is neither sliding nor linear. A
recurrent layer has no keys that a mask could be sized by, so it answers as the softmax layer that comes next in the
model does, and whichever layer is asked, the answer is a softmax layer's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache, QuantizedCache

from supra_cli.core.recipe.keep import SOFTMAX

# In the order in which a block may be handed one: transformers 5.24 renamed it for most bases; GPT-NeoX has a third.
_NAMES = ("cache", "past_key_values", "layer_past")


class RecurrentLayer(CacheLayerMixin):
    """The state of one mixer, any pytree of tensors with the batch first, and how many tokens it has seen.

    It is no `LinearAttentionCacheLayerMixin`, transformers' own layer of this kind: a cache of those alone does not
    know its length. `sibling` is the next softmax layer of the cache, in a circle; None where there is none.
    """

    is_croppable = False
    supports_early_init = False

    def __init__(self, sibling: CacheLayerMixin | None = None) -> None:
        super().__init__()
        self.sibling = sibling
        self.state: Any = None
        self.tokens = 0

    def advance(self, state: Any, tokens: int) -> None:
        """Take the state after `tokens` more columns, padding among them."""
        self.state = state
        self.tokens += tokens
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.tokens

    @property
    def is_sliding(self) -> bool:
        return self.sibling is not None and self.sibling.is_sliding

    @property
    def is_compileable(self) -> bool:
        """Whether masks are made for keys of a fixed size, most of them not written yet: what transformers reads it
        for. The step itself is never compiled by `generate`, see `SupraForCausalLM._valid_auto_compile_criteria`."""
        return self.sibling is not None and self.sibling.is_compileable

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.sibling is None:
            return self.tokens + query_length, 0
        return self.sibling.get_mask_sizes(query_length)

    def get_max_length(self) -> int:
        return -1 if self.sibling is None else self.sibling.get_max_length()

    def prefetch(self) -> None:
        """Bring back the softmax layer that comes next; the state itself, which does not grow, is never sent away."""
        if self.sibling is not None:
            self.sibling.prefetch()

    def offload(self) -> None:
        """Nothing: see `prefetch`."""

    def reset(self) -> None:
        self.state, self.tokens, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda tensor: tensor[indices])

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        self.state = tree_map(change, self.state)

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in tree_leaves(self.state) if isinstance(tensor, Tensor))

    def crop(self, length: int) -> None:
        """Of every version: what is given was how much to keep up to transformers 5.18 and is how much to drop."""
        if self.tokens:
            raise ValueError("a recurrent state cannot forget its last tokens; generate without an assistant model")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise TypeError("a recurrent layer holds a state, not keys and values")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise TypeError("a recurrent layer holds a state, not keys and values")


def prepare(cache: Cache, kinds: Sequence[str]) -> list[RecurrentLayer]:
    """The recurrent layers of `cache`, in order, put into their slots where `kinds` is not softmax.

    ValueError for a cache that cannot carry a recurrent state, or one that another model has filled.
    """
    if not isinstance(cache, Cache) or isinstance(cache, QuantizedCache | EncoderDecoderCache):
        raise ValueError(
            f"a model with recurrent layers cannot use a {type(cache).__name__}, expected a DynamicCache or a "
            "StaticCache; leave out cache_implementation='quantized', assistant models and continuous batching"
        )
    if cache.layer_class_to_replicate is not None:  # made without a config, so that its layers come with the model's
        while len(cache.layers) < len(kinds):
            cache.layers.append(cache.layer_class_to_replicate())
    if len(cache.layers) != len(kinds):
        raise ValueError(f"the cache has {len(cache.layers)} layers and the model {len(kinds)}; pass a new cache")
    softmax = [index for index, kind in enumerate(kinds) if kind == SOFTMAX]
    recurrent = [index for index, kind in enumerate(kinds) if kind != SOFTMAX]
    for index in recurrent:
        if not isinstance(cache.layers[index], RecurrentLayer):
            if cache.layers[index].is_initialized and cache.layers[index].get_seq_length() > 0:
                raise ValueError(f"layer {index} of the cache holds keys and values of another model; pass a new cache")
            following = next((other for other in softmax if other > index), softmax[0] if softmax else None)
            cache.layers[index] = RecurrentLayer(None if following is None else cache.layers[following])
    if any(isinstance(cache.layers[index], RecurrentLayer) for index in softmax):
        raise ValueError("the cache holds recurrent states where this model has softmax layers; pass a new cache")
    return [cache.layers[index] for index in recurrent]


def handed(arguments: Mapping[str, Any]) -> Cache | None:
    """The cache among the keywords of a call, by whichever name; ValueError for two different ones."""
    caches = [arguments[name] for name in _NAMES if arguments.get(name) is not None]
    if any(cache is not caches[0] for cache in caches):
        raise ValueError("got two caches, as `cache` and as `past_key_values`; pass one")
    return caches[0] if caches else None


def without(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of a call but for the cache."""
    return {name: value for name, value in arguments.items() if name not in _NAMES}


def of(output: Any) -> Cache | None:
    """The cache that a model's output holds; asked by its old name, transformers 5.24 warns."""
    return output.cache if "cache" in type(output).__dataclass_fields__ else output.past_key_values
