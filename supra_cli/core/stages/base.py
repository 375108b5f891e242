"""The contract of a stage."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor, nn

from supra_cli.core.data.packing import Batch


class Loss(NamedTuple):
    """A loss that adds up over micro-batches: divide by the tokens of the whole step, not by those of one pass."""

    sum: Tensor
    """Differentiable sum over the scored tokens."""
    metrics: dict[str, Tensor]
    """Further sums over the same tokens, detached; they are logged divided by the tokens."""


class Stage(ABC):
    """One loss. `teacher` says what it learns from: nothing, the student's own softmax path, or a second model."""

    @dataclass(frozen=True)
    class Options: ...

    teacher: ClassVar[Literal["none", "shared", "separate"]] = "none"

    def __init__(self, options: Options):
        self.options = options

    def trains(self, name: str) -> bool:
        """Whether the parameter of that name moves in this stage."""
        return True

    def scored(self, batch: Batch) -> int:
        """How many tokens of a batch the loss is a sum over: those with a next token to predict."""
        return batch.targets

    def begin(self, student: nn.Module, batch: Batch) -> None:  # noqa: B027 - few stages do
        """Set what needs data but no gradient, on the first rows of the stage; called before its first step, under
        `torch.no_grad`.
        """

    def attached(self, student: nn.Module) -> AbstractContextManager:
        """What has to be in place around `loss` and its backward pass; between steps the student is itself again."""
        return nullcontext()

    @abstractmethod
    def loss(self, student: nn.Module, teacher: nn.Module | None, batch: Batch) -> Loss:
        """The loss of one micro-batch; `teacher` is None unless the stage wants a separate one."""
