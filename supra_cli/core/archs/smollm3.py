"""SmolLM3: Llama's layout, some layers of which know no positions."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from supra_cli.core.archs import SLIDING, Positions, archs, by_kind, rotary, unrotated
from supra_cli.core.archs.llama import LLAMA
from supra_cli.core.layout import Rotate


def rotation(attention: nn.Module, positions: Positions) -> Rotate:
    return rotary(attention, positions) if attention.use_rope else unrotated(attention, positions)


archs.register("smollm3")(
    replace(
        LLAMA,
        rotation=rotation,
        window=by_kind,
        oddities=SLIDING | {"use_sliding_window": True, "no_rope_layers": [1, 0, 1]},
    )
)
