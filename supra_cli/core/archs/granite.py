"""Granite: Llama's layout; its multipliers are in the blocks, in the scale of the scores and in the head."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from supra_cli.core.archs import archs
from supra_cli.core.archs.llama import LLAMA


def head(model: nn.Module, hidden: Tensor) -> Tensor:
    return model.lm_head(hidden) / model.config.logits_scaling


MULTIPLIERS = {
    "attention_multiplier": 0.2,
    "embedding_multiplier": 3.0,
    "logits_scaling": 4.0,
    "residual_multiplier": 0.7,
}
archs.register("granite")(replace(LLAMA, head=head, oddities=MULTIPLIERS))
