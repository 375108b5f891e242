"""The contract of a stage."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor, nn

from supra_cli.core.data.packing import Batch

Backward = Callable[[Tensor], Tensor]
"""A differentiable part of a loss's sum -> its value, detached: the part's backward pass is over, its graph gone."""


class Loss(NamedTuple):
    """A loss that adds up over micro-batches: divide by the tokens of the whole step, not by those of one pass."""

    sum: Tensor
    """Sum over the scored tokens: what `Backward` returned of it."""
    metrics: dict[str, Tensor]
    """Further sums over the same tokens, detached; they are logged divided by the tokens."""


class Stage(ABC):
    """One loss. `teacher` says what it learns from: nothing, the student's own softmax path, or a second model.

    The law: however a batch is cut into micro-batches, its losses and gradients add up to the same, and tokens that
    are not scored change neither. So a loss divides by nothing that it takes from one micro-batch; what it has to know
    of the data beforehand, it measures as sums over the stage's whole first step.
    """

    @dataclass(frozen=True)
    class Options: ...

    teacher: ClassVar[Literal["none", "shared", "separate"]] = "none"
    inside: ClassVar[bool] = False
    """Whether `loss` calls `backward` while the student's own forward pass is going on. Such a stage trains mixers
    alone, and each part of its loss depends on the calls of one: on several ranks no other parameter would get a
    gradient."""

    def __init__(self, options: Options):
        self.options = options
        self.constants: dict[str, Tensor] = {}
        """What `begin` found and `loss` needs at every step; saved with the run and there again when it is resumed."""

    def trains(self, name: str, in_mixer: bool) -> bool:
        """Whether the parameter of that name moves in this stage; `in_mixer`: it is a mixer's, not the base's."""
        return True

    def scored(self, batch: Batch) -> int:
        """How many tokens of a batch the loss is a sum over: those with a next token to predict."""
        return batch.targets

    def measure(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """What `begin` learns from one micro-batch of the stage's first step: sums over its scored tokens, by name.
        Called under `torch.no_grad`.
        """
        return {}

    def begin(self, student: nn.Module, sums: Mapping[str, Tensor], tokens: int) -> None:  # noqa: B027 - few stages do
        """Set `constants`, and the parameters that have a closed form, from what `measure` found in all micro-batches
        of the first step together, `tokens` scored ones. Called before that step, under `torch.no_grad`.
        """

    def rounds(self, student: nn.Module) -> int:
        """How often to measure and begin, each time with what the last round left."""
        return 1

    def settled(self, student: nn.Module) -> set[str]:
        """Names of parameters that `begin` has left where the loss of the first step has no slope: of a gradient that
        is nothing but rounding AdamW would make whole steps, in another direction on another number of ranks.
        """
        return set()

    @abstractmethod
    def loss(self, student: nn.Module, teacher: nn.Module | None, batch: Batch, backward: Backward) -> Loss:
        """The loss of one micro-batch, after its backward pass; `teacher` is None unless the stage wants a separate
        one. `backward` takes the whole sum, or one part after the other, each as soon as it is there: what it is given
        must be a sum over the scored tokens.
        """
