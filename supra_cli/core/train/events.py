"""What the loop tells whoever drives it; a command turns these into lines and bars."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Note:
    """A sentence worth a line."""

    text: str


@dataclass(frozen=True)
class StageStarted:
    index: int
    kind: str
    steps: int
    trainable: int
    total: int


@dataclass(frozen=True)
class Step:
    """One optimizer step. `loss` is the stage's own loss per scored token."""

    stage: int
    stage_step: int
    step: int
    tokens: int
    loss: float
    grad_norm: float
    lr: float
    tokens_per_second: float
    seconds: float
    data_seconds: float = 0.0
    """Those of `seconds` in which the step waited for its rows."""
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Validated:
    """Held-out loss in nats per token; `teacher` is the base's on the same rows, None for a model from scratch."""

    step: int
    loss: float
    teacher: float | None


@dataclass(frozen=True)
class Saved:
    path: Path


@dataclass(frozen=True)
class Finished:
    path: Path
    loss: float | None
    teacher: float | None
    tokens: int
    seconds: float


Event = Note | StageStarted | Step | Validated | Saved | Finished
