"""Models of a real shape with drawn weights: time does not depend on what the weights are."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig

from supra_cli.core import checkpoint, hub
from supra_cli.core.modeling import SupraConfig, SupraForCausalLM
from supra_cli.core.recipe.keep import SOFTMAX


def configs(model: str, mixers: tuple[str, ...]) -> dict[str, SupraConfig]:
    """The shape of `model` with each mixer in every layer; a converted model's own mixer and layers are kept."""
    found = checkpoint.read_config(hub.config_folder(hub.resolve(model)))
    if found.swap.any:
        return {SOFTMAX: SupraConfig.from_base(found), found.swap.mixer: found}
    return {mixer: SupraConfig.from_base(found, mixer=mixer) for mixer in mixers}


def draw(config: PreTrainedConfig, device: str, dtype: torch.dtype) -> SupraForCausalLM:
    torch.manual_seed(0)
    with torch.device(device):
        return SupraForCausalLM._from_config(config, dtype=dtype)
