"""AdamW over four groups of parameters, and the course of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from supra_cli.core import recipe


def is_mixer(name: str) -> bool:
    """Whether a parameter is new: it belongs to a mixer, not to the base."""
    return ".mixer." in name


def adamw(parameters: Iterable[tuple[str, nn.Parameter]], stage: recipe.Stage) -> torch.optim.AdamW:
    """AdamW on (name, parameter) pairs: base and mixer parameters at their own peak rates, decay on matrices only."""
    mixer_lr = stage.lr if stage.mixer_lr is None else stage.mixer_lr
    groups: dict[tuple[bool, bool], dict] = {}
    for name, parameter in parameters:
        new, matrix = is_mixer(name), parameter.ndim >= 2
        group = groups.setdefault(
            (new, matrix),
            {
                "params": [],
                "names": [],
                "peak_lr": mixer_lr if new else stage.lr,
                "weight_decay": stage.weight_decay if matrix else 0.0,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return torch.optim.AdamW(list(groups.values()), lr=0.0, betas=stage.betas, eps=1e-8, fused=True)


def lr_factor(step: int, steps: int, stage: recipe.Stage) -> float:
    """Share of the peak rate at optimizer step `step` (0-based) of `steps`: linear warm-up, then the stage's schedule.

    cosine: f + (1 − f)·(1 + cos πu)/2, linear: 1 − (1 − f)·u, with u the share of the steps after the warm-up that is
    over and f the final share.
    """
    if step < stage.warmup_steps:
        return (step + 1) / stage.warmup_steps
    over = (step - stage.warmup_steps) / max(1, steps - 1 - stage.warmup_steps)
    over = min(1.0, over)
    if stage.schedule == "constant":
        return 1.0
    shape = (1 + math.cos(math.pi * over)) / 2 if stage.schedule == "cosine" else 1 - over
    return stage.final_lr_fraction + (1 - stage.final_lr_fraction) * shape


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
