"""Mixers replace softmax attention: one class a file, one contract, every law of tests/laws kept by each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from supra_cli.core.errors import UsageError
from supra_cli.core.layout import HeadSpec, Layout, Rotate
from supra_cli.core.registry import Registry


class Mixer(nn.Module):
    """Causal and stateful: calling it on [x₁, x₂] equals calling it on x₁, then with the state that returns on x₂.

    A mixer owns parameters only, no buffers and no tensor attributes: constants are Python numbers, turned into fp32
    in `forward` (a model is built on the meta device and filled from a file, and a buffer that is in no file comes
    back empty).
    """

    @dataclass(frozen=True)
    class Options:
        """The keys of `[mixer]` in a recipe besides `name`. A tuple has an entry for each layer of the model; the mixer
        of a layer is made with that one in its place.
        """

    branches: ClassVar[tuple[str, ...]] = ()
    """Names of the parts that its answer is a sum of, where each can be asked alone."""
    only: str | None = None
    """The one branch that answers, None for all together: what an evaluation sets to see what each can do."""
    progress: float = 1.0
    """Part of the steps of attention transfer that a run has taken, set by the training loop; 1 in other stages."""
    fits: int = 1
    """How often `fit` is called."""
    fitted: ClassVar[tuple[str, ...]] = ()
    """Parameters that `fit` leaves where the error on the rows it was given has no slope."""
    softens: ClassVar[bool] = False
    """Whether its scores go through the base's soft cap and a softmax, as in the base."""
    variants: ClassVar[Sequence[Mapping[str, Any]]] = ()
    """Options at which the laws hold too, where it is numbers that change what runs: the laws find every other choice
    of a Literal or bool by themselves."""

    def __init__(self, spec: HeadSpec, options: Options):
        super().__init__()
        self.spec = spec
        self.options = options

    def init_state(self, batch: int, device: torch.device | str) -> NamedTuple:
        """The state before the first token: a NamedTuple of tensors, batch first; works on the meta device."""
        raise NotImplementedError

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, rope: Rotate, state: NamedTuple | None, layout: Layout | None
    ) -> tuple[Tensor, NamedTuple]:
        """q [B,T,H,K], k [B,T,G,K], v [B,T,G,V] unrotated and unrepeated, x [B,T,D] the layer's input, state None at
        the start -> o [B,T,H,V] and the state at each row's last real token.
        """
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draw the parameters; called once, when a model is converted or begun from scratch."""

    def target(self, o: Tensor) -> Tensor:
        """What the heads can be asked to equal, given the teacher's o [B,T,H,V]: o, or o normalised as they are."""
        return o

    def moments(self, o: Tensor, taught: Tensor, attention: Callable[[], Tensor]) -> Tensor:
        """What `fit` learns from the mixer's own o and the teacher's, both [B,T,H,V] and zero at tokens that do not
        count, and from where the teacher looks, `attention()` (`mixers.softmax.attention_moments`): sums over batch and
        tokens, in any shape, which are added up over the first step of attention transfer.
        """
        return o.new_zeros(0)

    def fit(self, moments: Tensor) -> None:
        """Set the parameters that have a closed form so that the mixer's o comes near the teacher's; called without
        gradient before the first step of attention transfer, `fits` times, each with moments of what the last left.
        """


mixers: Registry[type[Mixer]] = Registry("mixer", package=__name__, group="supra.mixers")


def entries(value: Any) -> Sequence[Any]:
    """Those of an option that has one for each layer, or its one value."""
    return value if isinstance(value, list | tuple) else (value,)


def options_by_layer(options: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
    """Those that have an entry for each layer; a list where they come from a config."""
    return {name: value for name, value in options.items() if isinstance(value, list | tuple)}


def options_of_layer(options: Mixer.Options, layer: int) -> Mixer.Options:
    own = options_by_layer({field.name: getattr(options, field.name) for field in fields(options)})
    return replace(options, **{name: values[layer] for name, values in own.items()})


def parse_options(name: str, given: Mapping[str, Any]) -> Mixer.Options:
    """The options of the mixer `name` from plain values; an unknown key or a wrong value is a UsageError."""
    kind = mixers.get(name).Options
    if __name__.startswith("supra_cli."):
        from supra_cli.core.recipe.options import read

        options, problems = read(kind, given, "mixer")
        if problems:
            raise UsageError(f"wrong options of mixer '{name}': {', '.join(problems)}")
        return options
    return kind(**given)  # in an exported model, whose options were read when it was written
