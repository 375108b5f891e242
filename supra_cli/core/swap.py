"""A mixer in the place of attention: the base's projections stay, what happens between them is exchanged."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from supra_cli.core import cache as caches
from supra_cli.core.archs import Arch, Positions, archs
from supra_cli.core.layout import Layout, Rotate
from supra_cli.core.mixers import Mixer, options_of_layer
from supra_cli.core.recipe.keep import SOFTMAX


class SwappedAttention(nn.Module):
    """The base's attention with a mixer between its input and output projections.

    An instance is the base's own attention module whose class was exchanged for a subclass of that class and of this
    one, so its submodules, parameter names and hooks stay, and `softmax` still runs the base's forward. The mixer's
    parameters sit at `.mixer`.
    """

    arch: Arch
    mixer: Mixer

    def inputs(self, hidden_states: Tensor, **call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Rotate]:
        """What a mixer is called with before state and layout: q, k, v, x and the rotation. `call` is what the block
        hands to its attention besides.
        """
        positions = Positions(call.get("position_embeddings"), call.get("position_ids"))
        rotation = self.arch.rotation(self, positions)
        return *self.arch.qkv(self, hidden_states, positions), hidden_states, rotation

    def heads(
        self, hidden_states: Tensor, layout: Layout | None = None, state: NamedTuple | None = None, **call: Any
    ) -> tuple[Tensor, NamedTuple]:
        """The mixer's heads o [B,T,H,V], before the output projection, and its new state."""
        return self.mixer(*self.inputs(hidden_states, **call), state, layout)

    def forward(self, hidden_states: Tensor, *, layout: Layout | None, **call: Any) -> tuple[Tensor, None]:
        """[B,T,D] -> [B,T,D], and None where the base returns attention weights.

        `layout` has no default: a caller that does not know of padding and documents must not pass for one without any.
        """
        cache = caches.handed(call)
        memory = None if cache is None else cache.layers[self.layer_idx]  # put there by `SwappedBackbone`
        o, state = self.heads(hidden_states, layout, None if memory is None else memory.state, **call)
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
            attention.mixer = mixer(arch.shape(attention), options_of_layer(options, attention.layer_idx))
            attention.mixer.reset_parameters()
            if not arch.hands_on:
                block.register_forward_pre_hook(_leave_layout, with_kwargs=True)
                attention.register_forward_pre_hook(_take_layout, with_kwargs=True)


def _leave_layout(block: nn.Module, args: tuple[Any, ...], call: dict[str, Any]) -> None:
    for part in block.children():
        if isinstance(part, SwappedAttention):
            part.left = call["layout"]


def _take_layout(layer: SwappedAttention, args: tuple[Any, ...], call: dict[str, Any]) -> tuple[Any, Any]:
    return args, {**call, "layout": vars(layer).pop("left")}


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


def base_class(name: str) -> type | None:
    """The class of that name in the modeling module of some registered base."""
    for base in archs:
        config = CONFIG_MAPPING[base]
        modeling = importlib.import_module(config.__module__.replace(".configuration_", ".modeling_"))
        if (found := getattr(modeling, name, None)) is not None:
            return found
    return None


def __getattr__(name: str) -> type[SwappedAttention]:
    """`SwappedLlamaAttention` and its like by name, as pickle looks for them in another process."""
    if name.startswith("Swapped") and (attention := base_class(name.removeprefix("Swapped"))) is not None:
        return swapped_class(attention)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
