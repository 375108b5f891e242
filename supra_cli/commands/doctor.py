"""`supra doctor`: what this machine has."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated, Any

import typer

from supra_cli.commands import console


def run(json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False) -> None:
    """Show what this machine offers: versions, devices, memory, disk, kernels, hub."""
    found = _look()
    if json:
        console.document(found)
        return
    rows = [("system", found["platform"])]
    rows += found["versions"].items()
    rows += [("CPU", f"{found['cpu_threads']} threads for PyTorch of {found['cpus']} cores")]
    if found["memory_bytes"]:
        rows += [("memory", console.size(found["memory_bytes"]))]
    for number, gpu in enumerate(found["gpus"]):
        rows += [(f"GPU {number}", f"{gpu['name']}, {console.size(gpu['bytes'])}")]
    rows += [
        ("device chosen by auto", found["auto_device"]),
        ("fused kernels", found["kernels"]),
        ("free disk here", console.size(found["disk_free_bytes"])),
        ("hub", found["hub"]),
        ("hub cache", found["hub_cache"]),
        ("hub login", "yes" if found["hub_login"] else "no token; gated models need `hf auth login` or HF_TOKEN"),
    ]
    console.table(rows)


def _look() -> dict[str, Any]:
    import os
    import platform
    import shutil

    import torch
    from huggingface_hub import constants, get_token

    from supra_cli.core import connection, device
    from supra_cli.core.environment import versions

    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "platform": platform.platform(),
        "versions": versions("triton", "datasets", "lm_eval", "accelerate"),
        "cpus": os.cpu_count(),
        "cpu_threads": torch.get_num_threads(),
        "memory_bytes": device.memory_bytes(),
        "gpus": [{"name": gpu.name, "bytes": gpu.total_memory} for gpu in gpus],
        "auto_device": device.resolve("auto"),
        "kernels": _kernels(bool(gpus)),
        "disk_free_bytes": shutil.disk_usage(".").free,
        "hub": connection.reach(),
        "hub_cache": constants.HF_HUB_CACHE,
        "hub_login": get_token() is not None,
    }


def _kernels(has_gpu: bool) -> str:
    if find_spec("triton") is None:
        return "PyTorch only; Triton is not installed"
    return "Triton" if has_gpu else "PyTorch only; Triton is installed, but there is no GPU"
