"""The registries behind one function, for what must check names without knowing what a mixer or a stage is.

The recipe cannot import them itself: it is read without torch, and below them.
"""

from __future__ import annotations

from typing import Literal


def lookup(kind: Literal["mixer", "stage", "model"], name: str) -> type:
    """The options dataclass of a registered mixer or stage, or the Hugging Face config of a registered architecture;
    UsageError with a near miss for an unknown name.
    """
    if kind == "mixer":
        from supra_cli.core.mixers import mixers

        return mixers.get(name).Options
    if kind == "model":
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        from supra_cli.core.archs import archs

        archs.get(name)  # says what is known where this one is not
        return CONFIG_MAPPING[name]
    from supra_cli.core.stages import stages

    return stages.get(name).Options
