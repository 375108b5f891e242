"""OLMo 2 and 3: Llama's layout, queries and keys normed over all heads at once."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from supra_cli.core.archs import SLIDING, Positions, archs, by_kind
from supra_cli.core.archs.llama import LLAMA


def qkv(attention: nn.Module, x: Tensor, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
    heads = (*x.shape[:-1], -1, attention.head_dim)
    q, k = attention.q_norm(attention.q_proj(x)), attention.k_norm(attention.k_proj(x))
    return q.view(heads), k.view(heads), attention.v_proj(x).view(heads)


archs.register("olmo2")(replace(LLAMA, qkv=qkv))
archs.register("olmo3")(replace(LLAMA, qkv=qkv, window=by_kind, oddities=SLIDING))
