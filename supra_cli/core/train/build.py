"""A stage builds its student: a saved model, the stage's spec and the world make the model, teacher and optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from supra_cli.core import checkpoint, hub, recipe
from supra_cli.core.errors import UsageError
from supra_cli.core.modeling import SupraConfig, SupraForCausalLM
from supra_cli.core.parallel import World
from supra_cli.core.stages import Stage, stages
from supra_cli.core.swap import mixer_names
from supra_cli.core.train import lowbit, state
from supra_cli.core.train.optimizer import adamw
from supra_cli.core.train.sharding import shard


@dataclass
class Built:
    """What a stage trains with, each rank's own part of it."""

    stage: Stage
    student: SupraForCausalLM
    teacher: SupraForCausalLM | None
    trained: int
    """Numbers that move, on all ranks together."""
    total: int
    optimizer: torch.optim.Optimizer | None = None
    """None until `optimise`."""


def build(
    spec: recipe.Stage,
    saved: Path,
    teacher: Path | None,
    world: World,
    device: torch.device,
    dtype: torch.dtype,
) -> Built:
    """The stage of `spec` on the model in the directory `saved`, in training mode, its weights in fp32: the masters
    that a run saves beside rounded ones, where there are any.

    `teacher` is the directory of the model that the stage learns from, if that is a second one. `dtype` is what the
    passes compute in. The student gets its optimizer by `optimise`, and lies in CPU memory until then where it is to be
    rounded there, to be no larger on the device than it will be.
    """
    stage = stage_of(spec)
    student = checkpoint.skeleton(checkpoint.read_config(saved), torch.float32)
    tied = dict(student.all_tied_weights_keys)
    trained = prepare(student, stage, spec)
    moving = sum(parameter.numel() for _, parameter in trained)
    total = sum(parameter.numel() for parameter in student.parameters())
    # A stage whose losses fall inside the model computes with mixers while it is begun, and they are small.
    offload = spec.optimizer == "adamw-offload" and not stage.inside
    recomputed = spec.activation_checkpointing
    shard(student, world, dtype, inside=stage.inside, offload=offload, recomputed=recomputed)
    checkpoint.materialise(student, saved, "cpu" if offload else device)
    state.restore_masters(saved / "training", student, tied)
    learnt_from = None if teacher is None else frozen(teacher, world, device, dtype)
    return Built(stage, student.train(), learnt_from, moving, total)


def optimise(built: Built, spec: recipe.Stage, world: World, device: torch.device, dtype: torch.dtype) -> None:
    """Give the student its optimizer, which may copy parameters and round them: after whatever fits them."""
    student = built.student  # sharing out has put other tensors in the place of its parameters
    trained = [(name, parameter) for name, parameter in student.named_parameters() if parameter.requires_grad]
    built.optimizer = adamw(student, trained, spec, dtype, alone=world.size == 1)
    if world.size == 1:
        student.to(device)


def frozen(saved: Path, world: World, device: torch.device, dtype: torch.dtype) -> SupraForCausalLM:
    """The model in a directory in `dtype`, to learn from or to compare with."""
    config = checkpoint.read_config(saved)
    checkpoint.check_attention(config, device, str(saved / "config.json"))
    model = checkpoint.skeleton(config, dtype).eval().requires_grad_(False)
    shard(model, world, dtype)
    checkpoint.materialise(model, saved, device)
    return model


def check_stages(
    specs: Sequence[recipe.Stage],
    config: SupraConfig,
    tokenizer: PreTrainedTokenizerBase,
    base: str | None,
    world: World,
) -> None:
    """Raise whatever would keep a stage from starting, tried on a student of `config` without weights; `tokenizer` is
    the student's.
    """
    student = checkpoint.skeleton(config)
    for spec in specs:
        stage = stage_of(spec)
        prepare(student, stage, spec)
        if (teacher := teacher_of(stage, spec, config, base)) is not None:
            check_tokens(tokenizer, teacher)
        if spec.optimizer == "adamw8bit":
            lowbit.library()
            if world.size > 1:
                raise UsageError(
                    f"optimizer = 'adamw8bit' trains on one rank, got {world.size}; use adamw, or adamw-offload, which "
                    "keeps its moments in CPU memory"
                )


def stage_of(spec: recipe.Stage) -> Stage:
    kind = stages.get(spec.kind)
    return kind(kind.Options(**spec.options))


def teacher_of(stage: Stage, spec: recipe.Stage, config: SupraConfig, base: str | None) -> Path | None:
    """The model that the stage learns from, on this machine; None when that is no second one.

    UsageError when there is no teacher or its vocabulary is not the student's.
    """
    if stage.teacher != "separate":
        if spec.teacher is not None:
            raise UsageError(f"stage '{spec.kind}' takes no teacher of its own; leave out teacher = '{spec.teacher}'")
        return None
    name = teacher_name(spec, base)
    folder = hub.open(name)
    vocabulary = checkpoint.read_config(folder).vocab_size
    if vocabulary != config.vocab_size:
        raise UsageError(
            f"teacher {name} has a vocabulary of {vocabulary}, the student {config.vocab_size}; "
            "logits can only be compared over one vocabulary"
        )
    return folder


def teacher_name(spec: recipe.Stage, base: str | None) -> str:
    """Of a stage that learns from a second model; UsageError where there is none."""
    if (name := spec.teacher or base) is None:
        raise UsageError(f"stage '{spec.kind}' learns from a teacher and this model has no base; name one as 'teacher'")
    return name


def check_tokens(tokenizer: PreTrainedTokenizerBase, teacher: Path) -> None:
    """UsageError unless every token of the student, added ones too, is the same number for the model in `teacher`.

    The teacher reads the student's numbers. What splits text into tokens may differ; that the teacher has further
    tokens is no harm. One without a tokenizer is refused, as nothing says what its numbers mean.
    """
    numbers = checkpoint.load_tokenizer(teacher).get_vocab()
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]):
        if numbers.get(token) != number:
            other = f"number {numbers[token]}" if token in numbers else "unknown"
            raise UsageError(
                f"teacher {teacher} has another tokenizer than the student: token {token!r} is number {number} for the "
                f"student and {other} for the teacher; logits can only be compared token by token"
            )


def prepare(student: nn.Module, stage: Stage, spec: recipe.Stage) -> list[tuple[str, nn.Parameter]]:
    """Make a student, with or without weights, ready for the stage; the parameters that move, by name, all others being
    frozen. UsageError when there is none.
    """
    if spec.untie:
        untie(student)
    if spec.activation_checkpointing and stage.teacher == "shared":
        raise UsageError(f"stage '{spec.kind}' keeps no activations of the blocks; leave out activation_checkpointing")
    if spec.activation_checkpointing:
        # transformers 5.23 renamed these from `gradient_checkpointing_*`.
        word = "activation" if hasattr(student, "activation_checkpointing_enable") else "gradient"
        enable = getattr(student, f"{word}_checkpointing_enable")
        enable(**{f"{word}_checkpointing_kwargs": {"use_reentrant": False}})
    trained, of_mixers = [], mixer_names(student)
    for name, parameter in student.named_parameters():
        moves = stage.trains(name, name in of_mixers) and (spec.train == "all" or name in of_mixers)
        parameter.requires_grad_(moves)
        if moves:
            trained.append((name, parameter))
    if not trained:
        raise UsageError(f"stage '{spec.kind}' has nothing to train: the model has no parameter that it moves")
    return trained


def moves_base(student: nn.Module, spec: recipe.Stage) -> bool:
    """Whether the stage changes any weight but the mixers'."""
    stage, of_mixers = stage_of(spec), mixer_names(student)
    base = (name for name, _ in student.named_parameters() if name not in of_mixers)
    return spec.untie or (spec.train == "all" and any(stage.trains(name, False) for name in base))


def untie(student: nn.Module) -> None:
    """Give the output head weights of its own, which begin as the embedding's."""
    head, embedding = student.get_output_embeddings(), student.get_input_embeddings()
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone())
    student.config.tie_word_embeddings = False
    student.all_tied_weights_keys = student.get_expanded_tied_weights_keys()  # what is left out when saving
