"""One optimizer step: the passes over its rows, one mean over all their tokens, clip, update or refuse to."""

from __future__ import annotations

import math
import threading
import zlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from supra_cli.core.data.packing import IGNORED, Batch
from supra_cli.core.errors import SupraError, UsageError
from supra_cli.core.parallel import ALONE, World
from supra_cli.core.stages import Stage


@dataclass(frozen=True)
class Outcome:
    """Means over the scored tokens of the step on all ranks, and the gradient's norm before clipping."""

    loss: float
    grad_norm: float
    metrics: dict[str, float]
    stop: bool = False
    """Whether any rank had been asked to stop when the ranks told each other their sums."""

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass(frozen=True)
class Computing:
    """Where and in what the passes of a stage are computed, and what of them is this rank's."""

    device: torch.device
    dtype: torch.dtype
    """Of autocast; fp32 is computed without."""
    at_once: int
    """Most rows of a rank in one forward and backward pass."""
    world: World = ALONE

    def autocast(self) -> AbstractContextManager:
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)

    def own(self, rows: Batch) -> list[Batch]:
        """This rank's part of rows, every W-th, in passes.

        Ranks gather parameters together, so all make equally many passes over equally many rows: where these do not
        come out even, one is there twice, the second time without labels, by which it counts for nothing.
        """
        rank, size = self.world.rank, self.world.size
        most = -(-len(rows.labels) // size)
        own = Batch(*(part[rank::size] for part in rows))
        if len(own.labels) < most:
            filler = (rows.input_ids[:1], rows.position_ids[:1], torch.full_like(rows.labels[:1], IGNORED))
            own = Batch(*map(torch.cat, zip(own, filler, strict=True)))
        passes = zip(*(part.split(self.at_once) for part in own), strict=True)
        return [Batch(*parts).to(self.device) for parts in passes]


def take(
    stage: Stage,
    student: nn.Module,
    teacher: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    rows: Batch,
    computing: Computing,
    clip_norm: float,
    stop: threading.Event | None = None,
) -> Outcome:
    """One step on the rows of all ranks; none at all, and no gradient left, if loss or gradient are not finite.

    With their sums the ranks tell each other whether `stop` is set. SupraError if a parameter of the first step has no
    gradient, or if the ranks have drawn different rows.
    """
    world = computing.world
    scored = max(1, stage.scored(rows))  # rows may have nothing to predict
    autocast = computing.autocast()

    def backward(part: Tensor) -> Tensor:
        with _left(autocast):
            # Scaled by its gradient: under no_grad, where transfer calls, a quotient would have no graph.
            part.backward(torch.full_like(part, 1 / scored))
        return part.detach()

    sums: dict[str, Tensor] = {}
    for batch in computing.own(rows):
        with autocast:
            loss = stage.loss(student, teacher, batch, backward)
        _add(sums, {"loss": loss.sum, **loss.metrics})
    if not optimizer.state:
        _look_at_gradients(optimizer, stage.settled(student))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, clip_norm)
    if world.size > 1:
        norm = norm.full_tensor()  # what each rank has is its own part of it
    digest = 0
    for part in rows if world.size > 1 else ():
        digest = zlib.crc32(part.numpy().tobytes(), digest)
    own = [*(float(value) for value in sums.values()), digest, stop is not None and stop.is_set()]
    *totals, digests, stops = world.total(torch.tensor(own, dtype=torch.float64)).tolist()
    if digests != world.size * digest:
        raise SupraError(
            "the ranks have drawn different rows: their text or their caches of it differ; give all machines the same "
            "files, and SUPRA_CACHE on a disk that they share"
        )
    means = {name: total / scored for name, total in zip(sums, totals, strict=True)}
    outcome = Outcome(means.pop("loss"), float(norm), means, stop=stops > 0)
    if outcome.finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return outcome


def begin(stage: Stage, student: nn.Module, rows: Batch, computing: Computing) -> None:
    """Let the stage measure all rows of its first step, and begin with the sums of all ranks."""
    for _ in range(stage.rounds(student)):
        sums: dict[str, Tensor] = {}
        with torch.no_grad(), computing.autocast():
            for batch in computing.own(rows):
                _add(sums, stage.measure(student, batch))
            sums = {name: computing.world.total(value).to(computing.device) for name, value in sums.items()}
            stage.begin(student, sums, stage.scored(rows))
    for module in student.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # whole since a forward pass that no backward pass followed


def check_dtype(dtype: torch.dtype) -> torch.dtype:
    """`dtype`, if a run can be computed in it: UsageError for fp16, in which small gradients vanish unless the loss is
    scaled up, which is not done here.
    """
    if dtype == torch.float16:
        raise UsageError("uptraining has no loss scaling, which float16 needs; give --dtype bfloat16 or float32")
    return dtype


def _look_at_gradients(optimizer: torch.optim.Optimizer, settled: set[str]) -> None:
    """Of the first step: none may be missing, as a parameter that is said to move and that the loss does not reach
    would stay as it was drawn, unnoticed; those of `settled` parameters are zero but for rounding, and become so.
    """
    for group in optimizer.param_groups:
        for name, parameter in zip(group.get("names", ()), group["params"], strict=False):
            if parameter.grad is None:
                raise SupraError(
                    f"the loss does not depend on {name}, which this stage is to train; leave that parameter out "
                    "in the stage's `trains`, or mend the mixer or the loss that does not use it"
                )
            if name in settled:
                parameter.grad.zero_()


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
