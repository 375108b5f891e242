"""Which device, and which number format, a name on the command line stands for."""

from __future__ import annotations

import os

import torch

from supra_cli.core.errors import ResourceError, UsageError, near_miss

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve(name: str) -> str:
    """`auto` is CUDA, then MPS, then the CPU. ResourceError for a device that this machine does not have."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    kind = name.partition(":")[0]
    if kind not in available:
        raise UsageError(f"unknown device '{name}'{near_miss(name, [*available, 'auto'])}")
    if not available[kind]:
        raise ResourceError(
            f"no {kind} device on this machine; available: {', '.join(k for k, has in available.items() if has)}"
        )
    return name


def dtype(name: str, device: str) -> torch.dtype:
    """`auto` is bf16 on CUDA and fp32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    if name not in _DTYPES:
        raise UsageError(f"unknown dtype '{name}'{near_miss(name, [*_DTYPES, 'auto'])}")
    return _DTYPES[name]


def memory_bytes() -> int | None:
    """Physical memory of this machine, where the system tells."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
