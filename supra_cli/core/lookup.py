"""The registries behind one function, for what must check names without knowing what a mixer or a stage is."""

from __future__ import annotations

from typing import Literal


def lookup(kind: Literal["mixer", "stage"], name: str) -> type:
    """The options dataclass of a registered mixer or stage; UsageError with a near miss for an unknown name."""
    if kind == "mixer":
        from supra_cli.core.mixers import mixers

        return mixers.get(name).Options
    from supra_cli.core.stages import stages

    return stages.get(name).Options
