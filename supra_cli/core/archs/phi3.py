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


HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
"""Half of a head rotated, as in Phi-4-mini."""
archs.register("phi3")(
    replace(
        LLAMA, qkv=qkv, window=everywhere, oddities={"sliding_window": 7, "resid_pdrop": 0.5, "rope_parameters": HALF}
    )
)
