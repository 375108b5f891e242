"""What running a recipe takes: memory by part, FLOPs, steps."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig

from supra_cli.core import checkpoint, hub
from supra_cli.core.accounting.meter import Meter
from supra_cli.core.accounting.model import ModelPlan, measure
from supra_cli.core.data.rows import Batch
from supra_cli.core.modeling import SupraConfig, SupraForCausalLM
from supra_cli.core.stages import Stage, stages
from supra_cli.core.train.optimizer import moment_bytes
from supra_cli.core.train.prepare import prepare

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
        student = _built(config, torch.float32)
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
    moving = [parameter.numel() for _, parameter in prepare(student, stage, spec)]
    trained, offloaded = sum(moving), spec.optimizer == OFFLOAD
    teacher = _teacher_config(recipe, spec) if stage.teacher == "separate" else None
    cost = _cost(recipe, spec, stage, student.config, teacher, dtype)
    gradients = 0 if offloaded else 4 * trained
    moments = sum(moment_bytes(spec.optimizer, numbers) for numbers in moving)
    rows, micro_rows, length = recipe.rows(spec), recipe.micro_rows(spec), recipe.seq_len(spec)
    steps = recipe.steps(spec)
    # Later passes of a step find the gradients in place; in a single one they grow as the activations are given back.
    beside = gradients if rows == micro_rows else 0
    return StagePlan(
        kind=spec.kind,
        tokens=steps * rows * length,
        steps=steps,
        rows=rows,
        micro_rows=micro_rows,
        seq_len=length,
        trainable=trained,
        flops=cost.flops * steps * rows // micro_rows,
        memory=Memory(
            weights=_parameter_bytes(student) - (4 - dtype.itemsize) * trained * offloaded,
            copies=cost.copies,
            gradients=gradients,
            optimizer=0 if offloaded else moments,
            teacher=0 if teacher is None else _parameter_bytes(_built(teacher, dtype)),
            activations=max(0, cost.kept - beside) + cost.passing,
            host=(4 + 4) * trained + moments if offloaded else 0,
        ),
    )


def _teacher_config(recipe: recipes.Recipe, spec: recipes.Stage) -> SupraConfig | None:
    name = spec.teacher or recipe.base
    if name is None:
        return None
    return checkpoint.read_config(hub.config_folder(hub.resolve(name)))


class Cost(NamedTuple):
    """Of one micro-batch, forward and backward."""

    flops: int
    copies: int
    """Bytes of the weights' copies in the computing dtype that the forward pass leaves for the backward pass."""
    kept: int
    """Other bytes that the forward pass leaves for the backward pass."""
    passing: int
    """Bytes beyond that, and beyond the gradients, that are alive for a moment."""


def _cost(
    recipe: recipes.Recipe,
    spec: recipes.Stage,
    stage: Stage,
    config: SupraConfig,
    teacher: SupraConfig | None,
    dtype: torch.dtype,
) -> Cost:
    """The cost with all layers, from models of one and two layers: every further layer of a kind costs the same."""
    first = config.swap.layers[0]

    def probe(*layers: str, teacher_layers: int = 1) -> Cost:
        student = _built(_cut(config, layers), torch.float32).train()
        trained = prepare(student, stage, spec)
        if spec.optimizer == OFFLOAD:
            offload(trained, dtype)
        beside = None if teacher is None else _built(_cut(teacher, teacher.swap.layers[:teacher_layers]), dtype).eval()
        with stage.attached(student):
            return one_pass(stage, student, beside, recipe.micro_rows(spec), recipe.seq_len(spec), dtype)

    one = probe(first)
    further = [(probe(first, kind), count) for kind, count in Counter(config.swap.layers[1:]).items()]
    if teacher is not None:
        further.append((probe(first, teacher_layers=2), len(teacher.swap.layers) - 1))
    sums = [at_one + sum(count * (two[i] - at_one) for two, count in further) for i, at_one in enumerate(one[:3])]
    return Cost(*sums, passing=max(cost.passing for cost in (one, *(two for two, _ in further))))


def _cut(config: SupraConfig, layers: Sequence[str]) -> SupraConfig:
    """`config` with these layers alone."""
    base = copy.deepcopy(config.plain())
    if getattr(base, "layer_types", None):
        base.layer_types = base.layer_types[: len(layers)]
    base.num_hidden_layers = len(layers)
    swap = config.swap
    return SupraConfig.from_base(base, mixer=swap.mixer, options=swap.options, layers=layers)


def _built(config: SupraConfig, dtype: torch.dtype) -> SupraForCausalLM:
    return SupraForCausalLM._from_config(config, dtype=dtype)


def offload(trained: Sequence[tuple[str, nn.Parameter]], dtype: torch.dtype) -> None:
    """Let the device have what it has under the offloading optimizer: weights in `dtype`, gradients for a moment."""
    for _, parameter in trained:
        parameter.data = parameter.data.to(dtype)
        parameter.register_post_accumulate_grad_hook(_drop)


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def one_pass(
    stage: Stage, student: nn.Module, teacher: nn.Module | None, rows: int, length: int, dtype: torch.dtype
) -> Cost:
    """The cost of `rows` rows of `length` tokens, by running them."""
    ids = torch.zeros((rows, length), dtype=torch.long)
    batch = FullBatch(ids, None, ids)
    meter = Meter(student, teacher)
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)
    with meter:
        with autocast:
            loss = stage.loss(student, teacher, batch).sum
        copies, kept = meter.copies, meter.live - meter.copies
        loss.backward()
    gradients = sum(parameter.nbytes for parameter in student.parameters() if parameter.grad is not None)
    return Cost(meter.flops, copies, kept, max(0, meter.peak - copies - max(kept, gradients)))


class FullBatch(Batch):
    """A batch in which every position has a target, countable without looking at the labels."""

    @property
    def targets(self) -> int:
        return self.labels.numel()


def _parameter_bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())
