"""Random models of every registered base, a few thousand parameters each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from supra_cli.core.data import tokenizer as bpe
from supra_cli.core.layout import Layout
from supra_cli.core.mixers.softmax import Softmax
from supra_cli.core.modeling import SupraConfig, SupraForCausalLM
from supra_cli.core.swap import SwappedAttention

VOCABULARY = 97
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 8192,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Large enough for the logits to depend on the whole past, not just on the last token.
    "initializer_range": 0.2,
}

EXPERTS = ("mixtral", "qwen3_moe")
"""Bases that are mixtures of experts."""

_SLIDING = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_EXPERTS = {"num_experts_per_tok": 2, "router_jitter_noise": 0.0}

ODDITIES: dict[str, dict[str, Any]] = {
    "gemma2": {**_SLIDING, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0},
    "gemma3_text": {**_SLIDING, "query_pre_attn_scalar": 20, "final_logit_softcapping": 2.0},
    "granite": {
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
        "logits_scaling": 4.0,
        "residual_multiplier": 0.7,
    },
    "ministral": _SLIDING,
    "ministral3": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "original_max_position_embeddings": 4,
            "llama_4_scaling_beta": 0.3,
        }
    },
    "mistral": {"sliding_window": 7},
    "mixtral": {**_EXPERTS, "num_local_experts": 4},
    "olmo3": _SLIDING,
    "phi3": {
        "sliding_window": 7,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    "qwen2": {**_SLIDING, "use_sliding_window": True},
    "qwen3_moe": {**_EXPERTS, "num_experts": 4, "moe_intermediate_size": 16},
    "smollm3": {**_SLIDING, "use_sliding_window": True, "no_rope_layers": [1, 0, 1]},
    "stablelm": {"qk_layernorm": True, "use_qkv_bias": True},
}
"""What is peculiar to a base and off, or too rare to be seen, in three small layers by default."""


def tiny_config(base: str, **changes: Any) -> PreTrainedConfig:
    kind = CONFIG_MAPPING[base]
    known = {field.name for field in fields(kind)}
    shape = _SHAPE | ODDITIES.get(base, {}) | changes
    for name in ("layer_types", "no_rope_layers"):
        if shape.get(name) and name not in changes:
            shape[name] = (shape[name] * shape["num_hidden_layers"])[: shape["num_hidden_layers"]]
    return kind(**{name: value for name, value in shape.items() if kind.attribute_map.get(name, name) in known})


def tiny_model(
    base: str = "llama",
    mixer: str = "supra",
    keep: str = "none",
    options: dict | None = None,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> SupraForCausalLM:
    config = SupraConfig.from_base(tiny_config(base, **changes)).with_mixer(mixer, options, keep)
    return SupraForCausalLM._from_config(config, dtype=dtype).eval()


def of_words(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """What the config of a model that speaks the tokenizer's tokens has to say of them."""
    ends = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {"vocab_size": len(tokenizer), **ends}


def attention(base: str) -> dict[str, str]:
    """How a plain base is to compute: Gemma 2 not by sdpa, which has no soft cap and which older transformers take."""
    return {"attn_implementation": "eager"} if base == "gemma2" else {}


def wide(base: str) -> dict[str, int]:
    """Changes by which the base's own windows are longer than any row."""
    return {"sliding_window": 64} if getattr(tiny_config(base), "sliding_window", None) else {}


def softmax_heads(layer: SwappedAttention, x: Tensor, layout: Layout | None = None, **call: Any) -> Tensor:
    """The base's heads [B,T,H,V] in a swapped layer, before the output projection: what the mixer replaced."""
    return Softmax(layer.mixer.spec, Softmax.Options())(*layer.inputs(x, **call), None, layout)[0]


def save_base(path: Path, texts: Iterable[str], kind: str = "llama", **changes: Any) -> Path:
    """A plain base and a tokenizer of 300 tokens of `texts`, as transformers saves them."""
    tokenizer = bpe.train(texts, 300)
    torch.manual_seed(0)
    config = tiny_config(kind, **of_words(tokenizer), **changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def tokens(*shape: int, seed: int = 1) -> Tensor:
    """Random ids that are neither padding nor special."""
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))
