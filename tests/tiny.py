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

from supra_cli.core.archs import archs
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
    "init_std": 0.2,
}

EXPERTS = tuple(
    base for base in archs if "num_experts_per_tok" in {field.name for field in fields(CONFIG_MAPPING[base])}
)
"""Bases that are mixtures of experts."""


def tiny_config(base: str, **changes: Any) -> PreTrainedConfig:
    kind = CONFIG_MAPPING[base]
    known = {field.name for field in fields(kind)}
    layers = changes.get("num_hidden_layers", _SHAPE["num_hidden_layers"])
    odd = archs.get(base).oddities if base in archs else {}
    odd = {name: (value * layers)[:layers] if isinstance(value, list) else value for name, value in odd.items()}
    shape = _SHAPE | odd | changes
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
