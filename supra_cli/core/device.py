"""Which device, and which number format, a name on the command line stands for."""

from __future__ import annotations

import logging
import os
from functools import cache

import torch

from supra_cli.core.errors import ResourceError, UsageError, near_miss

_log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DTYPES |= {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve(name: str) -> str:
    """`auto` is CUDA, then MPS, then the CPU. ResourceError for a device that this machine does not have."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    kind, _, index = name.partition(":")
    if kind not in available:
        raise UsageError(f"unknown device '{name}'{near_miss(name, [*available, 'auto'])}")
    if not available[kind]:
        raise ResourceError(
            f"no {kind} device on this machine; available: {', '.join(k for k, has in available.items() if has)}"
        )
    if kind == "cuda" and index and not (index.isdecimal() and int(index) < torch.cuda.device_count()):
        names = ", ".join(f"cuda:{i}" for i in range(torch.cuda.device_count()))
        raise ResourceError(f"no device '{name}' on this machine; available: {names}")
    return name


def dtype(name: str, device: str) -> torch.dtype:
    """`auto` is bf16 on a CUDA device that has it and fp32 elsewhere, which is told once where a GPU lacks it.
    UsageError for an unknown name, ResourceError for bfloat16 on a GPU without."""
    cuda = device.startswith("cuda")
    if name == "auto":
        if cuda and not _has_bf16(device):
            _tell_once(f"{device} has no bfloat16, so dtype auto is float32")
        return torch.bfloat16 if cuda and _has_bf16(device) else torch.float32
    if name not in _DTYPES:
        raise UsageError(f"unknown dtype '{name}'{near_miss(name, [*_DTYPES, 'auto'])}")
    if _DTYPES[name] == torch.bfloat16 and cuda and not _has_bf16(device):
        raise ResourceError(f"dtype is bfloat16, which {device} can only emulate; say --dtype float32 or auto")
    return _DTYPES[name]


def _has_bf16(device: str) -> bool:
    """Of its own. Without CUDA, where a run on another machine is planned, as the GPUs of today: true."""
    if not torch.cuda.is_available():
        return True
    with torch.cuda.device(device):  # PyTorch asks the current one, whichever that is
        return torch.cuda.is_bf16_supported(including_emulation=False)


@cache
def _tell_once(message: str) -> None:
    _log.warning(message)


def memory_bytes() -> int | None:
    """Physical memory of this machine, where the system tells."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
