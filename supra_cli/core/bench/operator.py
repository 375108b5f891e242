"""How fast the linear attention operator is, beside softmax attention and the hardware's own rates.

`sdpa` is scaled_dot_product_attention (is_causal, no mask, contiguous), `fla` the chunked retention of
flash-linear-attention where it is installed, `naive` the recurrence token by token.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from supra_cli.core.bench.roofline import rate_runs, rates
from supra_cli.core.bench.timing import Run, keep_freed_memory, measured, median_ratio, medians, result, target
from supra_cli.core.flops import operator_flops
from supra_cli.core.ops import chunk_tokens, linear_attention

LENGTHS = (2048, 8192, 32768)


class Shape(NamedTuple):
    batch: int
    heads: int
    width: int
    dtype: torch.dtype


SHAPES = {"cpu": Shape(1, 4, 64, torch.float32), "cuda": Shape(4, 32, 128, torch.bfloat16)}
SOFTMAX_UP_TO = {"cpu": 8192, "cuda": 1 << 30}
RECURRENCE_AT = {"cpu": 2048, "cuda": None}


def measure(device: str, *, rounds: int = 7, lengths: Sequence[int] = LENGTHS) -> dict:
    """CPU: fp32, B1 H4 D64, one thread, CPU time, freed memory kept. GPU: bf16, B4 H32 D128, time between events."""
    shape, memory, growth, kept = SHAPES[device], None, None, None
    if device == "cpu":
        torch.set_num_threads(1)
        kept = keep_freed_memory()
        memory = _backward_memory(8192) if 8192 in lengths else None
        growth = _growth(shape, (8192, 32768), rounds) if {8192, 32768} <= set(lengths) else None
    rows = [_row(shape, tokens, device, rounds) for tokens in lengths]
    return result(
        "operator",
        device,
        rounds,
        freed_memory_kept=kept,
        shape={**shape._asdict(), "dtype": str(shape.dtype), "decay": "fixed per head"},
        rows=rows,
        targets=_targets(rows, device, memory, growth),
    )


def _row(shape: Shape, tokens: int, device: str, rounds: int) -> dict:
    times = measured(_runs(shape, tokens, device), rounds, device)
    median = medians(times)
    row = {"tokens": tokens, "forward_ms": median["forward"], "forward_backward_ms": median["both"]}
    for other in ("sdpa", "fla"):
        for kind, label in (("forward", "forward"), ("both", "forward_backward")):
            name = f"{other}_{kind}"
            row[f"{other}_{label}_ms"] = median.get(name)
            row[f"over_{other}_{label}"] = median_ratio(times[name], times[kind]) if name in times else None
    row["naive_forward_ms"] = median.get("naive_forward")
    machine, positions = rates(median, device), shape.batch * tokens * shape.heads
    chunk = chunk_tokens(device, shape.width, shape.width)
    flops, moved = sum(operator_flops(positions, shape.width, shape.width, chunk)), traffic(shape, tokens, device)
    row["gflops"], row["matrix_gflops"] = flops / median["both"] / 1e6, machine.matrix_gflops
    row["gb_per_s"], row["copy_gb_per_s"] = moved / median["both"] / 1e6, machine.copy_gb_per_s
    row["share_of_matrix_rate"] = row["gflops"] / row["matrix_gflops"]
    row["share_of_copy_rate"] = row["gb_per_s"] / row["copy_gb_per_s"]
    row["roofline_ms"] = machine.least_ms(flops, moved)
    return {name: value for name, value in row.items() if value is not None}


def traffic(shape: Shape, tokens: int, device: str) -> int:
    """Bytes that forward and backward read and write.

    On a GPU each tensor once per kernel that touches it. Forward: k, v -> states; q, k, v, states -> o. Backward: k, v
    -> states; do, v, k, states -> dq; q, do -> gradients of states; q, k, do, these -> dv; do, v, q, these -> dk. On a
    CPU, where a block stays in the cache: q, k, v -> o, then q, k, v, do -> dq, dk, dv.
    """
    numbers = shape.batch * tokens * shape.heads * shape.width
    if device == "cpu":
        return shape.dtype.itemsize * (4 + 7) * numbers
    states = numbers * shape.width // chunk_tokens(device, shape.width, shape.width)
    return shape.dtype.itemsize * ((2 + 4) * numbers + 2 * states + (2 + 4 + 2 + 4 + 4) * numbers + 5 * states)


def _runs(shape: Shape, tokens: int, device: str) -> dict[str, Run]:
    leaves, g, do = _operands(shape, tokens, device)
    scale = shape.width**-0.5
    runs = {}
    runs["forward"], runs["both"] = _pair(lambda *x: linear_attention(*x, g, scale=scale)[0], leaves, do)
    if tokens <= SOFTMAX_UP_TO[device]:
        heads_first = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in leaves]
        softmax = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True)
        runs["sdpa_forward"], runs["sdpa_both"] = _pair(softmax, heads_first, do.transpose(1, 2).contiguous())
    if device == "cuda" and importlib.util.find_spec("fla"):
        from fla.ops.retention import chunk_retention

        runs["fla_forward"], runs["fla_both"] = _pair(lambda *x: chunk_retention(*x, scale=scale)[0], leaves, do)
    if tokens == RECURRENCE_AT[device]:
        runs["naive_forward"], _ = _pair(lambda *x: linear_attention(*x, g, path="naive")[0], leaves, do)
    return runs | rate_runs(device, shape.dtype)


def _operands(shape: Shape, tokens: int, device: str) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    rng = torch.Generator(device).manual_seed(0)
    size = (shape.batch, tokens, shape.heads, shape.width)
    q, k, v, do = (torch.randn(size, generator=rng, device=device, dtype=shape.dtype) for _ in range(4))
    slopes = torch.exp2(-8 * torch.arange(1.0, shape.heads + 1, device=device) / shape.heads)
    return [x.requires_grad_() for x in (q, k, v)], -slopes, do


def _pair(attend: Callable[..., torch.Tensor], leaves: list[torch.Tensor], do: torch.Tensor) -> tuple[Run, Run]:
    """Forward alone, and forward with backward."""

    def forward():
        with torch.no_grad():
            attend(*leaves)

    def both():
        torch.autograd.grad(attend(*leaves), leaves, do)

    return forward, both


def _growth(shape: Shape, lengths: tuple[int, int], rounds: int) -> float:
    """Time of forward and backward at the longer length over the shorter, both in every round."""
    runs = {}
    for tokens in lengths:
        leaves, g, do = _operands(shape, tokens, "cpu")
        runs[str(tokens)] = _pair(lambda *x, g=g: linear_attention(*x, g)[0], leaves, do)[1]
    times = measured(runs, rounds, "cpu")
    short, long = (times[str(tokens)] for tokens in lengths)
    return median_ratio(long, short)


def _backward_memory(tokens: int) -> float | None:
    """Peak of resident memory over forward and backward, relative to q, k, v, o and their four gradients; None where
    the system does not tell. Measured in a process of its own."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_put_backward_memory, args=(tokens, queue))
    process.start()
    ratio = queue.get(timeout=120)
    process.join()
    return ratio


def _put_backward_memory(tokens: int, queue: multiprocessing.Queue) -> None:
    """Counted from before the operands exist; a short run first brings libraries and caches in."""
    torch.set_num_threads(1)
    _forward_backward(*_operands(SHAPES["cpu"], 256, "cpu"))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    held = _operands(SHAPES["cpu"], tokens, "cpu")
    kept = _forward_backward(*held)
    assert all(x.shape == held[2].shape for x in kept)
    queue.put((_resident("VmHWM") - before) / (8 * held[2].numel() * held[2].element_size()))


def _forward_backward(leaves, g, do):
    o, _ = linear_attention(*leaves, g)
    return o, *torch.autograd.grad(o, leaves, do)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _targets(rows: list[dict], device: str, memory: float | None, growth: float | None) -> list[dict]:
    by_length = {row["tokens"]: row for row in rows}

    def of(tokens: int, name: str) -> float | None:
        return by_length.get(tokens, {}).get(name)

    softmax, faster = "over_sdpa_forward_backward", "forward+backward, times faster than SDPA at"
    if device == "cuda":
        fla = of(8192, "over_fla_forward_backward")
        return [
            target(f"{faster} 8192", "at least", 5.0, of(8192, softmax)),
            target("the same over flash-linear-attention", "at least", 1.3, fla),
            target("share of the copy bandwidth at 8192", "at least", 0.6, of(8192, "share_of_copy_rate")),
        ]
    return [
        target(f"{faster} 8192", "at least", 15.0, of(8192, softmax)),
        target(f"{faster} 2048", "at least", 3.0, of(2048, softmax)),
        target("share of the matrix-product rate at 8192", "at least", 0.5, of(8192, "share_of_matrix_rate")),
        target("time at 32768 over time at 8192", "at most", 4.4, growth),
        target("peak memory over inputs, outputs and gradients at 8192", "at most", 1.5, memory),
    ]
