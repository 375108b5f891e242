"""One optimizer step: the passes over its micro-batches, one mean over all their tokens, clip, update or refuse to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from supra_cli.core.data.packing import Batch
from supra_cli.core.errors import SupraError, UsageError
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
        self._reached = False

    def take(self, micro_batches: Sequence[Batch]) -> Outcome:
        """One step on all micro-batches; none at all, and no gradient left, if loss or gradient are not finite.

        SupraError if a parameter of the first step has no gradient.
        """
        scored = max(1, sum(self._stage.scored(batch) for batch in micro_batches))  # rows may have nothing to predict
        computing = computing_in(self._dtype, self._device)

        def backward(part: Tensor) -> Tensor:
            with _left(computing):
                # Scaled by its gradient: under no_grad, where transfer calls, a quotient would have no graph.
                part.backward(torch.full_like(part, 1 / scored))
            return part.detach()

        sums: dict[str, Tensor] = {}
        for batch in micro_batches:
            with computing:
                loss = self._stage.loss(self._student, self._teacher, batch.to(self._device), backward)
            _add(sums, {"loss": loss.sum, **loss.metrics})
        if not self._reached:
            self._check_gradients()
        norm = float(nn.utils.clip_grad_norm_(self._parameters, self._clip_norm))
        means = {name: float(value) / scored for name, value in sums.items()}
        outcome = Outcome(means.pop("loss"), norm, means)
        if outcome.finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return outcome

    def _check_gradients(self) -> None:
        """A parameter that is said to move and that the loss does not reach would stay as it was drawn, unnoticed."""
        for group in self.optimizer.param_groups:
            for name, parameter in zip(group.get("names", ()), group["params"], strict=False):
                if parameter.grad is None:
                    raise SupraError(
                        f"the loss does not depend on {name}, which this stage is to train; leave that parameter out "
                        "in the stage's `trains`, or mend the mixer or the loss that does not use it"
                    )
        self._reached = True

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


def begin(
    stage: Stage, student: nn.Module, micro_batches: Sequence[Batch], device: torch.device, dtype: torch.dtype
) -> None:
    """Let the stage measure all micro-batches of its first step, and begin with the sums."""
    sums: dict[str, Tensor] = {}
    with torch.no_grad(), computing_in(dtype, device):
        for batch in micro_batches:
            _add(sums, stage.measure(student, batch.to(device)))
        stage.begin(student, sums, sum(stage.scored(batch) for batch in micro_batches))


def _add(sums: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    for name, value in more.items():
        sums[name] = sums.get(name, 0) + value


@contextmanager
def _left(context: AbstractContextManager) -> Iterator[None]:
    """Outside of a context that is entered, for a while: PyTorch wants backward passes outside autocast, and what
    autocast keeps copies of until its end would be kept through the whole backward pass.
    """
    context.__exit__(None, None, None)
    try:
        yield
    finally:
        context.__enter__()


def check_dtype(dtype: torch.dtype) -> torch.dtype:
    """`dtype`, if a run can be computed in it: UsageError for fp16, in which small gradients vanish unless the loss is
    scaled up, which is not done here.
    """
    if dtype == torch.float16:
        raise UsageError("uptraining has no loss scaling, which float16 needs; give --dtype bfloat16 or float32")
    return dtype


def computing_in(dtype: torch.dtype, device: torch.device) -> AbstractContextManager:
    """Autocast to `dtype`; nothing for fp32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
