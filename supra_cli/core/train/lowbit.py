"""AdamW with 8-bit moments: torchao's optimizer, and its moments as plain tensors.

A block of 256 numbers is stored as one code each and one fp32 scale (Dettmers et al. 2021, arXiv:2110.02861); tensors
below 4096 numbers, or not made of whole blocks, keep fp32 moments.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from supra_cli.core.errors import UsageError

BLOCK = 256
SMALLEST = 4096
"""Numbers in the smallest tensor that is quantised."""
_CODES = 256
_PARTS = ("codes", "scale", "qmap")


def adamw8bit(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    """torchao's AdamW8bit; UsageError where torchao is not installed."""

    class Eager8bit(library().AdamW8bit):
        """Compiled on CUDA, as torchao means it; eager on the CPU, where compiling would ask for a C++ compiler."""

        def step(self, closure=None):
            on_cpu = all(p.device.type == "cpu" for group in self.param_groups for p in group["params"])
            with torch.compiler.set_stance("force_eager" if on_cpu else "default"):
                return super().step(closure)

    return Eager8bit(groups, block_size=BLOCK, **settings)


def library() -> ModuleType:
    """torchao's optimizers; UsageError where they are not installed."""
    try:
        return importlib.import_module("torchao.optim")
    except ImportError:
        raise UsageError("optimizer = 'adamw8bit' needs torchao, which is not installed: pip install torchao") from None


def moment_bytes(numbers: int) -> int:
    """Of both moments of a parameter of that many numbers: codes, scales and the two tables of codes."""
    if numbers < SMALLEST or numbers % BLOCK:
        return 2 * 4 * numbers
    return 2 * (numbers + 4 * numbers // BLOCK + 4 * _CODES)


def parts(moment: Tensor) -> dict[str, Tensor]:
    """A moment as plain tensors by name; one that is plain already has the name ''."""
    if not hasattr(moment, "qmap"):
        return {"": moment}
    return {name: getattr(moment, name) for name in _PARTS}


def whole(plain: dict[str, Tensor]) -> Tensor:
    """The moment that `parts` took apart."""
    if "" in plain:
        return plain[""]
    from torchao.optim.subclass_8bit import OptimState8bit

    signed = bool((plain["qmap"] < 0).any())
    return OptimState8bit(*(plain[name] for name in _PARTS), signed, dtype=torch.float32)
