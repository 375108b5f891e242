"""What is done to a student before a stage: which parameters move, what is tied, what the backward pass keeps."""

from __future__ import annotations

from torch import nn

from supra_cli.core import recipe
from supra_cli.core.errors import UsageError
from supra_cli.core.stages import Stage
from supra_cli.core.train.optimizer import is_mixer


def prepare(student: nn.Module, stage: Stage, spec: recipe.Stage) -> list[tuple[str, nn.Parameter]]:
    """Make `student` ready for the stage; the parameters that move, by name. Doing it twice is doing it once."""
    if spec.untie:
        untie(student)
    checkpoint_activations(student, stage, spec)
    return select(student, stage, spec)


def select(student: nn.Module, stage: Stage, spec: recipe.Stage) -> list[tuple[str, nn.Parameter]]:
    """The parameters that move in this stage, by name; all others are frozen. UsageError when there is none."""
    chosen = []
    for name, parameter in student.named_parameters():
        moves = stage.trains(name) and (spec.train == "all" or is_mixer(name))
        parameter.requires_grad_(moves)
        if moves:
            chosen.append((name, parameter))
    if not chosen:
        raise UsageError(f"stage '{spec.kind}' has nothing to train: the model has no parameter that it moves")
    return chosen


def checkpoint_activations(student: nn.Module, stage: Stage, spec: recipe.Stage) -> None:
    """Switch activation checkpointing on or off, as the stage asks."""
    if spec.activation_checkpointing and stage.teacher == "shared":
        raise UsageError(f"stage '{spec.kind}' keeps no activations of the blocks; leave out activation_checkpointing")
    # transformers 5.23 renamed these from `gradient_checkpointing_*`.
    word = "activation" if hasattr(student, "activation_checkpointing_enable") else "gradient"
    if spec.activation_checkpointing:
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
