"""AdamW with fp32 weights, gradients and moments in CPU memory; the device has copies to compute with."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor, nn


class OffloadedAdamW(torch.optim.AdamW):
    """w ← AdamW(w, Σ g) in fp32 on the CPU, then weight on the device ← w, rounded where it is held rounded there.

    What it optimises, `param_groups[...]["params"]`, are the fp32 masters in CPU memory; everything that reads an
    optimizer (clipping, saving, restoring) finds plain tensors there. Each gradient leaves the device as soon as it is
    complete and is added up in fp32, so the device never holds more than a few of them. On the CPU and in fp32 this is
    AdamW bit for bit.
    """

    def __init__(
        self, groups: list[dict[str, Any]], rounded: Container[nn.Parameter], dtype: torch.dtype, **settings: Any
    ):
        """`groups` hold the model's fp32 parameters; from now on those of them that are `rounded` are in `dtype`."""
        self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        for group in groups:
            masters = [_master(parameter) for parameter in group["params"]]
            self._pairs += zip(group["params"], masters, strict=True)
            group["params"] = masters
        super().__init__(groups, fused=True, **settings)
        for parameter, master in self._pairs:
            parameter.data = parameter.data.to(dtype if parameter in rounded else torch.float32, copy=True)
            parameter.register_post_accumulate_grad_hook(_hand_over(master))

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = super().step(closure)
        for parameter, master in self._pairs:
            parameter.copy_(master)
        return loss


def _master(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to("cpu", torch.float32, copy=True))


def _hand_over(master: nn.Parameter) -> Callable[[Tensor], None]:
    def take(parameter: Tensor) -> None:
        gradient = parameter.grad.to("cpu", torch.float32)
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        parameter.grad = None

    return take
