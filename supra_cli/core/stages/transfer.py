"""Attention transfer: each mixer learns, layer by layer, to reproduce the attention it replaces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from supra_cli.core.data.packing import IGNORED, Batch
from supra_cli.core.errors import SupraError
from supra_cli.core.layout import Layout
from supra_cli.core.mixers.parts import wide
from supra_cli.core.mixers.softmax import Softmax, attention_moments
from supra_cli.core.parallel import whole
from supra_cli.core.stages import stages
from supra_cli.core.stages.base import Backward, Loss, Stage
from supra_cli.core.swap import SwappedAttention

Look = Callable[[SwappedAttention, tuple[Any, ...], Tensor, Tensor], None]
"""(layer, what its mixer is called with, the softmax heads [B,T,H,V], the softmax's output [B,T,D])."""


@stages.register("transfer")
class Transfer(Stage):
    """Σ_layers Σ_t ‖o_t − ô_t‖² / n,  n = mean_t ‖ô_t‖² over the scored tokens of the stage's first step

    o are the mixer's heads, ô what they can be asked to equal. Both run on the teacher's own layer input, and the
    teacher's output is what goes on to the next layer, so the layers learn independently, no gradient crosses them, and
    each layer's backward pass is over before the next layer's heads are made. ô is `Mixer.target` of the softmax heads:
    a mixer that normalises its heads is compared with the teacher's normalised in the same way, before the output
    projection (its scale is out of its reach); one with a gain is compared with ô itself, and first given its scale in
    closed form (`Mixer.fit`). n is one number a layer for the whole stage: a mean over each pass would make the loss
    depend on how a step is cut into passes.
    Logged beside the loss, 0 for perfect and about 1 for answering zero: `layer.N`, its parts by the layer's number in
    the model, and `output`, the mean over layers of the same error after the output projection. Only mixers move: the
    projections are shared with the teacher, which must not. Errors in fp32 or finer.

    Source: as in LoLCATs, arXiv:2410.10254, and RADLADS, arXiv:2505.03005, step 1; the fit is ours.
    """

    teacher = "shared"
    inside = True

    def trains(self, name: str, in_mixer: bool) -> bool:
        return in_mixer

    def measure(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Σ_t ‖ô_t‖², the same of the softmax's output, and what `Mixer.fit` learns from, of every layer."""
        sums: dict[str, Tensor] = {}
        only = partial(scored_alone, batch)

        def look(layer: SwappedAttention, inputs: tuple[Any, ...], taught: Tensor, answer: Tensor) -> None:
            number, mixer = layer.mixer.spec.layer, layer.mixer
            q, k, _, x, rope, _, layout = inputs
            attention = partial(attention_moments, mixer.spec, q, k, x, rope, layout, batch.labels != IGNORED)
            sums[f"{number}.heads"] = squares(only(mixer.target(taught)))
            sums[f"{number}.output"] = squares(only(answer))
            sums[f"{number}.fit"] = mixer.moments(only(mixer(*inputs)[0]), only(taught), attention)

        visit(student, batch, look)
        return sums

    def begin(self, student: nn.Module, sums: Mapping[str, Tensor], tokens: int) -> None:
        if not tokens:
            raise SupraError(
                "no row of the transfer's first step has two tokens of one document, so there is nothing to measure; "
                "raise data.seq_len or batch_tokens, or give longer text"
            )
        for _, layer in student.swapped_layers():
            number = layer.mixer.spec.layer
            with whole(layer.mixer):
                layer.mixer.fit(sums[f"{number}.fit"])
            for part in (f"{number}.heads", f"{number}.output"):
                # A layer that answers zero to everything is compared as it is.
                self.constants[part] = torch.where(sums[part] > 0, sums[part] / tokens, 1)

    def rounds(self, student: nn.Module) -> int:
        return max((layer.mixer.fits for _, layer in student.swapped_layers()), default=1)

    def settled(self, student: nn.Module) -> set[str]:
        return {f"{name}.mixer.{own}" for name, layer in student.swapped_layers() for own in layer.mixer.fitted}

    def loss(self, student: nn.Module, teacher: nn.Module | None, batch: Batch, backward: Backward) -> Loss:
        errors: dict[str, Tensor] = {}
        outputs: list[Tensor] = []
        only = partial(scored_alone, batch)

        def compare(layer: SwappedAttention, inputs: tuple[Any, ...], taught: Tensor, answer: Tensor) -> None:
            number = layer.mixer.spec.layer
            with torch.enable_grad():
                o, _ = layer.mixer(*inputs)
                error = squares(only(wide(o) - wide(layer.mixer.target(taught)))) / self.constants[f"{number}.heads"]
            errors[f"layer.{number}"] = backward(error)
            off = wide(layer.arch.out(layer, o.detach().flatten(-2))) - wide(answer)
            outputs.append(squares(only(off)) / self.constants[f"{number}.output"])

        visit(student, batch, compare)
        total = torch.stack(list(errors.values())).sum()
        return Loss(total, {**errors, "output": torch.stack(outputs).mean()})


@torch.no_grad()
def visit(student: nn.Module, batch: Batch, look: Look) -> None:
    """Run the student's layers, without head and cache, as the base that it was; `look` sees each swapped layer."""

    def forward(layer: SwappedAttention, hidden_states: Tensor, *, layout: Layout | None, **call: Any) -> Tensor:
        inputs = (*layer.inputs(hidden_states, **call), None, layout)
        taught, answer = softmax_answer(layer, *inputs)
        look(layer, inputs, taught, answer)
        return answer

    layers = [layer for _, layer in student.swapped_layers()]
    with _as_a_teacher(student, layers), answering(layers, forward):
        student(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            objective=lambda hidden, head: None,
        )


def softmax_answer(layer: SwappedAttention, *inputs: Any) -> tuple[Tensor, Tensor]:
    """Heads [B,T,H,V] and output [B,T,D] of the attention that a layer's mixer replaced, from a mixer's inputs."""
    heads, _ = Softmax(layer.mixer.spec, Softmax.Options())(*inputs)
    return heads, layer.arch.out(layer, heads.flatten(-2))


@contextmanager
def answering(layers: Iterable[SwappedAttention], answer: Callable[..., Tensor]) -> Iterator[None]:
    """While this lasts, each layer's output is `answer(layer, hidden_states, layout=..., ...)`."""
    layers = list(layers)
    for layer in layers:
        layer.forward = lambda *args, layer=layer, **call: (answer(layer, *args, **call), None)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def _as_a_teacher(student: nn.Module, layers: list[SwappedAttention]) -> Iterator[None]:
    """All but the mixers in evaluation mode: a teacher that drops out numbers, or whole layers, teaches noise."""
    mixing = {part for layer in layers for part in layer.mixer.modules()}
    training = [module for module in student.modules() if module.training and module not in mixing]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def scored_alone(batch: Batch, x: Tensor) -> Tensor:
    """x [B,T,...] with zeros at the tokens that are not scored, so that neither they nor their gradients count."""
    return x.flatten(2).masked_fill((batch.labels == IGNORED)[..., None], 0).view_as(x)


def squares(x: Tensor) -> Tensor:
    """Σ x², in fp32 or finer."""
    return wide(x).square().sum()
