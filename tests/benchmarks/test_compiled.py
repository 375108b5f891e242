"""Every kernel compiles for Hopper with the arguments that the launcher gives it, and leaves room for a neighbour."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {
    "states S", "states dS", "query_side o", "query_side dq", "key_side dv", "key_side dk", "decay", "sums",
    "finish_backward", "step", "rotary", "rotary_backward",
}  # fmt: skip


@pytest.mark.slow
def test_every_kernel_compiles_for_hopper(tmp_path):
    """Triton brings its assembler, so this needs no GPU; the interpreter would not see what does not compile."""
    pytest.importorskip("triton")
    command = [sys.executable, "benchmarks/compiled.py", "--output", str(tmp_path / "found.json")]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert {row["kernel"] for row in rows} == KERNELS
    assert all(row["shared_bytes"] <= 227 * 1024 for row in rows)
    real = [row for row in rows if row["case"] in ("mha", "gqa", "packed", "token", "narrow", "gated", "t2r")]
    assert all(row["programs"] >= 2 for row in rows if row in real or row["case"] == "uneven")
    assert all(row["stack_bytes"] <= (256 if row["case"] == "gated" else 128) for row in real)
    in_chunks = [row for row in real if row["kernel"].startswith(("states", "query_side", "key_side", "decay"))]
    assert all(row["matrix_instructions"] for row in in_chunks)
    several = [row for row in in_chunks if row["case"] != "narrow"]
    assert all(row["async_copies"] for row in several), "K = V = 64 is one tile, whose loads need no queue"
