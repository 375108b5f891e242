"""AdamW, in three places for its state, over four groups of parameters, and the course of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from supra_cli.core import recipe
from supra_cli.core.swap import mixer_names, swapped_layers
from supra_cli.core.train import lowbit
from supra_cli.core.train.offload import OffloadedAdamW
from supra_cli.core.train.sharding import rounded

_OF_MATRICES = (nn.Linear, nn.modules.conv._ConvNd)


def matrices(model: nn.Module) -> set[str]:
    """The names of the parameters that weight decay is for: in the base those of two dimensions or more, routers and
    experts among them; in mixers the weights of linear maps and convolutions, and what a module of another kind names
    in its `matrices`.

    In mixers the number of dimensions does not tell: a gain for each head is [H,1], its biases are [H,F].
    """
    of_mixers = mixer_names(model)
    named = {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.dim() > 1 and name not in of_mixers
    }
    for path, layer in swapped_layers(model):
        for part, module in layer.mixer.named_modules(prefix=f"{path}.mixer"):
            own = ("weight",) if isinstance(module, _OF_MATRICES) else getattr(module, "matrices", ())
            named.update(f"{part}.{name}" for name in own)
    return named


def adamw(
    model: nn.Module,
    parameters: Iterable[tuple[str, nn.Parameter]],
    stage: recipe.Stage,
    dtype: torch.dtype = torch.float32,
    *,
    alone: bool = True,
) -> torch.optim.Optimizer:
    """AdamW on (name, parameter) pairs of `model`: base and mixer parameters at their own peak rates, decay on
    `matrices` only.

    With `adamw-offload` on one rank, which is `alone`, those parameters that FSDP2 would round on several are in
    `dtype` from here on, and what the optimizer holds are the fp32 masters of all; on several, FSDP2 keeps the
    parameters themselves in CPU memory, and where losses fall inside the model it is plain AdamW. Raises UsageError for
    `adamw8bit` without torchao.
    """
    mixer_lr = stage.lr if stage.mixer_lr is None else stage.mixer_lr
    of_mixers, decaying = mixer_names(model), matrices(model)
    groups: dict[tuple[bool, bool], dict] = {}
    for name, parameter in parameters:
        new, matrix = name in of_mixers, name in decaying
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
    settings = {"lr": 0.0, "betas": stage.betas, "eps": 1e-8}
    match stage.optimizer:
        case "adamw8bit":
            return lowbit.adamw8bit(list(groups.values()), **settings)
        case "adamw-offload" if alone:
            held = set() if dtype == torch.float32 else rounded(model)
            return OffloadedAdamW(list(groups.values()), held, dtype, **settings)
    return torch.optim.AdamW(list(groups.values()), fused=True, **settings)


def masters(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The fp32 weights that the optimizer holds in place of the model, by name."""
    if not isinstance(optimizer, OffloadedAdamW):
        return {}
    groups = optimizer.param_groups
    return {name: master for group in groups for name, master in zip(group["names"], group["params"], strict=True)}


def moment_bytes(optimizer: str, numbers: int) -> int:
    """Of both moments of a parameter of that many numbers, wherever they lie."""
    return lowbit.moment_bytes(numbers) if optimizer == "adamw8bit" else 2 * 4 * numbers


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
        rate = group["peak_lr"] * factor
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
