"""Ministral 3: Llama's layout, in which a query grows with its position."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from supra_cli.core.archs import Arch, Positions, archs, everywhere
from supra_cli.core.archs.llama import LLAMA, qkv

ROPE = ("original_max_position_embeddings", "llama_4_scaling_beta")


def scaled_qkv(attention: nn.Module, x: Tensor, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
    """q_i · (1 + β ln(1 + ⌊i / L⌋)), L being the length that the base was first trained on."""
    q, k, v = qkv(attention, x, positions)
    length, beta = (attention.config.rope_parameters[name] for name in ROPE)
    factor = 1 + beta * (positions.index / length).floor().log1p()
    return q * factor[..., None, None].to(q.dtype), k, v


SOON = {
    "rope_type": "default",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 4,
    "llama_4_scaling_beta": 0.3,
}
"""Queries that grow from the fourth position on."""
ODD = {"sliding_window": 7, "rope_parameters": SOON}
MINISTRAL3: Arch = replace(LLAMA, qkv=scaled_qkv, window=everywhere, rope=ROPE, oddities=ODD)

archs.register("ministral3")(MINISTRAL3)
