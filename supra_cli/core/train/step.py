"""One optimizer step: the passes over its micro-batches, one mean over all their tokens, clip, update or refuse to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from supra_cli.core.data.packing import Batch
from supra_cli.core.stages import Stage
from supra_cli.core.train import lowbit

SAMPLED_NUMBERS = 1 << 16
"""How many weights `Stepper.swallowed` watches."""


@dataclass(frozen=True)
class Outcome:
    """Means over the scored tokens of the step, and the gradient's norm before clipping."""

    loss: float
    grad_norm: float
    metrics: dict[str, float]

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class Stepper:
    """Takes the steps of one stage."""

    def __init__(
        self,
        stage: Stage,
        student: nn.Module,
        teacher: nn.Module | None,
        optimizer: torch.optim.Optimizer,
        clip_norm: float,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.optimizer = optimizer
        self._stage = stage
        self._student = student
        self._teacher = teacher
        self._clip_norm = clip_norm
        self._device = device
        self._dtype = dtype
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def take(self, micro_batches: Sequence[Batch]) -> Outcome:
        """One step on all micro-batches; none at all, and no gradient left, if loss or gradient are not finite."""
        scored = max(1, sum(self._stage.scored(batch) for batch in micro_batches))  # rows may have nothing to predict
        sums: dict[str, Tensor] = {}
        for batch in micro_batches:
            with self._stage.attached(self._student):
                with computing_in(self._dtype, self._device):
                    loss = self._stage.loss(self._student, self._teacher, batch.to(self._device))
                (loss.sum / scored).backward()
            for name, value in {"loss": loss.sum.detach(), **loss.metrics}.items():
                sums[name] = sums.get(name, 0) + value
        norm = float(nn.utils.clip_grad_norm_(self._parameters, self._clip_norm))
        means = {name: float(value) / scored for name, value in sums.items()}
        outcome = Outcome(means.pop("loss"), norm, means)
        if outcome.finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return outcome

    def watch(self) -> list[tuple[Tensor, Tensor]]:
        """(parameter, its sampled values now) for `swallowed`, about `SAMPLED_NUMBERS` values in all."""
        return [(parameter, self._sample(parameter.detach()).clone()) for parameter in self._parameters]

    def _sample(self, values: Tensor) -> Tensor:
        total = sum(parameter.numel() for parameter in self._parameters)
        return values.flatten()[:: max(1, total // SAMPLED_NUMBERS)]

    def swallowed(self, watched: list[tuple[Tensor, Tensor]]) -> float:
        """Share of the sampled weights with a moment of their own that the step left exactly as they were.

        Updates below half a unit in the last place of a weight vanish: in bf16 those under 0.4 % of it.
        """
        still = moved = 0
        for parameter, before in watched:
            state = self.optimizer.state.get(parameter, {})
            if "exp_avg" not in state:
                continue
            meant = self._sample(lowbit.values(state["exp_avg"])) != 0
            same = self._sample(parameter.detach()) == before
            still += int((same & meant).sum())
            moved += int(meant.sum())
        return still / moved if moved else 0.0


def computing_in(dtype: torch.dtype, device: torch.device) -> AbstractContextManager:
    """Autocast to `dtype`; nothing for fp32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
