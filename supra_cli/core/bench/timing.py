"""What every benchmark shares: clocks, interleaved rounds, a description of the machine, cells of a table."""

from __future__ import annotations

import ctypes
import random
import statistics
import time
from collections.abc import Callable

import torch

from supra_cli.core.environment import hardware, versions

Run = Callable[[], object]


def cpu_ms(run: Run) -> float:
    """CPU milliseconds of the process: with one thread, waiting for a neighbour does not count."""
    start = time.process_time_ns()
    run()
    return (time.process_time_ns() - start) / 1e6


def cuda_ms(run: Run) -> float:
    """Milliseconds between two events around the run, on the current stream."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def keep_freed_memory() -> bool:
    """Have the C library hold on to memory that is freed; True where it does.

    By glibc's own rule, and by what else lies in the heap, the outputs of one call go back to the system and the next
    pays a page fault for each 4 KiB of them: 0 or 20 ms of a call of 85. For all contenders alike, this says 0.
    """
    most_mapped, trim_above = -4, -1  # glibc's M_MMAP_MAX and M_TRIM_THRESHOLD
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(most_mapped, 0) and mallopt(trim_above, 2**31 - 1))


def interleave(runs: dict[str, Run], rounds: int, clock: Callable[[Run], float]) -> dict[str, list[float]]:
    """Milliseconds of each run, one after the other within a round, so that all see the same machine; one warm-up.

    Every round has an order of its own, drawn with seed 0: what the run before left in the caches falls to each alike.
    """
    order = random.Random(0)
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name in order.sample(list(runs), len(runs)):
            times[name].append(clock(runs[name]))
    return times


def measured(runs: dict[str, Run], rounds: int, device: str) -> dict[str, list[float]]:
    """`interleave` by the clock of the device."""
    return interleave(runs, rounds, cuda_ms if device == "cuda" else cpu_ms)


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(x / y for x, y in zip(numerator, denominator, strict=True))


def target(what: str, bound: str, value: float, found: float | None) -> dict:
    """What is aimed at, `at least` or `at most`, beside what was measured; None where it was not."""
    met = None if found is None else found >= value if bound == "at least" else found <= value
    return {"what": what, "bound": bound, "target": value, "measured": found, "met": met}


def machine() -> dict:
    """The hardware and versions that stand in every benchmark's record."""
    return {"hardware": hardware(), "versions": versions("triton", "flash-linear-attention", "numpy")}


def result(benchmark: str, device: str, rounds: int, **found: object) -> dict:
    clock = "CUDA events" if device == "cuda" else "CPU time of one thread"
    return {"benchmark": benchmark, **machine(), "device": device, "clock": clock, "rounds": rounds, **found}


def tables(found: dict) -> list[tuple[list[str], list[list[str]]]]:
    """(header, cells) of a result's rows and of its targets, those that are empty left out."""
    return [_table(found[name]) for name in ("rows", "targets") if found[name]]


def _table(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return names, [[_cell(row.get(name)) for name in names] for row in rows]


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)
