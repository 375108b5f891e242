"""What a training stage does: one loss, and the set of parameters that move. One file a stage, found by itself."""

from __future__ import annotations

from supra_cli.core.registry import Registry
from supra_cli.core.stages.base import Backward, Loss, Stage

stages: Registry[type[Stage]] = Registry("stage", package=__name__, group="supra.stages")

__all__ = ["Backward", "Loss", "Stage", "stages"]
