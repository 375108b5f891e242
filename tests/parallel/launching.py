"""Ranks started by torchrun, as a user starts them, and what they make for many tests at once."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

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


def finish(process: subprocess.Popen[str], seconds: float = 300) -> subprocess.CompletedProcess[str]:
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


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that `make` has filled, in one of pytest's processes, while the others wait."""
    base = factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with Path(f"{root}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "made").exists():
            root.mkdir()
            make(root)
            (root / "made").touch()
    return root
