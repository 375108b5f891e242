"""Attention transfer: each mixer learns, layer by layer, to reproduce the attention it replaces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from supra_cli.core.data.packing import Batch
from supra_cli.core.layout import Layout
from supra_cli.core.stages import stages
from supra_cli.core.stages.base import Loss, Stage
from supra_cli.core.swap import SwappedAttention

Heads = Callable[[], tuple[Tensor, NamedTuple]]
"""The mixer's heads [B,T,H,V] and its state."""


@stages.register("transfer")
class Transfer(Stage):
    """Σ_layers Σ_t ‖o_t − ô_t‖² / mean_t ‖ô_t‖², with o the mixer's heads and ô what they can be asked to equal.

    Both run on the teacher's own layer input, and the teacher's output is what goes on to the next layer, so the layers
    learn independently and no gradient crosses them. ô is `Mixer.target` of the softmax heads: a mixer that normalises
    its heads is compared with the teacher's normalised in the same way, before the output projection (its scale is out
    of its reach); one with a gain is compared with ô itself, and first given its scale in closed form (`Mixer.fit`).
    Logged beside the loss: `layer.N`, its parts, and `output`, the mean over layers of the relative squared error after
    the output projection. Only mixers move: the projections are shared with the teacher, which must not.

    Source: as in LoLCATs, arXiv:2410.10254, and RADLADS, arXiv:2505.03005, step 1; the fit is ours.
    """

    teacher = "shared"

    def trains(self, name: str) -> bool:
        return ".mixer." in name

    def scored(self, batch: Batch) -> int:
        return batch.input_ids.numel()

    def begin(self, student: nn.Module, batch: Batch) -> None:
        """`Mixer.fit` every mixer to the teacher's heads."""
        with answering(student, self._fit):
            run(student, batch)

    @contextmanager
    def attached(self, student: nn.Module) -> Iterator[None]:
        """Every swapped layer answers with the teacher's output and puts its own error aside."""
        self._errors: list[tuple[Tensor, Tensor]] = []
        with answering(student, self._compare):
            yield

    def loss(self, student: nn.Module, teacher: nn.Module | None, batch: Batch) -> Loss:
        self._errors.clear()
        with torch.no_grad():
            run(student, batch)
        tokens = self.scored(batch)
        heads = [error for error, _ in self._errors]
        metrics = {f"layer.{number}": error.detach() * tokens for number, error in enumerate(heads)}
        metrics["output"] = torch.stack([error for _, error in self._errors]).mean() * tokens
        return Loss(torch.stack(heads).sum() * tokens, metrics)

    @staticmethod
    def _fit(layer: SwappedAttention, heads: Heads, taught: Tensor, answer: Tensor) -> None:
        layer.mixer.fit(heads()[0], taught)

    def _compare(self, layer: SwappedAttention, heads: Heads, taught: Tensor, answer: Tensor) -> None:
        with torch.enable_grad():
            o, _ = heads()
            error = relative_error(o, layer.mixer.target(taught))
        self._errors.append((error, relative_error(layer.arch.out(layer, o.flatten(-2)), answer)))


@contextmanager
def answering(student: nn.Module, look: Callable[[SwappedAttention, Heads, Tensor, Tensor], None]) -> Iterator[None]:
    """Every swapped layer answers as its softmax does; `look` sees the layer, its mixer's heads on the same input, the
    softmax heads and the answer.
    """

    def forward(
        layer: SwappedAttention,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        layout: Layout | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        taught = layer.softmax_heads(hidden_states, position_embeddings, layout)
        answer = layer.arch.out(layer, taught.flatten(-2))
        look(layer, partial(layer.heads, hidden_states, position_embeddings, layout), taught, answer)
        return answer, None

    layers = [layer for _, layer in student.swapped_layers()]
    for layer in layers:
        layer.forward = partial(forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def run(student: nn.Module, batch: Batch) -> None:
    """Through the layers alone: neither logits nor a cache."""
    student(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        objective=lambda hidden, head: None,
    )


def relative_error(got: Tensor, wanted: Tensor) -> Tensor:
    """Σ (got − wanted)² / Σ wanted², in fp32: 0 is perfect, 1 is what answering zero gives."""
    got, wanted = got.float(), wanted.float()
    return (got - wanted).square().sum() / wanted.square().sum()
