"""What running a recipe takes: memory by part, FLOPs, steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import masking_utils

from supra_cli.core import checkpoint, hub, ops
from supra_cli.core.accounting.layers import extrapolated
from supra_cli.core.accounting.meter import Lap, Meter
from supra_cli.core.accounting.model import ModelPlan, measure
from supra_cli.core.data.packing import Batch
from supra_cli.core.modeling import SupraConfig, SupraForCausalLM
from supra_cli.core.stages import Backward, Loss, Stage
from supra_cli.core.train.optimizer import moment_bytes
from supra_cli.core.train.prepare import prepare, stage_of
from supra_cli.core.train.step import Stepper, begin

if TYPE_CHECKING:
    from supra_cli.core import recipe as recipes

GPUS = {
    "RTX 4090": (24, 165),
    "A100 80GB": (80, 312),
    "H100 SXM": (80, 989),
    "H200": (141, 989),
    "MI300X": (192, 1307),
}
"""Memory in GB and dense bf16 TFLOP/s, as in the vendors' data sheets."""

OFFLOAD = "adamw-offload"
"""The optimizer that keeps its state in CPU memory."""

UTILISATION = 0.4
"""Share of the data sheet's FLOP/s that a well-fed training run reaches; an assumption, not a measurement."""


@dataclass(frozen=True)
class Memory:
    """Bytes by part at the fullest moment of a training step, on the device but for `host` and `unread`."""

    weights: int
    """In fp32; with the optimizer's state offloaded, those that move in the computing dtype."""
    unread: int
    """Further weights, of which a CPU takes nothing: they stay in their file, mapped into memory, as nothing in the run
    so far reads them. A transfer stage has no use for the output head, for one. A GPU holds them among its weights.
    """
    copies: int
    """The fp32 weights' copies in the computing dtype."""
    gradients: int
    optimizer: int
    """AdamW's two moments, in fp32 or 8 bits."""
    teacher: int
    """Weights of a separate teacher."""
    activations: int
    """Everything else that is alive when most is, in one micro-batch."""
    host: int
    """fp32 weights, gradients and moments in CPU memory, where the optimizer keeps them there."""
    together: int
    """The most that device and host hold at one moment: on a CPU they are one memory."""

    @property
    def total(self) -> int:
        """On the device."""
        return self.weights + self.copies + self.gradients + self.optimizer + self.teacher + self.activations


@dataclass(frozen=True)
class StagePlan:
    kind: str
    tokens: int
    """Of the whole stage, in whole steps."""
    steps: int
    rows: int
    """In an optimizer step."""
    micro_rows: int
    """In one forward and backward pass."""
    seq_len: int
    trainable: int
    flops: int
    """Of the whole stage, forward and backward, teacher included."""
    memory: Memory


@dataclass(frozen=True)
class Plan:
    model: ModelPlan
    """The student before its first stage."""
    device: str
    """cpu or cuda."""
    dtype: str
    """What the passes compute in."""
    stages: tuple[StagePlan, ...]

    @property
    def tokens(self) -> int:
        return sum(stage.tokens for stage in self.stages)

    @property
    def flops(self) -> int:
        return sum(stage.flops for stage in self.stages)

    @property
    def memory_bytes(self) -> int:
        """Of the stage that needs most."""
        return max(stage.memory.total for stage in self.stages)

    def seconds(self, gpu: str) -> float:
        """On one GPU of that name, at UTILISATION."""
        return self.flops / (GPUS[gpu][1] * 1e12 * UTILISATION)


def plan(recipe: recipes.Recipe, dtype: torch.dtype = torch.bfloat16, device: Literal["cpu", "cuda"] = "cuda") -> Plan:
    """What running `recipe` takes on one device that computes in `dtype`, masters in fp32; touches no weights.

    The operator takes the device's form. All else runs as a CPU does it, so that a GPU's autocast, which keeps other
    operations in fp32, and its kernels of softmax attention may take a little more or less; what CUDA itself and the
    gaps between tensors take is not counted. Needs the configurations of the base and the teachers, which are bundled
    for the aliased models.
    """
    config = student_config(recipe)
    size = measure(config, getattr(torch, recipe.checkpoint.dtype))
    student = checkpoint.skeleton(config)
    stage_plans = []
    unread = 4 * _parameters(student) if device == "cpu" and _stays_mapped(recipe, config) else 0
    for spec in recipe.stages:
        stage_plans.append(_stage(recipe, spec, student, dtype, device, unread))
        unread = stage_plans[-1].memory.unread
    return Plan(size, device, str(dtype).removeprefix("torch."), tuple(stage_plans))


def _stays_mapped(recipe: recipes.Recipe, config: SupraConfig) -> bool:
    """Whether the student's weights are those of a file, and none is read before a stage needs it: weights in another
    dtype are converted when they are loaded, and validation has every one in use.
    """
    from_file = recipe.base is not None and recipe.init != "scratch" and config.dtype in (None, torch.float32)
    return from_file and not recipe.data.validation


def student_config(recipe: recipes.Recipe) -> SupraConfig:
    """The configuration of the model that `recipe` trains; UsageError for an unknown mixer, option or `keep`."""
    if recipe.base is not None:
        base = checkpoint.outline(hub.resolve(recipe.base))
    else:
        base = checkpoint.own_shape({"vocab_size": recipe.tokenizer.vocab_size, **recipe.model})
    return base.with_mixer(recipe.mixer.name, recipe.mixer.options, recipe.keep)


def _stage(
    recipe: recipes.Recipe,
    spec: recipes.Stage,
    student: SupraForCausalLM,
    dtype: torch.dtype,
    device: str,
    unread: int,
) -> StagePlan:
    """Of the weights at most `unread` bytes are still unread."""
    stage = stage_of(spec)
    moving = [parameter.numel() for _, parameter in prepare(student, stage, spec)]
    teacher = _teacher_config(recipe, spec) if stage.teacher == "separate" else None
    beside = 0 if teacher is None else _parameters(checkpoint.skeleton(teacher)) * dtype.itemsize
    rows, micro_rows, length = recipe.rows(spec), recipe.micro_rows(spec), recipe.seq_len(spec)
    steps = recipe.steps(spec)
    step = partial(_pass, recipe, spec, dtype, device)
    configs = [student.config] if teacher is None else [student.config, teacher]
    flops, left, *bytes_of_laps = extrapolated(step, configs)
    laps = [Lap(*some) for some in zip(*[iter(bytes_of_laps)] * len(Lap._fields), strict=True)]
    return StagePlan(
        kind=spec.kind,
        tokens=steps * rows * length,
        steps=steps,
        rows=rows,
        micro_rows=micro_rows,
        seq_len=length,
        trainable=sum(moving),
        flops=flops * steps * rows // micro_rows,
        memory=_memory(spec, student, beside, moving, dtype, laps, min(unread, left)),
    )


def _pass(
    recipe: recipes.Recipe, spec: recipes.Stage, dtype: torch.dtype, device: str, configs: Sequence[SupraConfig]
) -> list[int]:
    """FLOPs, unread bytes of frozen weights and laps of a step's last micro-batch, with models of these configurations.

    Laps end where what is alive may begin to grow with the layers otherwise than before: the teacher's pass; the
    student's, which ends with all of autocast's copies; the backward pass, which begins with most activations; its end
    in the first layer, where gradients have taken their place.
    """
    accumulating = recipe.rows(spec) > recipe.micro_rows(spec)
    path = "triton" if device == "cuda" else None
    with FakeTensorMode(), torch.device("cpu"), ops.planning(path), _masks_as_given():
        student = _built(configs[0], torch.float32).train()
        teacher = _built(configs[1], dtype).eval().requires_grad_(False) if configs[1:] else None
        stage = stage_of(spec)
        trained = [parameter for _, parameter in prepare(student, stage, spec)]
        ids = torch.zeros((recipe.micro_rows(spec), recipe.seq_len(spec)), dtype=torch.long)
        batch = FullBatch(ids, ids, ids)
        optimizer = torch.optim.SGD(trained, lr=0.0)  # moments are counted apart
        if spec.optimizer == OFFLOAD:
            for parameter in trained:
                parameter.data = parameter.data.to(dtype)
        stepper = Stepper(stage, student, teacher, optimizer, spec.clip_norm, torch.device("cpu"), dtype)
        packed = recipe.data.documents != "joined"
        with Meter(packed=packed):  # not counted: a stage begins before it has gradients and moments
            begin(stage, student, [batch], torch.device("cpu"), dtype)
        with Meter(student, teacher, packed=packed) as meter:
            if spec.optimizer == OFFLOAD:
                _offload(trained, accumulating, meter)
            elif accumulating:
                for parameter in trained:
                    parameter.grad = torch.empty_like(parameter)
            _divide(stage, student, meter)
            stepper.take([batch])
    frozen = (parameter for parameter in student.parameters() if not parameter.requires_grad)
    return [meter.flops, meter.unread(frozen), *chain.from_iterable(meter.laps)]


def _memory(
    spec: recipes.Stage,
    student: nn.Module,
    teacher: int,
    moving: Sequence[int],
    dtype: torch.dtype,
    laps: Sequence[Lap],
    unread: int,
) -> Memory:
    offloading = spec.optimizer == OFFLOAD
    masters = 4 * sum(moving)
    weights = 4 * _parameters(student) - unread
    moments = sum(moment_bytes(spec.optimizer, numbers) for numbers in moving)
    on_device = weights - masters + dtype.itemsize * sum(moving) if offloading else weights
    gradients = 0 if offloading else masters
    peak, copies, _ = max(laps)
    copies = min(copies, peak - gradients)
    held = on_device + moments + teacher + (masters if offloading else 0)
    return Memory(
        weights=on_device,
        unread=unread,
        copies=copies,
        gradients=gradients,
        optimizer=0 if offloading else moments,
        teacher=teacher,
        activations=peak - gradients - copies,
        host=2 * masters + moments if offloading else 0,
        together=held + max(lap.both for lap in laps),
    )


@contextmanager
def _masks_as_given() -> Iterator[None]:
    """Keep transformers from looking for several documents in a row: it takes positions without data to have them and
    makes a mask, while rows that do have them come with one.
    """
    looking = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda positions: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = looking


def _teacher_config(recipe: recipes.Recipe, spec: recipes.Stage) -> SupraConfig | None:
    name = spec.teacher or recipe.base
    if name is None:
        return None
    return checkpoint.outline(hub.resolve(name))


def _built(config: SupraConfig, dtype: torch.dtype) -> SupraForCausalLM:
    return SupraForCausalLM._from_config(config, dtype=dtype)


def _offload(trained: Sequence[Tensor], accumulating: bool, meter: Meter) -> None:
    """Let the device have what it has under the offloading optimizer: gradients for a moment."""

    def hand_over(parameter: Tensor) -> None:
        parameter.grad = None
        meter.elsewhere += 0 if accumulating else 4 * parameter.numel()

    meter.elsewhere += 4 * sum(parameter.numel() for parameter in trained) if accumulating else 0
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(hand_over)


def _divide(stage: Stage, student: SupraForCausalLM, meter: Meter) -> None:
    """Begin a lap with the student's pass, the backward pass and the first gradient of the first layer that moves."""
    loss, reached = stage.loss, False

    def lost(student: nn.Module, teacher: nn.Module | None, batch: Batch, backward: Backward) -> Loss:
        begun = False

        def back(part: Tensor) -> Tensor:
            nonlocal begun
            if not begun:
                meter.lap()
            begun = True
            return backward(part)

        return loss(student, teacher, batch, back)

    def reach(_: Tensor) -> None:
        nonlocal reached
        if not reached:
            meter.lap()
        reached = True

    student.register_forward_pre_hook(lambda *_: meter.lap())
    stage.loss = lost
    moving = ([p for p in layer.parameters() if p.requires_grad] for layer in student.arch.layers(student))
    for parameter in next(filter(None, moving), []):
        parameter.register_post_accumulate_grad_hook(reach)


class FullBatch(Batch):
    """A batch in which every position has a target, countable without looking at the labels; it stays where it is."""

    @property
    def targets(self) -> int:
        return self.labels.numel()

    def to(self, device: torch.device) -> FullBatch:
        return self


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
