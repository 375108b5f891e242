"""The Hugging Face face of a swapped model: the causal language model, of a class for each base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from supra_cli.core import cache as caches
from supra_cli.core.archs import archs
from supra_cli.core.backbone import swapped_backbone
from supra_cli.core.config import SupraConfig, Swap, config_class
from supra_cli.core.errors import SupraError
from supra_cli.core.mixers import mixers, parse_options
from supra_cli.core.swap import SwappedAttention, swap, swapped_layers

Objective = Callable[[Tensor, Callable[[Tensor], Tensor]], Any]
"""(hidden [B,T,D], head: hidden -> logits) -> anything."""

_WHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""What `from_pretrained` is told of where files are, and so for the config too."""


class SupraPreTrainedModel(PreTrainedModel):
    """What models with and without a head share: how one is made of its base, and strict loading.

    Instances are of a subclass made for each base by `model_class`, `SupraLlamaForCausalLM(SupraForCausalLM,
    LlamaForCausalLM)`: parameter names, generation and saving are the base's own.
    """

    config_class = SupraConfig
    auto: type
    """The Auto class of models of this kind."""

    def __init__(self, config: SupraConfig):
        super().__init__(config)
        record = config.swap
        record.check(config.num_hidden_layers)
        self.arch = archs.get(record.base)
        stack = self.arch.stack(self)
        if stack is not self:
            stack.__class__ = swapped_backbone(type(stack))
        attention = getattr(self.arch.layers(self)[0], self.arch.slot)
        if self.arch.spec(attention).softcap is not None and config._attn_implementation == "sdpa":
            config._attn_implementation = "eager"  # sdpa leaves the cap out, in older transformers without a word
        swap(self, self.arch, mixers.get(record.mixer), parse_options(record.mixer, record.options), record.layers)

    @classmethod
    def _from_config(cls, config: SupraConfig, **kwargs: Any) -> SupraPreTrainedModel:
        if SupraPreTrainedModel in cls.__bases__:
            return model_class(config.swap.base, cls)._from_config(config, **kwargs)
        return super()._from_config(config, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        *args: Any,
        config: PreTrainedConfig | None = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As transformers does it, but strict: a missing, unexpected or misshapen tensor is a SupraError that names
        it.
        """
        name = pretrained_model_name_or_path
        if SupraPreTrainedModel in cls.__bases__:
            config = config or AutoConfig.from_pretrained(name, **{key: kwargs[key] for key in _WHERE if key in kwargs})
            config = config if isinstance(config, SupraConfig) else SupraConfig.from_base(config)
            cls = model_class(config.swap.base, cls)
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


class SupraModel(SupraPreTrainedModel):
    """The stack of decoder blocks alone, for callers who want `last_hidden_state` or put a head of their own on it.

    `SupraLlamaModel(SupraModel, SwappedLlamaModel)` is the stack of `SupraLlamaForCausalLM`, loaded from the same
    directory.
    """

    auto = AutoModel


class SupraForCausalLM(SupraPreTrainedModel):
    """A causal language model of any base with mixers in place of some, all or none of its attention."""

    auto = AutoModelForCausalLM

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
def model_class(base: str, kind: type[SupraPreTrainedModel] = SupraForCausalLM) -> type[SupraPreTrainedModel]:
    """The model class of a kind for a base's `model_type`, registered with its Auto class; a UsageError without an
    arch.
    """
    config = config_class(base)
    plain = kind.auto._model_mapping[CONFIG_MAPPING[base]]
    causal = AutoModelForCausalLM._model_mapping[CONFIG_MAPPING[base]]
    members = {"config_class": config, "__module__": __name__}
    # transformers guesses by the source of the class's module whether experts may be computed in groups.
    members["_can_set_experts_implementation"] = classmethod(lambda cls: plain._can_set_experts_implementation())
    # A constant that old checkpoints of GPT-2 carry, and that transformers knows no more.
    ignored = [*(plain._keys_to_ignore_on_load_unexpected or ()), r"attn\.masked_bias$"]
    parent = plain
    if kind is SupraModel:
        if archs.get(base).decoder is None:  # the model is its own stack
            parent = swapped_backbone(plain)
        heads = {name.partition(".")[0] for name in causal._tied_weights_keys or ("lm_head.weight",)}
        ignored += [rf"^{head}\." for head in heads]
    members["_keys_to_ignore_on_load_unexpected"] = ignored
    model = type(f"Supra{plain.__name__}", (kind, parent), members)
    kind.auto.register(config, model, exist_ok=True)
    # transformers renames some tensors of old checkpoints (NeoX's embed_out) by class name or model type; ours has
    # neither. One without a head needs the head's too, to know the tensors that it leaves.
    renames = get_checkpoint_conversion_mapping(causal.__name__) or get_checkpoint_conversion_mapping(base)
    if renames:
        register_checkpoint_conversion_mapping(model.__name__, renames, overwrite=True)
    return model


def __getattr__(name: str) -> type[SupraPreTrainedModel]:
    """`SupraLlamaForCausalLM` and its like by name, as pickle looks for them in another process."""
    for base in archs if name.startswith("Supra") else ():
        for kind, names in ((SupraForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), (SupraModel, MODEL_MAPPING_NAMES)):
            if name == f"Supra{names.get(base)}":
                return model_class(base, kind)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


if __name__ == "supra_cli.core.modeling":  # as in core/config
    for _kind in (SupraForCausalLM, SupraModel):
        _kind.auto.register(SupraConfig, _kind, exist_ok=True)
        for _base in archs:
            # A config that is read before any model, as pipelines do: the base's class is made when one is wanted.
            _kind.auto._model_mapping.register(config_class(_base), _kind, exist_ok=True)
