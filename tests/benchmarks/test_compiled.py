"""Every kernel compiles for every card that is supported with the arguments that the launcher gives it, and fits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
KERNELS = {
    "states S", "states dS", "query_side o", "query_side dq", "key_side dv", "key_side dk", "decay", "sums",
    "finish_backward", "step", "rotary", "rotary_backward",
}  # fmt: skip
SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}
"""Bytes that one program may have, from the CUDA C++ programming guide: 163, 99, 99 and 227 KiB."""


def compiled(tmp_path, target, cases, kernels=()) -> list[dict]:
    """Triton brings its assembler, so this needs no GPU; the interpreter would not see what does not compile."""
    pytest.importorskip("triton")
    command = [
        sys.executable,
        "benchmarks/compiled.py",
        "--target",
        str(target),
        "--output",
        str(tmp_path / "out.json"),
    ]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_INTERPRET": "1"}
    command += ["--cases", *cases, *(["--kernels", *kernels] if kernels else [])]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((tmp_path / "out.json").read_text())["rows"]


def over_chunks(rows) -> list[dict]:
    return [row for row in rows if row["kernel"].startswith(("states", "query_side", "key_side", "decay"))]


@pytest.mark.slow
def test_the_largest_launches_compile_for_the_smallest_cards_and_fit(tmp_path):
    """The files of the full runs hold the other cases."""
    rows = compiled(tmp_path, 86, ["token-packed-sums", "fp32-token-packed-sums"])
    assert {row["kernel"] for row in rows} == KERNELS
    assert all(row["shared_bytes"] <= SHARED[86] for row in rows)
    assert all(row["matrix_instructions"] for row in over_chunks(rows))
    bf16 = [row for row in over_chunks(rows) if row["case"] == "token-packed-sums"]
    assert all(row["programs"] >= 2 for row in bf16), "while one waits for memory another computes"


@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 89])
def test_the_kernels_that_take_most_fit_the_other_cards(target, tmp_path):
    cases, kernels = {"gqa", "fp32-token-packed-sums"}, {"states S", "states dS", "query_side o", "query_side dq"}
    rows = compiled(tmp_path, target, sorted(cases), kernels=["states", "query_side"])
    assert {(row["case"], row["kernel"]) for row in rows} == set(product(cases, kernels))
    assert all(row["shared_bytes"] <= SHARED[target] for row in rows)


@pytest.mark.parametrize("target", SHARED)
def test_the_full_run_of_every_card_is_on_file_and_fits(target):
    """`python benchmarks/compiled.py --target N --output benchmarks/results/compiled-smN.json` writes it."""
    found = json.loads((RESULTS / f"compiled-sm{target}.json").read_text())
    assert (found["target"], found["shared_bytes"]) == (f"sm_{target}", SHARED[target])
    rows = found["rows"]
    assert {row["kernel"] for row in rows} == KERNELS
    assert {row["case"] for row in rows} == set(compiled_cases())
    assert all(row["shared_bytes"] <= SHARED[target] for row in rows)


def compiled_cases() -> list[str]:
    """Read from the source, since importing it makes this process's Triton compile instead of interpreting."""
    text = (ROOT / "benchmarks" / "compiled.py").read_text(encoding="utf-8")
    table = text[text.index("CASES = {") :]
    return [line.split('"')[1] for line in table[: table.index("\n}")].splitlines() if line.startswith('    "')]


@pytest.mark.slow
def test_every_kernel_compiles_for_hopper(tmp_path):
    cases = ["mha", "gqa", "packed", "token", "narrow", "gated", "t2r", "uneven", "fp32-token-packed-sums"]
    rows = compiled(tmp_path, 90, cases)
    assert {row["kernel"] for row in rows} == KERNELS
    assert all(row["shared_bytes"] <= SHARED[90] for row in rows)
    real = [row for row in rows if row["case"] in ("mha", "gqa", "packed", "token", "narrow", "gated", "t2r")]
    assert all(row["programs"] >= 2 for row in rows if row in real or row["case"] == "uneven")
    assert all(row["stack_bytes"] <= (256 if row["case"] == "gated" else 128) for row in real)
    assert all(row["matrix_instructions"] for row in over_chunks(real))
    several = [row for row in over_chunks(real) if row["case"] != "narrow"]
    assert all(row["async_copies"] for row in several), "K = V = 64 is one tile, whose loads need no queue"
