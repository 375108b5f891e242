"""StableLM: Llama's layout, rotary positions over part of a head and, in some models, a norm for each head."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from supra_cli.core.archs import Positions, archs
from supra_cli.core.archs.llama import LLAMA
from supra_cli.core.archs.llama import qkv as unnormed


def qkv(attention: nn.Module, x: Tensor, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = unnormed(attention, x, positions)
    if attention.qk_layernorm:  # which take heads before tokens
        q = attention.q_layernorm(q.transpose(1, 2)).transpose(1, 2)
        k = attention.k_layernorm(k.transpose(1, 2)).transpose(1, 2)
    return q, k, v


archs.register("stablelm")(
    replace(LLAMA, qkv=qkv, hands_on=False, oddities={"qk_layernorm": True, "use_qkv_bias": True})
)
