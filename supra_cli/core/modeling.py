"""The Hugging Face face of a swapped model: config, causal language model, registration with the Auto classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from supra_cli.core.archs import archs
from supra_cli.core.errors import SupraError
from supra_cli.core.layout import Layout, derive, softmax_mask
from supra_cli.core.mixers import mixers, parse_options
from supra_cli.core.recipe.keep import SOFTMAX, layer_kinds
from supra_cli.core.swap import SwappedAttention, swap, swapped_layers

Objective = Callable[[Tensor, Callable[[Tensor], Tensor]], Any]
"""(hidden [B,T,D], head: hidden -> logits) -> anything."""


class Swap(NamedTuple):
    """What was exchanged in a model: the key `supra` of its config."""

    base: str
    """The base's `model_type`."""
    mixer: str
    options: dict[str, Any]
    layers: list[str]
    """The kind of each layer: the mixer's name, or softmax."""

    @property
    def any(self) -> bool:
        return any(kind != SOFTMAX for kind in self.layers)

    def check(self, layers: int) -> None:
        """Raise a ValueError unless every one of the model's layers has a kind, the mixer's or softmax."""
        if len(self.layers) != layers or not set(self.layers) <= {self.mixer, SOFTMAX}:
            raise ValueError(f"expected {layers} layers of kind '{self.mixer}' or '{SOFTMAX}', got {self.layers}")


class SupraConfig(PreTrainedConfig):
    """The base's config whole, plus what was exchanged.

    Instances are of a subclass made for each base, `SupraLlamaConfig(LlamaConfig, SupraConfig)`, so every attribute,
    default and check of the base's config holds. Written without any swapped layer it is the base's plain config
    again.
    """

    model_type = "supra"
    supra: dict | None = None

    @classmethod
    def from_base(
        cls,
        base: PreTrainedConfig,
        *,
        mixer: str = SOFTMAX,
        options: Mapping[str, Any] | None = None,
        layers: Sequence[str] | None = None,
    ) -> SupraConfig:
        """The config of `base` with `mixer` in the layers whose kind in `layers` is not softmax (all, if None)."""
        if isinstance(base, SupraConfig):
            base = base.plain()
        kinds = [mixer] * base.num_hidden_layers if layers is None else list(layers)
        record = Swap(base.model_type, mixer, asdict(parse_options(mixer, options or {})), kinds)
        record.check(base.num_hidden_layers)
        config = family(record.base).config(**_fields(base), supra=record._asdict())
        config._attn_implementation = base._attn_implementation
        return config

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> SupraConfig:
        if cls is SupraConfig:
            return family(config_dict["supra"]["base"]).config.from_dict(config_dict, **kwargs)
        return super().from_dict(config_dict, **kwargs)

    @property
    def swap(self) -> Swap:
        return Swap(**self.supra)

    def with_mixer(self, mixer: str, options: Mapping[str, Any] | None = None, keep: str = "none") -> SupraConfig:
        """The base with `mixer` in every layer that `keep`, as `layer_kinds` reads it, does not spare."""
        layers = layer_kinds(self.num_hidden_layers, mixer, keep)
        return self.from_base(self, mixer=mixer, options=options, layers=layers)

    def plain(self) -> PreTrainedConfig:
        """The base's own config."""
        config = CONFIG_MAPPING[self.swap.base](**_fields(self))
        config._attn_implementation = self._attn_implementation
        return config

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        if self.supra is None:
            return output
        if self.swap.any:
            return output | {"architectures": [SupraForCausalLM.__name__]}
        del output["supra"]
        base = family(self.swap.base).base
        return output | {"model_type": self.swap.base, "architectures": [base.__name__]}


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        k: v
        for k, v in config.to_dict().items()
        if k not in ("model_type", "architectures", "transformers_version", "supra")
    }


class SupraForCausalLM(PreTrainedModel):
    """A causal language model of any base with mixers in place of some, all or none of its attention.

    Instances are of a subclass made for each base, `SupraLlamaForCausalLM(SupraForCausalLM, LlamaForCausalLM)`:
    parameter names, generation and saving are the base's own.
    """

    config_class = SupraConfig

    def __init__(self, config: SupraConfig):
        super().__init__(config)
        record = config.swap
        record.check(config.num_hidden_layers)
        self.arch = archs.get(record.base)
        swap(self, self.arch, mixers.get(record.mixer), parse_options(record.mixer, record.options), record.layers)

    @classmethod
    def _from_config(cls, config: SupraConfig, **kwargs: Any) -> SupraForCausalLM:
        if cls is SupraForCausalLM:
            return family(config.swap.base).model._from_config(config, **kwargs)
        return super()._from_config(config, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *args: Any,
        config: PreTrainedConfig | None = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As transformers does it, but strict: a missing, unexpected or misshapen tensor is a SupraError that names
        it.
        """
        if cls is SupraForCausalLM:
            config = config or AutoConfig.from_pretrained(name)
            config = config if isinstance(config, SupraConfig) else SupraConfig.from_base(config)
            cls = family(config.swap.base).model
            return cls.from_pretrained(name, *args, config=config, output_loading_info=output_loading_info, **kwargs)
        model, found = super().from_pretrained(name, *args, config=config, output_loading_info=True, **kwargs)
        for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if found[fault]:
                first = sorted(map(str, found[fault]))[0]
                raise SupraError(
                    f"{name} has {fault.replace('_', ' ')} for its config.json, '{first}' first; restore its files"
                )
        return (model, found) if output_loading_info else model

    @property
    def supra(self) -> Swap:
        return self.config.swap

    def swapped_layers(self) -> Iterator[tuple[str, SwappedAttention]]:
        """(name, layer) of every swapped attention, in order."""
        return swapped_layers(self)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        objective: Objective | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | Any:
        """Logits [B,T,vocab] as the base returns them or, with `objective`, what objective(hidden, head) returns.

        `attention_mask` [B, past + T] marks real tokens; `position_ids` [B,T] that restart at 0 begin a new document.
        Left padding changes no logit and documents do not see each other, in softmax layers and in swapped ones.
        """
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        layout, position_ids = derive(attention_mask, position_ids, *inputs.shape[:2])
        packed, attends = layout is not None and layout.packed, SOFTMAX in self.supra.layers
        if use_cache is None and past_key_values is None and (self.training or packed or objective is not None):
            use_cache = False
        if packed and attends and (use_cache or past_key_values is not None):
            raise ValueError(
                "packed rows cannot be cached by softmax layers, got position_ids that restart; pass one document a row"
            )
        call = dict(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask if attends and not packed else self._softmax_mask(layout),
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        if self.supra.any:
            call["layout"] = layout
        if objective is None:
            return super().forward(labels=labels, logits_to_keep=logits_to_keep, **call)
        return objective(self.base_model(**call).last_hidden_state, partial(self.arch.head, self))

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
        """`generate` would make the 4-D mask itself for a static cache; `forward` must see where the padding is."""
        return attention_mask

    def _softmax_mask(self, layout: Layout | None) -> Any:
        """The 4-D mask of packed rows, which not every base recognises, by kind of layer where the base has several.

        Without softmax layers an empty one, so that the base makes none: it would be quadratic in T.
        """
        if SOFTMAX not in self.supra.layers:
            return torch.empty((1, 1, 0, 0), device=self.device)
        tokens = layout.segment.shape[1]
        masked = partial(softmax_mask, layout, tokens, dtype=self.dtype, device=layout.segment.device)
        kinds, window = getattr(self.config, "layer_types", None), getattr(self.config, "sliding_window", None)
        if kinds is None:
            return masked(window=window)
        return {kind: masked(window=window if kind == "sliding_attention" else None) for kind in set(kinds)}


class Family(NamedTuple):
    """The classes of one base: its own model, and our config and model made from it."""

    base: type[PreTrainedModel]
    config: type[SupraConfig]
    model: type[SupraForCausalLM]


@cache
def family(base: str) -> Family:
    """The classes for a base's `model_type`, registered with AutoModelForCausalLM; a UsageError without an arch."""
    archs.get(base)
    base_config = CONFIG_MAPPING[base]
    base_model = AutoModelForCausalLM._model_mapping[base_config]
    module = {"__module__": __name__}
    config = type(f"Supra{base_config.__name__}", (base_config, SupraConfig), {"model_type": "supra", **module})
    model = type(f"Supra{base_model.__name__}", (SupraForCausalLM, base_model), {"config_class": config, **module})
    AutoModelForCausalLM.register(config, model, exist_ok=True)
    # transformers renames some tensors of old checkpoints (NeoX's embed_out) by class name or model type; ours has
    # neither.
    renames = get_checkpoint_conversion_mapping(base_model.__name__) or get_checkpoint_conversion_mapping(base)
    if renames:
        register_checkpoint_conversion_mapping(model.__name__, renames, overwrite=True)
    return Family(base_model, config, model)


def register() -> None:
    """Make `AutoConfig` and `AutoModelForCausalLM` know the model type `supra`."""
    AutoConfig.register("supra", SupraConfig, exist_ok=True)
    AutoModelForCausalLM.register(SupraConfig, SupraForCausalLM, exist_ok=True)


register()
