"""The size of a model: parameters, weights, state and cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from supra_cli.core.archs import archs
from supra_cli.core.layout import HeadSpec
from supra_cli.core.mixers import mixers
from supra_cli.core.modeling import SupraConfig, SupraForCausalLM
from supra_cli.core.recipe.keep import SOFTMAX
from supra_cli.core.swap import SwappedAttention, mixer_names


@dataclass(frozen=True)
class ModelPlan:
    """A model's size; bytes of caches are for one sequence."""

    model_type: str
    """The base's."""
    layers: tuple[str, ...]
    """The kind of each layer."""
    parameters: int
    new_parameters: int
    """Those of the mixers; the rest are the base's."""
    dtype: str
    weight_bytes: int
    """All parameters in `dtype`."""
    new_weight_bytes: int
    state_bytes: int
    """The recurrent state of all swapped layers, however long the sequence."""
    softmax_windows: tuple[int | None, ...]
    """How many tokens each remaining softmax layer keeps; None is all."""
    softmax_token_bytes: int
    """Keys and values of one token in one softmax layer."""
    base_windows: tuple[int | None, ...]
    dropped: tuple[str, ...]
    """What of the base's attention the swapped layers do without, in words."""
    layers_known: bool = True
    """Whether it is known which layers are softmax; until `keep = auto:N` has chosen them, the last of `layers` are."""

    def cache_bytes(self, tokens: int) -> int:
        """Recurrent state and the remaining layers' keys and values after `tokens` tokens."""
        return self.state_bytes + self._kept(self.softmax_windows, tokens)

    def base_cache_bytes(self, tokens: int) -> int:
        """The base's keys and values after `tokens` tokens."""
        return self._kept(self.base_windows, tokens)

    @property
    def break_even_tokens(self) -> int:
        """Tokens from which on the base's cache is larger than the recurrent state that replaced it."""
        swapped = len(self.base_windows) - len(self.softmax_windows)
        return -(-self.state_bytes // (swapped * self.softmax_token_bytes)) if swapped else 0

    def _kept(self, windows: Iterable[int | None], tokens: int) -> int:
        return sum(self.softmax_token_bytes * min(tokens, window or tokens) for window in windows)


def measure(config: SupraConfig, dtype: torch.dtype | None = None) -> ModelPlan:
    """The size of the model of `config`; `dtype` (the config's own by default) is that of weights, keys and values."""
    with torch.device("meta"):
        model = SupraForCausalLM._from_config(config)
    dtype = dtype or config.dtype or torch.float32
    arch = archs.get(config.swap.base)
    attentions = [getattr(block, arch.slot) for block in arch.layers(model)]
    specs = [arch.shape(attention) for attention in attentions]
    kept = [spec.window for spec, kind in zip(specs, config.swap.layers, strict=True) if kind == SOFTMAX]
    swapped = [spec for spec, kind in zip(specs, config.swap.layers, strict=True) if kind != SOFTMAX]
    states = [a.mixer.init_state(1, torch.device("meta")) for a in attentions if isinstance(a, SwappedAttention)]
    parameters = dict(model.named_parameters())
    new = sum(parameters[name].numel() for name in mixer_names(model))
    total = sum(parameter.numel() for parameter in parameters.values())
    return ModelPlan(
        model_type=config.swap.base,
        layers=tuple(config.swap.layers),
        parameters=total,
        new_parameters=new,
        dtype=str(dtype).removeprefix("torch."),
        weight_bytes=total * dtype.itemsize,
        new_weight_bytes=new * dtype.itemsize,
        state_bytes=sum(tensor.nbytes for state in states for tensor in state),
        softmax_windows=tuple(kept),
        softmax_token_bytes=specs[0].kv_heads * (specs[0].head_dim + specs[0].v_dim) * dtype.itemsize,
        base_windows=tuple(spec.window for spec in specs),
        dropped=tuple(_dropped(swapped, mixers.get(config.swap.mixer).softens)),
    )


def _dropped(swapped: list[HeadSpec], softens: bool) -> Iterator[str]:
    for window, layers in Counter(spec.window for spec in swapped if spec.window).items():
        yield f"the window of {window:,} tokens, in {layers} of the layers"
    if capped := sum(spec.softcap is not None for spec in swapped if not softens):
        yield f"the soft cap of scores, in {capped} of the layers"
