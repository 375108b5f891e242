"""Ranks started by torchrun, as a user starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def start(ranks: int, script: Sequence[str], *options: str, cache: Path) -> subprocess.Popen[str]:
    """`torchrun OPTIONS SCRIPT` with so many ranks on this machine, in a process group of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *options, *script]
    # Two launches at a time must not meet at torchrun's one default port.
    if not {"--standalone", "--rdzv-endpoint"}.intersection(options):
        command.insert(3, "--standalone")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "SUPRA_CACHE": str(cache),
    }
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)


def finish(process: subprocess.Popen[str], seconds: float = 120) -> subprocess.CompletedProcess[str]:
    """What it did; one that still runs after so many seconds hangs, and is killed."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks, which are in process groups of their own
        try:
            process.communicate(timeout=40)
        finally:
            process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
