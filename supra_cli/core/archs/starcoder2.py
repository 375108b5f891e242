"""StarCoder 2: Llama's layout, with dropout behind the output projection."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from supra_cli.core.archs import archs, everywhere
from supra_cli.core.archs.llama import LLAMA


def out(attention: nn.Module, o: Tensor) -> Tensor:
    return nn.functional.dropout(attention.o_proj(o), attention.residual_dropout, attention.training)


ODD = {"sliding_window": 7, "residual_dropout": 0.5}
archs.register("starcoder2")(replace(LLAMA, out=out, window=everywhere, oddities=ODD))
