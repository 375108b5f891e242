"""What running a recipe takes: memory by part, FLOPs, steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig

from supra_cli.core import checkpoint, hub
from supra_cli.core.accounting.meter import Meter
from supra_cli.core.accounting.model import ModelPlan, measure
from supra_cli.core.data.rows import Batch
from supra_cli.core.modeling import SupraConfig, SupraForCausalLM
from supra_cli.core.stages import stages
from supra_cli.core.train.optimizer import moment_bytes
from supra_cli.core.train.prepare import prepare
from supra_cli.core.train.step import Stepper

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
    """Bytes by part at the fullest moment of a training step, on the device but for `host`."""

    weights: int
    """In fp32; with the optimizer's state offloaded, those that move in the computing dtype."""
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
    """The most that device and host hold at one moment: what a run on a CPU takes, where they are one memory."""

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


def plan(recipe: recipes.Recipe, dtype: torch.dtype = torch.bfloat16) -> Plan:
    """What running `recipe` takes on one device that computes in `dtype`, masters in fp32; touches no weights.

    Needs the configurations of the base and the teachers, which are bundled for the aliased models.
    """
    config = student_config(recipe)
    size = measure(config, getattr(torch, recipe.checkpoint.dtype))
    with FakeTensorMode(), torch.device("cpu"):
        student = _built(config, torch.float32).train()
        stage_plans = tuple(_stage(recipe, spec, student, dtype) for spec in recipe.stages)
    return Plan(size, str(dtype).removeprefix("torch."), stage_plans)


def student_config(recipe: recipes.Recipe) -> SupraConfig:
    """The configuration of the model that `recipe` trains; UsageError for an unknown mixer, option or `keep`."""
    if recipe.base is not None:
        base = checkpoint.read_config(hub.config_folder(hub.resolve(recipe.base)))
    else:
        shape = AutoConfig.for_model(**{"vocab_size": recipe.tokenizer.vocab_size, **recipe.model})
        base = SupraConfig.from_base(shape)
    return base.with_mixer(recipe.mixer.name, recipe.mixer.options, recipe.keep)


def _stage(recipe: recipes.Recipe, spec: recipes.Stage, student: SupraForCausalLM, dtype: torch.dtype) -> StagePlan:
    stage_class = stages.get(spec.kind)
    stage = stage_class(stage_class.Options(**spec.options))
    trained = prepare(student, stage, spec)
    moving = [parameter.numel() for _, parameter in trained]
    config = _teacher_config(recipe, spec) if stage.teacher == "separate" else None
    teacher = None if config is None else _built(config, dtype).eval().requires_grad_(False)
    rows, micro_rows, length = recipe.rows(spec), recipe.micro_rows(spec), recipe.seq_len(spec)
    steps = recipe.steps(spec)
    ids = torch.zeros((micro_rows, length), dtype=torch.long)
    batch = FullBatch(ids, None if recipe.data.documents == "joined" else ids, ids)
    passes = min(2, -(-rows // micro_rows))  # the second is the first that finds gradients in place
    meter = Meter(student, teacher)
    with offloaded(trained, dtype, meter) if spec.optimizer == OFFLOAD else nullcontext():
        optimizer = torch.optim.SGD([parameter for _, parameter in trained], lr=0.0)  # moments are counted below
        stepper = Stepper(stage, student, teacher, optimizer, spec.clip_norm, torch.device("cpu"), dtype)
        with meter:
            stepper.take([batch] * passes)
        memory = _memory(spec, student, teacher, moving, meter)
    return StagePlan(
        kind=spec.kind,
        tokens=steps * rows * length,
        steps=steps,
        rows=rows,
        micro_rows=micro_rows,
        seq_len=length,
        trainable=sum(moving),
        flops=meter.flops * steps * rows // (micro_rows * passes),
        memory=memory,
    )


def _memory(
    spec: recipes.Stage, student: nn.Module, teacher: nn.Module | None, moving: Sequence[int], meter: Meter
) -> Memory:
    offloading = spec.optimizer == OFFLOAD
    weights, moments = _parameter_bytes(student), sum(moment_bytes(spec.optimizer, numbers) for numbers in moving)
    gradients = 0 if offloading else 4 * sum(moving)
    beside = 0 if teacher is None else _parameter_bytes(teacher)
    copies = min(meter.copies_at_peak, meter.peak - gradients)
    held = weights + moments + beside + (4 * sum(moving) if offloading else 0)
    return Memory(
        weights=weights,
        copies=copies,
        gradients=gradients,
        optimizer=0 if offloading else moments,
        teacher=beside,
        activations=meter.peak - gradients - copies,
        host=(4 + 4) * sum(moving) + moments if offloading else 0,
        together=held + meter.peak_of_both,
    )


def _teacher_config(recipe: recipes.Recipe, spec: recipes.Stage) -> SupraConfig | None:
    name = spec.teacher or recipe.base
    if name is None:
        return None
    return checkpoint.read_config(hub.config_folder(hub.resolve(name)))


def _built(config: SupraConfig, dtype: torch.dtype) -> SupraForCausalLM:
    return SupraForCausalLM._from_config(config, dtype=dtype)


@contextmanager
def offloaded(trained: Sequence[tuple[str, nn.Parameter]], dtype: torch.dtype, meter: Meter) -> Iterator[None]:
    """Let the device have what it has under the offloading optimizer: weights in `dtype`, gradients for a moment."""
    masters = [parameter.data for _, parameter in trained]
    gone: set[Tensor] = set()

    def hand_over(parameter: Tensor) -> None:
        parameter.grad = None
        meter.elsewhere += 0 if parameter in gone else 4 * parameter.numel()
        gone.add(parameter)

    for _, parameter in trained:
        parameter.data = parameter.data.to(dtype)
    hooks = [parameter.register_post_accumulate_grad_hook(hand_over) for _, parameter in trained]
    try:
        yield
    finally:
        for (_, parameter), master, hook in zip(trained, masters, hooks, strict=True):
            parameter.data = master
            hook.remove()


class FullBatch(Batch):
    """A batch in which every position has a target, countable without looking at the labels; it stays where it is."""

    @property
    def targets(self) -> int:
        return self.labels.numel()

    def to(self, device: torch.device) -> FullBatch:
        return self


def _parameter_bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())
