"""What is done to a student before a stage: which parameters move, what is tied, what the backward pass keeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from supra_cli.core import checkpoint, hub, recipe
from supra_cli.core.errors import UsageError
from supra_cli.core.modeling import SupraConfig
from supra_cli.core.stages import Stage, stages
from supra_cli.core.swap import mixer_names
from supra_cli.core.train import lowbit


def rehearse(
    specs: Sequence[recipe.Stage], config: SupraConfig, tokenizer: PreTrainedTokenizerBase, base: str | None
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
    name = spec.teacher or base
    if name is None:
        raise UsageError(f"stage '{spec.kind}' learns from a teacher and this model has no base; name one as 'teacher'")
    folder = hub.fetch(hub.resolve(name))
    vocabulary = checkpoint.read_config(folder).vocab_size
    if vocabulary != config.vocab_size:
        raise UsageError(
            f"teacher {name} has a vocabulary of {vocabulary}, the student {config.vocab_size}; "
            "logits can only be compared over one vocabulary"
        )
    return folder


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
    """Make `student` ready for the stage; the parameters that move, by name. Doing it twice is doing it once."""
    if spec.untie:
        untie(student)
    if spec.activation_checkpointing and stage.teacher == "shared":
        raise UsageError(f"stage '{spec.kind}' keeps no activations of the blocks; leave out activation_checkpointing")
    checkpoint_activations(student, spec.activation_checkpointing)
    return select(student, stage, spec)


def select(student: nn.Module, stage: Stage, spec: recipe.Stage) -> list[tuple[str, nn.Parameter]]:
    """The parameters that move in this stage, by name; all others are frozen. UsageError when there is none."""
    chosen, of_mixers = [], mixer_names(student)
    for name, parameter in student.named_parameters():
        moves = stage.trains(name, name in of_mixers) and (spec.train == "all" or name in of_mixers)
        parameter.requires_grad_(moves)
        if moves:
            chosen.append((name, parameter))
    if not chosen:
        raise UsageError(f"stage '{spec.kind}' has nothing to train: the model has no parameter that it moves")
    return chosen


def moves_base(student: nn.Module, spec: recipe.Stage) -> bool:
    """Whether the stage changes any weight but the mixers'."""
    stage, of_mixers = stage_of(spec), mixer_names(student)
    base = (name for name, _ in student.named_parameters() if name not in of_mixers)
    return spec.untie or (spec.train == "all" and any(stage.trains(name, False) for name in base))


def checkpoint_activations(student: nn.Module, on: bool) -> None:
    """Compute the blocks' activations again in the backward pass, or keep them."""
    # transformers 5.23 renamed these from `gradient_checkpointing_*`.
    word = "activation" if hasattr(student, "activation_checkpointing_enable") else "gradient"
    if on:
        enable = getattr(student, f"{word}_checkpointing_enable")
        enable(**{f"{word}_checkpointing_kwargs": {"use_reentrant": False}})
    else:
        getattr(student, f"{word}_checkpointing_disable")()


def untie(student: nn.Module) -> None:
    """Give the output head its own copy of the embedding's weights."""
    head, embedding = student.get_output_embeddings(), student.get_input_embeddings()
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone())
    student.config.tie_word_embeddings = False
    student.all_tied_weights_keys = student.get_expanded_tied_weights_keys()  # what is left out when saving
