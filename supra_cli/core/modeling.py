"""The Hugging Face face of a swapped model: the causal language model, of a class for each base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from supra_cli.core import cache as caches
from supra_cli.core.archs import archs
from supra_cli.core.backbone import swapped_backbone
from supra_cli.core.config import SupraConfig, Swap, config_class
from supra_cli.core.errors import SupraError
from supra_cli.core.mixers import mixers, parse_options
from supra_cli.core.swap import SwappedAttention, swap, swapped_layers

Objective = Callable[[Tensor, Callable[[Tensor], Tensor]], Any]
"""(hidden [B,T,D], head: hidden -> logits) -> anything."""


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
        stack = self.arch.stack(self)
        stack.__class__ = swapped_backbone(type(stack))
        attention = getattr(self.arch.layers(self)[0], self.arch.slot)
        if self.arch.spec(attention).softcap is not None and config._attn_implementation == "sdpa":
            config._attn_implementation = "eager"  # sdpa leaves the cap out, in older transformers without a word
        swap(self, self.arch, mixers.get(record.mixer), parse_options(record.mixer, record.options), record.layers)

    @classmethod
    def _from_config(cls, config: SupraConfig, **kwargs: Any) -> SupraForCausalLM:
        if cls is SupraForCausalLM:
            return model_class(config.swap.base)._from_config(config, **kwargs)
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
            cls = model_class(config.swap.base)
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
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        objective: Objective | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | Any:
        """Logits [B,T,vocab] as the base returns them or, with `objective`, what objective(hidden, head) returns.

        `attention_mask` [B, past + T] marks real tokens; `position_ids` [B,T] that restart at 0 begin a new document.
        Left padding changes no logit and documents do not see each other, in softmax layers and in swapped ones.
        `cache` and `past_key_values` are one argument's new and old name.
        """
        cache = caches.handed({"cache": cache, "past_key_values": past_key_values})
        call = dict(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **({} if cache is None else {self.arch.stack(self).cache_keyword: cache}),
            **kwargs,
        )
        if objective is None:
            return super().forward(labels=labels, logits_to_keep=logits_to_keep, **call)
        if cache is None and use_cache is None:
            call["use_cache"] = False
        return objective(self.arch.stack(self)(**call).last_hidden_state, partial(self.arch.head, self))

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
        """`generate` would make the 4-D mask itself for a static cache; `forward` must see where the padding is."""
        return attention_mask

    def _valid_auto_compile_criteria(self, *args: Any, **kwargs: Any) -> bool:
        """Never: `generate` would compile the step of a static cache on a GPU, where a state that counts its tokens and
        is replaced by each step is compiled anew each time. `supra generate --compile` does it right."""
        return False

    def _assisted_decoding(self, *args: Any, **kwargs: Any) -> Any:
        if not self.supra.any:
            return super()._assisted_decoding(*args, **kwargs)
        raise ValueError(
            "a recurrent state cannot forget the tokens that an assistant guessed wrong; generate without "
            "assistant_model and prompt_lookup_num_tokens"
        )

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        # All-softmax models too: pages go by a mask of their own, past which our layout would not be seen.
        raise ValueError(
            "continuous batching keeps pages of keys and values, which recurrent layers do not have; use generate() on "
            "padded batches"
        )

    generate_batch = continuous_batching_context_manager = init_continuous_batching


@cache
def model_class(base: str) -> type[SupraForCausalLM]:
    """The model class for a base's `model_type`, registered with AutoModelForCausalLM; a UsageError without an arch."""
    config = config_class(base)
    plain = AutoModelForCausalLM._model_mapping[CONFIG_MAPPING[base]]
    members = {"config_class": config, "__module__": __name__}
    model = type(f"Supra{plain.__name__}", (SupraForCausalLM, plain), members)
    AutoModelForCausalLM.register(config, model, exist_ok=True)
    # transformers renames some tensors of old checkpoints (NeoX's embed_out) by class name or model type; ours has
    # neither.
    renames = get_checkpoint_conversion_mapping(plain.__name__) or get_checkpoint_conversion_mapping(base)
    if renames:
        register_checkpoint_conversion_mapping(model.__name__, renames, overwrite=True)
    return model


def __getattr__(name: str) -> type[SupraForCausalLM]:
    """`SupraLlamaForCausalLM` and its like by name, as pickle looks for them in another process."""
    for base in archs if name.startswith("Supra") else ():
        if name == f"Supra{MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(base)}":
            return model_class(base)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
