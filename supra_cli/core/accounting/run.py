"""What running a recipe takes on one GPU or several: memory by part, FLOPs, steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from supra_cli.core import checkpoint, hub
from supra_cli.core.accounting.layers import extrapolated
from supra_cli.core.accounting.model import ModelPlan, measure
from supra_cli.core.accounting.step import Figures, figures
from supra_cli.core.modeling import SupraConfig
from supra_cli.core.recipe.keep import automatic
from supra_cli.core.train.build import prepare, stage_of, teacher_name
from supra_cli.core.train.optimizer import moment_bytes
from supra_cli.core.train.origin import student_of
from supra_cli.core.train.sharding import rounded, staying_whole

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

UTILISATION = 0.4
"""Share of the data sheet's FLOP/s that a well-fed training run reaches; an assumption, not a measurement."""

ROOM = 0.9
"""Share of a GPU's memory that a plan may take: CUDA's context, NCCL's buffers and gaps are not in it."""


@dataclass(frozen=True)
class Memory:
    """Bytes by part at the fullest moment of a training step, on each GPU but for `host`."""

    weights: int
    """In fp32; with the optimizer's state offloaded from one GPU, linear maps of the base that move in the computing
    dtype."""
    copies: int
    """The fp32 weights' copies in the computing dtype that autocast makes."""
    gradients: int
    """In fp32; where most is alive before there are any, they come to lie where some of the activations did."""
    optimizer: int
    """AdamW's two moments, in fp32 or 8 bits."""
    teacher: int
    """Weights of a separate teacher."""
    gathered: int
    """On several GPUs: weights that are whole for a while, and gradients that are not yet reduced."""
    activations: int
    """Everything else that is alive when most is, in one micro-batch."""
    host: int
    """For each GPU: fp32 weights, gradients and moments in CPU memory, where the optimizer keeps them there."""

    @property
    def total(self) -> int:
        """On the device."""
        return sum(vars(self).values()) - self.host


@dataclass(frozen=True)
class Numbers:
    """Of a model's parameters: all, those outside of blocks, and of the largest block what stays fp32 and the rest."""

    total: int
    root: int
    wide: int
    """What stays fp32 of it: mixer, norms, experts."""
    rest: int

    @classmethod
    def of(cls, model: nn.Module, moving: bool = False) -> Numbers:
        """`moving`: of those alone that move."""
        counted = {p for p in model.parameters() if p.requires_grad or not moving}
        blocks = [[p for p in block.parameters() if p in counted] for block in model.arch.layers(model)]
        sizes = [sum(p.numel() for p in block) for block in blocks]
        total, largest = sum(p.numel() for p in counted), sizes.index(max(sizes))
        wide = sum(p.numel() for p in set(blocks[largest]) - rounded(model))
        return cls(total, total - sum(sizes), wide, sizes[largest] - wide)


@dataclass(frozen=True)
class StagePlan:
    recipe: recipes.Recipe
    spec: recipes.Stage
    dtype: torch.dtype
    student: Numbers
    trained: Numbers
    """Of what moves."""
    parameters: tuple[int, ...]
    """Numbers in each parameter that moves."""
    rounded: int
    """Numbers that move and that an offloading optimizer leaves on one device in the computing dtype."""
    teacher: Numbers | None
    whole: tuple[int, int]
    """Bytes of the student's and the teacher's blocks where several GPUs have them all whole at once, else 0."""
    figures: Figures

    def flops(self, gpus: int = 1) -> int:
        """Of the whole stage, teacher and recomputation included, and the rows that fill up the last GPU's."""
        one = self.figures.flops + (self.figures.again if self.spec.activation_checkpointing else 0)
        rows = self.recipe.steps(self.spec) * gpus * -(-self.recipe.rows(self.spec) // gpus)
        return one * rows // self.recipe.micro_rows(self.spec)

    def own_rows(self, gpus: int, spec: recipes.Stage | None = None) -> tuple[int, int]:
        """Rows of each of `gpus` in a step, and in one of its passes."""
        spec = spec or self.spec
        rows = -(-self.recipe.rows(spec) // gpus)
        return rows, min(rows, self.recipe.micro_rows(spec))

    def memory(self, gpus: int = 1, spec: recipes.Stage | None = None) -> Memory:
        """On each of `gpus`, by the settings of `spec` (the recipe's where None).

        Most is alive where the backward pass begins, with all activations, or where it ends, with all gradients:
        between them it changes by as much with every block. Logits are in fp32, they and both their gradients, and a
        teacher's with their product.

        On several GPUs weights, gradients and moments are shared out; whole are two blocks (in the computing dtype, but
        for what stays in fp32), where the backward pass begins small ones all, the pass through what is outside of
        blocks, and where it ends their gradients, not yet reduced.
        """
        spec, one, item, sharded = spec or self.spec, self.figures, self.dtype.itemsize, gpus > 1
        student, trained, teacher = self.student, self.trained, self.teacher
        rows, micro_rows = self.own_rows(gpus, spec)
        share = micro_rows / self.recipe.micro_rows(self.spec)

        moments = sum(moment_bytes(spec.optimizer, numbers) for numbers in self.parameters) // gpus
        weights, gradients, host = 4 * student.total // gpus, 4 * trained.total // gpus, 0
        copies = one.other_copies + (0 if sharded else one.copies)
        # Of a stage whose losses fall inside the model only one GPU's is offloaded (train/build.py).
        if spec.optimizer == "adamw-offload" and not (sharded and stage_of(spec).inside):
            host = gradients + moments + (weights if sharded else 4 * trained.total)
            weights = 0 if sharded else weights - (4 - item) * self.rounded
            copies -= 0 if sharded or not self.rounded else one.copies  # what is rounded already
            gradients = moments = 0
        gathered = last_gathered = 0
        if sharded:
            two, outside = 2 * (item * student.rest + 4 * student.wide), 4 * student.root
            if teacher:
                outside += item * teacher.root + (self.whole[1] or 2 * item * (teacher.rest + teacher.wide))
            resharded = stage_of(spec).inside or spec.activation_checkpointing
            gathered = max(two, 0 if resharded else self.whole[0]) + outside
            unreduced = 2 * 4 * (trained.rest + trained.wide) + 4 * trained.root
            last_gathered = two + outside + unreduced

        passing = share * one.passing
        logits = 4 * (5 if teacher else 3) * min(one.piece, one.logits * share)
        begun = share * (one.outside + (one.inputs if spec.activation_checkpointing else one.blocks))
        begun += max(passing, logits)
        last_copies = min(copies, item * (student.rest + student.wide))
        ended = share * one.block + passing
        earlier = gradients if rows > micro_rows else 0  # of the passes before
        if begun + copies + earlier + gathered < ended + last_copies + gradients + last_gathered:
            begun, copies, earlier, gathered = ended, last_copies, gradients, last_gathered
        shown = earlier or min(gradients, int(begun))
        return Memory(
            weights=weights,
            copies=copies,
            gradients=shown,
            optimizer=moments,
            teacher=item * teacher.total // gpus if teacher else 0,
            gathered=gathered,
            activations=int(begun) + earlier - shown,
            host=host,
        )


@dataclass(frozen=True)
class Plan:
    model: ModelPlan
    """The student before its first stage."""
    device: str
    """cpu or cuda."""
    dtype: str
    """What the passes compute in."""
    stages: tuple[StagePlan, ...]

    def flops(self, gpus: int = 1) -> int:
        return sum(stage.flops(gpus) for stage in self.stages)

    def memory_bytes(self, gpus: int = 1) -> int:
        """On each of so many GPUs, of the stage that needs most."""
        return max(stage.memory(gpus).total for stage in self.stages)

    def host_bytes(self, gpus: int = 1) -> int:
        """In CPU memory, for each GPU."""
        return max(stage.memory(gpus).host for stage in self.stages)

    def fits(self, gpu: str, gpus: int = 1) -> bool:
        """Whether it runs as it is written; 8-bit moments are for one GPU."""
        runs = gpus == 1 or all(stage.spec.optimizer != "adamw8bit" for stage in self.stages)
        return runs and self.memory_bytes(gpus) <= ROOM * GPUS[gpu][0] * 1e9

    def seconds(self, gpu: str, gpus: int = 1) -> float:
        """At UTILISATION of the GPUs' peak; what they send each other takes no time here."""
        return self.flops(gpus) / (gpus * GPUS[gpu][1] * 1e12 * UTILISATION)


def plan(
    recipe: recipes.Recipe,
    dtype: torch.dtype = torch.bfloat16,
    device: Literal["cpu", "cuda"] = "cuda",
    model: Path | None = None,
) -> Plan:
    """What running `recipe` takes on devices that compute in `dtype`, masters in fp32; touches no weights. `model` is
    the converted one that it starts from, None for its base.

    The operator takes the device's form. All else runs as a CPU does it, so that a GPU's autocast, which keeps other
    operations in fp32, and its kernels of softmax attention may take a little more or less; what CUDA and NCCL take
    themselves and the gaps between tensors is not counted. Needs the configurations of the base and the teachers, which
    are bundled for the aliased models.
    """
    config = student_config(recipe, model)
    base = recipe.base if model is None else checkpoint.read_provenance(model).get("base")
    size, stages = measure(config, getattr(torch, recipe.checkpoint.dtype)), []
    if model is None and automatic(recipe.keep):
        size = replace(size, layers_known=False)
    student = checkpoint.skeleton(config, torch.float32)
    for spec in recipe.stages:
        stage, configs = stage_of(spec), [student.config]
        moving = [parameter for _, parameter in prepare(student, stage, spec)]
        held_rounded = sum(parameter.numel() for parameter in rounded(student).intersection(moving))
        sizes = tuple(parameter.numel() for parameter in moving)
        if stage.teacher == "separate":
            configs.append(checkpoint.outline(hub.resolve(teacher_name(spec, base))))
        taught = checkpoint.skeleton(configs[1], dtype) if configs[1:] else None
        teacher = taught and Numbers.of(taught)
        found = Figures(*extrapolated(partial(figures, recipe, spec, dtype, device), configs))
        every, trained = Numbers.of(student), Numbers.of(student, moving=True)
        whole = staying_whole(student, dtype), staying_whole(taught, dtype) if taught else 0
        stages.append(StagePlan(recipe, spec, dtype, every, trained, sizes, held_rounded, teacher, whole, found))
    return Plan(size, device, str(dtype).removeprefix("torch."), tuple(stages))


def student_config(recipe: recipes.Recipe, model: Path | None = None) -> SupraConfig:
    """The configuration of what `recipe` trains, begun with its base or a converted `model`; UsageError for an unknown
    mixer, option or `keep`, and for a `model` that is not the recipe's.
    """
    if model is not None:
        return student_of(model, recipe)
    if recipe.base is not None:
        base = checkpoint.outline(hub.resolve(recipe.base))
    else:
        base = checkpoint.own_shape({"vocab_size": recipe.tokenizer.vocab_size, **recipe.model})
    chosen = automatic(recipe.keep)  # layers that nobody knows yet; the last cost as much
    keep = f"last:{chosen}" if 0 < chosen <= base.num_hidden_layers else recipe.keep
    return base.with_mixer(recipe.mixer.name, recipe.mixer.options, keep)
