"""What a number was measured with, a file written by, an error seen on: versions and hardware, recorded in one form."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

LIBRARIES = ("supra", "torch", "transformers", "tokenizers", "safetensors")
"""The packages that every record names."""


def versions(*more: str) -> dict[str, str]:
    """Python's version and those of `LIBRARIES` and `more`, installed packages by name; imports none of them."""
    found = {}
    for name in (*LIBRARIES, *more):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return {"python": platform.python_version(), **found}


def hardware() -> dict[str, Any]:
    """The system, its processors, torch's threads and every GPU by name."""
    import torch

    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def environment(device: str) -> dict[str, Any]:
    """Versions, hardware, the device that is computed on and the command line."""
    return {**versions(), **hardware(), "device": device, "command": sys.argv}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
