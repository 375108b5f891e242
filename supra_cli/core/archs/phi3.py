"""Phi-3 and Phi-4: one projection for queries, keys and values, one after the other; the rest is Llama's."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from supra_cli.core.archs import Positions, archs, everywhere
from supra_cli.core.archs.llama import LLAMA


def qkv(attention: nn.Module, x: Tensor, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
    heads, kv_heads = attention.config.num_attention_heads, attention.num_key_value_heads
    fused = attention.qkv_proj(x).view(*x.shape[:-1], -1, attention.head_dim)
    q, k, v = fused.split((heads, kv_heads, kv_heads), dim=-2)
    return q, k, v


archs.register("phi3")(replace(LLAMA, qkv=qkv, window=everywhere))
