"""Laws of losses: a step's loss and gradients depend on its tokens alone, neither on how they are cut into
micro-batches nor on padding; in every stage, for every mixer.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny import tiny_model, tokens
from torch import Tensor
from torch.testing import assert_close

from supra_cli.core import recipe as recipes
from supra_cli.core.data.packing import IGNORED, Batch
from supra_cli.core.errors import UsageError
from supra_cli.core.stages import stages
from supra_cli.core.train.build import prepare, stage_of
from supra_cli.core.train.step import Computing, begin, take

CLOSE = {torch.float64: 1e-10, torch.float32: 1e-5}
BASE = "gpt_neox"
"""Its norms compute in the format that they are given; Llama's round to fp32, which turns a last bit of float64 into
one of fp32."""
CUTS = ((3, 1), (1, 1, 1, 1))
LENGTHS = ((24,), (9, 15), (1, 4, 19), (7, *[1] * 17))
"""Of the documents in each of four rows, the last of which is cut: a document, then padding."""


class Keeping(torch.optim.SGD):
    """Keeps the gradients that it is asked to step with, and steps nowhere."""

    def step(self, closure=None) -> None:
        (group,) = self.param_groups
        self.gradients = {name: p.grad.clone() for name, p in zip(group["names"], group["params"], strict=True)}


class Cut(Computing):
    """Takes micro-batches as they are given, of any number of rows each."""

    def own(self, parts: list[Batch]) -> list[Batch]:
        return parts


class Parts(list):
    """Micro-batches that are counted together."""

    input_ids = torch.zeros(0)

    @property
    def targets(self) -> int:
        return sum(part.targets for part in self)


def rows() -> Batch:
    ids = tokens(len(LENGTHS), 24)
    ids[-1, 7:] = 0
    positions = torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in LENGTHS])
    labels = torch.full_like(ids, IGNORED)
    labels[:, :-1] = torch.where(positions[:, 1:] > 0, ids[:, 1:], IGNORED)
    return Batch(ids, positions, labels)


def padded(batch: Batch, more: int) -> Batch:
    """As rows of documents = "cut" are: each token of padding a document by itself."""
    return Batch(
        *(torch.nn.functional.pad(part, (0, more), value=IGNORED if part is batch.labels else 0) for part in batch)
    )


def first_step(kind: str, student, parts: list[Batch]) -> dict[str, Tensor]:
    """Loss, logged figures and gradients of a stage's first step on a copy of `student`, in the given micro-batches."""
    student, cut, parts = copy.deepcopy(student).train(), Cut(torch.device("cpu"), torch.float32, 1), Parts(parts)
    spec = recipes.Stage(kind=kind, tokens=1)
    stage = stage_of(spec)
    trained = prepare(student, stage, spec)
    torch.manual_seed(1)
    teacher = tiny_model(BASE, "softmax", dtype=student.dtype) if stage.teacher == "separate" else None
    begin(stage, student, parts, cut)
    with torch.no_grad():  # away from the minimum that some parameters were put into
        for _, parameter in trained:
            parameter.add_(0.1 * torch.randn_like(parameter))
    optimizer = Keeping([{"params": [p for _, p in trained], "names": [name for name, _ in trained]}], lr=0.0)
    outcome = take(stage, student, teacher, optimizer, parts, cut, math.inf)
    figures = {"loss": outcome.loss, "grad_norm": outcome.grad_norm, **outcome.metrics}
    return optimizer.gradients | {name: torch.tensor(value, dtype=torch.float64) for name, value in figures.items()}


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor], close: float) -> None:
    """To `close` of each tensor's largest number, or of a thousandth of the whole gradient's norm if that is more.

    A window as long as the rows answers as the teacher does: below 1e-6 a loss is rounding.
    """
    assert got.keys() == wanted.keys()
    least = max(1e-3 * float(wanted["grad_norm"]), 1e-6)
    for name, value in wanted.items():
        size = max(float(value.abs().max()), least)
        assert_close(got[name], value, rtol=0, atol=close * size, msg=lambda text, name=name: f"{name}: {text}")


def parametrised(test):
    for name, cases in (("dtype", list(CLOSE)), ("stage", list(stages))):
        test = pytest.mark.parametrize(name, cases, ids=str)(test)
    return test


@parametrised
def test_a_step_is_the_same_however_it_is_cut_into_micro_batches(stage, dtype, recurrent, options, build):
    student = build(BASE, recurrent, dtype=dtype)
    batch = rows()
    try:
        whole = first_step(stage, student, [batch])
    except UsageError:
        assert stages.get(stage).teacher == "shared"
        assert not any(list(layer.mixer.parameters()) for _, layer in student.swapped_layers())
        return
    assert whole["loss"] > 0
    # A head that is divided by its own root mean square, and small before that, enlarges what is rounded in it.
    enlarged = 2 if dtype == torch.float32 and options.get("norm") == "rms" else 1
    for cut in CUTS:
        parts = [Batch(*some) for some in zip(*(part.split(cut) for part in batch), strict=True)]
        assert_same(first_step(stage, student, parts), whole, enlarged * CLOSE[dtype])


@parametrised
def test_padding_changes_neither_loss_nor_gradients(stage, dtype, recurrent, build):
    student = build(BASE, recurrent, dtype=dtype)
    if stages.get(stage).teacher == "shared" and not list(next(student.swapped_layers())[1].mixer.parameters()):
        return  # nothing to train
    batch = rows()
    wanted = first_step(stage, student, [batch])
    assert wanted["loss"] > 0
    assert_same(first_step(stage, student, [padded(batch, 40)]), wanted, CLOSE[dtype])
