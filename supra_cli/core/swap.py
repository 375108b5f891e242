"""A mixer in the place of attention: the base's projections stay, what happens between them is exchanged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from supra_cli.core.archs import Arch, Rope
from supra_cli.core.layout import Layout, softmax_mask
from supra_cli.core.mixers import Mixer
from supra_cli.core.mixers.softmax import Softmax
from supra_cli.core.recipe.keep import SOFTMAX


class SwappedAttention(nn.Module):
    """The base's attention with a mixer between its input and output projections.

    An instance is the base's own attention module whose class was exchanged for a subclass of that class and of this
    one, so its submodules, parameter names and hooks stay, and `softmax` still runs the base's forward. The mixer's
    parameters sit at `.mixer`.
    """

    arch: Arch
    mixer: Mixer

    def heads(
        self,
        hidden_states: Tensor,
        position_embeddings: Rope = None,
        layout: Layout | None = None,
        state: NamedTuple | None = None,
    ) -> tuple[Tensor, NamedTuple]:
        """The mixer's heads o [B,T,H,V], before the output projection, and its new state."""
        q, k, v = self.arch.qkv(self, hidden_states)
        rope = self.arch.rotation(self, position_embeddings)
        return self.mixer(q, k, v, hidden_states, rope, state, layout)

    def softmax_heads(
        self, hidden_states: Tensor, position_embeddings: Rope = None, layout: Layout | None = None
    ) -> Tensor:
        """The base's heads [B,T,H,V], before the output projection: what the mixer replaced."""
        q, k, v = self.arch.qkv(self, hidden_states)
        rope = self.arch.rotation(self, position_embeddings)
        return Softmax(self.mixer.spec, Softmax.Options())(q, k, v, hidden_states, rope, None, layout)[0]

    def softmax(self, hidden_states: Tensor, layout: Layout | None = None, **kwargs: Any) -> Tensor:
        """The base's own attention [B,T,D] on the same input, within the same documents and without a cache.

        Takes what `forward` takes; the mask is made here, as a model without softmax layers hands none over.
        """
        x, window = hidden_states, self.mixer.spec.window
        mask = softmax_mask(layout, x.shape[1], window=window, dtype=x.dtype, device=x.device)
        return super().forward(x, **{**kwargs, "attention_mask": mask, self.arch.cache: None})[0]

    def forward(
        self, hidden_states: Tensor, position_embeddings: Rope = None, layout: Layout | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """[B,T,D] -> [B,T,D], and None where the base returns attention weights."""
        memory = kwargs.get("cache", kwargs.get(self.arch.cache))  # transformers 5.24 renamed it
        memory = None if memory is None else recurrent_layer(memory, self.layer_idx)
        o, state = self.heads(hidden_states, position_embeddings, layout, None if memory is None else memory.state)
        if memory is not None:
            memory.advance(state, hidden_states.shape[1])
        return self.arch.out(self, o.flatten(-2)), None


@cache
def swapped_class(attention: type[nn.Module]) -> type[SwappedAttention]:
    """The subclass of a base's attention class that swapped layers of that base have."""
    return type(f"Swapped{attention.__name__}", (SwappedAttention, attention), {"__module__": __name__})


def swap(model: nn.Module, arch: Arch, mixer: type[Mixer], options: Mixer.Options, kinds: Sequence[str]) -> None:
    """Put a mixer, freshly drawn (on the meta device: not at all), into every layer whose kind is not softmax."""
    for block, kind in zip(arch.layers(model), kinds, strict=True):
        if kind != SOFTMAX:
            attention = getattr(block, arch.slot)
            attention.__class__ = swapped_class(type(attention))
            attention.arch = arch
            attention.mixer = mixer(arch.spec(attention), options)
            attention.mixer.reset_parameters()


def swapped_layers(model: nn.Module) -> Iterator[tuple[str, SwappedAttention]]:
    """(name, layer) of every swapped attention, in order."""
    for name, module in model.named_modules():
        if isinstance(module, SwappedAttention):
            yield name, module


def mixer_names(model: nn.Module) -> set[str]:
    """The names of the parameters that belong to a mixer and not to the base, some of which call a part of their own
    `mixer`.
    """
    return {f"{name}.mixer.{own}" for name, layer in swapped_layers(model) for own, _ in layer.mixer.named_parameters()}


class RecurrentLayer(CacheLayerMixin):
    """A layer of the Hugging Face cache that holds a mixer's state, of a size that does not grow, and counts the
    tokens seen.
    """

    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state: Any = None
        self.tokens = 0

    def advance(self, state: NamedTuple, tokens: int) -> None:
        self.state = state
        self.tokens += tokens
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.tokens

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.tokens + query_length, 0

    def reset(self) -> None:
        self.__init__()

    def offload(self) -> None:
        self._each(lambda tensor: tensor.to("cpu", non_blocking=True))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda tensor: tensor[indices])

    def _each(self, change: Any) -> None:
        if self.state is not None:
            self.state = type(self.state)(*(change(tensor) for tensor in self.state))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError("a recurrent state cannot forget its last tokens; generate without an assistant model")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise TypeError("a recurrent layer holds a state, not keys and values")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise TypeError("a recurrent layer holds a state, not keys and values")


def recurrent_layer(cache: Cache, layer: int) -> RecurrentLayer:
    """The state-carrying layer of `cache` at a slot, put there at first use."""
    while len(cache.layers) <= layer:
        cache.layers.append(cache.layer_class_to_replicate())
    slot = cache.layers[layer]
    if not isinstance(slot, RecurrentLayer):
        if slot.get_seq_length() > 0:
            raise ValueError(f"layer {layer} of the cache holds keys and values of another model")
        slot = cache.layers[layer] = RecurrentLayer()
    return slot
