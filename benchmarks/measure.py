"""What every benchmark shares: interleaved timing, medians, a description of the machine, a table, JSON."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch


def cpu_ms(run: Callable[[], object]) -> float:
    """CPU milliseconds of the process: with one thread, waiting for a neighbour does not count."""
    start = time.process_time_ns()
    run()
    return (time.process_time_ns() - start) / 1e6


def cuda_ms(run: Callable[[], object]) -> float:
    """Milliseconds between two events around the run, on the current stream."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def interleave(
    runs: dict[str, Callable[[], object]], rounds: int, clock: Callable[..., float]
) -> dict[str, list[float]]:
    """Milliseconds of each run, one after the other within a round, so that all see the same machine; one warm-up."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(clock(run))
    return times


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(x / y for x, y in zip(numerator, denominator, strict=True))


def environment(device: str) -> dict:
    packages = {}
    for name in ("torch", "triton", "transformers", "flash-linear-attention", "numpy"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    hardware = {
        "cpu": _processor(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device == "cuda":
        hardware["gpu"] = torch.cuda.get_device_name()
    return {"hardware": hardware, "versions": {"python": platform.python_version(), **packages}}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{names[0] if names else platform.machine()}, {len(names)} logical cores, {capability}"


def report(result: dict, path: Path | None, as_json: bool) -> None:
    """Write the result where asked; print it as JSON or as tables of its rows and of its targets."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    if as_json:
        json.dump(result, sys.stdout, indent=1)
        print()
        return
    print_table(result["rows"])
    print()
    print_table(result["targets"])


def print_table(rows: list[dict]) -> None:
    if not rows:
        return
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    widths = [max(len(x) for x in column) for column in zip(names, *cells, strict=True)]
    for line in (names, ["-" * width for width in widths], *cells):
        print("  ".join(x.rjust(width) for x, width in zip(line, widths, strict=True)))


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 100
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )
