"""How fast is the linear attention operator, beside softmax attention and the hardware's own rates?

    python benchmarks/operator.py [--device cpu|cuda] [--json] [--output FILE] [--rounds 7] [--lengths 2048 8192 32768]

`sdpa` is scaled_dot_product_attention (is_causal, no mask, contiguous), `fla` is flash-linear-attention's chunked
retention where it is installed, `naive` the recurrence token by token. Medians of interleaved rounds.
On a CPU: fp32, B1 H4 D64, one thread, CPU time; the matrix-product rate is that of two 1024 x 1024 matrices.
On a GPU: bf16, B4 H32 D128, time between events; the copy bandwidth is that of a 1 GiB copy, read and written.
"""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.dirname(os.path.abspath(__file__)) in sys.path:
    sys.path.remove(os.path.dirname(os.path.abspath(__file__)))  # this file would hide the standard library's operator
sys.path[:0] = [ROOT, os.path.join(ROOT, "kernels")]

import argparse  # noqa: E402
import functools  # noqa: E402
import gc  # noqa: E402
import importlib.util  # noqa: E402
import multiprocessing  # noqa: E402
import statistics  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import NamedTuple  # noqa: E402

import torch  # noqa: E402
from supra_kernels import linear_attention  # noqa: E402
from supra_kernels.chunk import chunk_length  # noqa: E402

from benchmarks.measure import cpu_ms, cuda_ms, environment, interleave, median_ratio, report  # noqa: E402


class Shape(NamedTuple):
    batch: int
    heads: int
    width: int
    dtype: torch.dtype


SHAPES = {"cpu": Shape(1, 4, 64, torch.float32), "cuda": Shape(4, 32, 128, torch.bfloat16)}
SOFTMAX_UP_TO = {"cpu": 8192, "cuda": 1 << 30}
RECURRENCE_AT = {"cpu": 2048, "cuda": None}
MATRIX = {"cpu": 1024, "cuda": 8192}
COPY_BYTES = 1 << 30
GPU_CHUNK = 64


def flops(shape: Shape, tokens: int, length: int) -> tuple[int, int]:
    """Of the matrix products, a multiplication and an addition counted as two: (forward, backward).

    Forward: q k^T and its product with v inside a chunk, q S, k v^T. Backward: five products inside a chunk, k v^T
    again, and four with the state or its gradient.
    """
    inside, across = length * shape.width, shape.width**2
    rows = 2 * shape.batch * tokens * shape.heads
    return rows * (2 * inside + 2 * across), rows * (5 * inside + 5 * across)


def traffic(shape: Shape, tokens: int) -> int:
    """Bytes that forward and backward on a GPU read and write, each tensor once per kernel that touches it.

    Forward: k, v -> states; q, k, v, states -> o. Backward: k, v -> states; q, do -> their gradients;
    q, k, v, do, both -> dq, dk; q, k, do, the gradients -> dv.
    """
    rows = shape.batch * tokens * shape.heads * shape.width
    states = rows * shape.width // GPU_CHUNK
    return 2 * ((2 + 4) * rows + 2 * states + (2 + 2 + 6 + 4) * rows + 5 * states)


def operands(shape: Shape, tokens: int, device: str) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    rng = torch.Generator(device).manual_seed(0)
    size = (shape.batch, tokens, shape.heads, shape.width)
    q, k, v, do = (torch.randn(size, generator=rng, device=device, dtype=shape.dtype) for _ in range(4))
    slopes = torch.exp2(-8 * torch.arange(1.0, shape.heads + 1, device=device) / shape.heads)
    return [x.requires_grad_() for x in (q, k, v)], -slopes, do


def pair(
    attend: Callable[..., torch.Tensor], leaves: list[torch.Tensor], do: torch.Tensor
) -> tuple[Callable, Callable]:
    """Forward alone, and forward with backward."""

    def forward():
        with torch.no_grad():
            attend(*leaves)

    def both():
        torch.autograd.grad(attend(*leaves), leaves, do)

    return forward, both


def runs_at(shape: Shape, tokens: int, device: str) -> dict[str, Callable]:
    leaves, g, do = operands(shape, tokens, device)
    scale = shape.width**-0.5
    runs = {}
    runs["forward"], runs["both"] = pair(lambda *x: linear_attention(*x, g, scale=scale)[0], leaves, do)
    if tokens <= SOFTMAX_UP_TO[device]:
        heads_first = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in leaves]
        softmax = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True)
        runs["sdpa_forward"], runs["sdpa_both"] = pair(softmax, heads_first, do.transpose(1, 2).contiguous())
    if device == "cuda" and importlib.util.find_spec("fla"):
        from fla.ops.retention import chunk_retention

        runs["fla_forward"], runs["fla_both"] = pair(lambda *x: chunk_retention(*x, scale=scale)[0], leaves, do)
    if tokens == RECURRENCE_AT[device]:
        runs["naive_forward"], _ = pair(lambda *x: linear_attention(*x, g, form="naive")[0], leaves, do)
    square = torch.randn(MATRIX[device], MATRIX[device], device=device, dtype=shape.dtype)
    runs["matrix"] = lambda: square @ square
    if device == "cuda":
        source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
        runs["copy"] = source.clone
    return runs


def measure_length(shape: Shape, tokens: int, device: str, rounds: int) -> dict:
    times = interleave(runs_at(shape, tokens, device), rounds, cuda_ms if device == "cuda" else cpu_ms)
    median = {name: statistics.median(values) for name, values in times.items()}
    row = {"tokens": tokens, "forward_ms": median["forward"], "forward_backward_ms": median["both"]}
    for other in ("sdpa", "fla"):
        for kind, label in (("forward", "forward"), ("both", "forward_backward")):
            name = f"{other}_{kind}"
            row[f"{other}_{label}_ms"] = median.get(name)
            row[f"over_{other}_{label}"] = median_ratio(times[name], times[kind]) if name in times else None
    row["naive_forward_ms"] = median.get("naive_forward")
    length = GPU_CHUNK if device == "cuda" else chunk_length(shape.width, shape.width)
    row["gflops"] = sum(flops(shape, tokens, length)) / median["both"] / 1e6
    row["matrix_gflops"] = 2 * MATRIX[device] ** 3 / median["matrix"] / 1e6
    row["share_of_matrix_rate"] = row["gflops"] / row["matrix_gflops"]
    if device == "cuda":
        row["gb_per_s"] = traffic(shape, tokens) / median["both"] / 1e6
        row["copy_gb_per_s"] = 2 * COPY_BYTES / median["copy"] / 1e6
        row["share_of_copy_rate"] = row["gb_per_s"] / row["copy_gb_per_s"]
    return {name: value for name, value in row.items() if value is not None}


def backward_memory(tokens: int, queue) -> None:
    """Puts the peak of resident memory over forward and backward, relative to q, k, v, o and their four gradients.

    Counted from before the operands exist, in a process of its own; a short run first brings libraries and caches in.
    """
    torch.set_num_threads(1)
    _forward_backward(*operands(SHAPES["cpu"], 256, "cpu"))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    held = operands(SHAPES["cpu"], tokens, "cpu")
    kept = _forward_backward(*held)
    assert all(x.shape == held[2].shape for x in kept)
    queue.put((_resident("VmHWM") - before) / (8 * held[2].numel() * held[2].element_size()))


def _forward_backward(leaves, g, do):
    o, _ = linear_attention(*leaves, g, form="chunk")
    return o, *torch.autograd.grad(o, leaves, do)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measured_memory(tokens: int) -> float | None:
    if not Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=backward_memory, args=(tokens, queue))
    process.start()
    ratio = queue.get(timeout=120)
    process.join()
    return ratio


def measured_growth(shape: Shape, lengths: tuple[int, int], rounds: int) -> float:
    """Time of forward and backward at the longer length over the shorter, both in every round."""
    runs = {}
    for tokens in lengths:
        leaves, g, do = operands(shape, tokens, "cpu")
        runs[str(tokens)] = pair(lambda *x, g=g: linear_attention(*x, g)[0], leaves, do)[1]
    times = interleave(runs, rounds, cpu_ms)
    short, long = (times[str(tokens)] for tokens in lengths)
    return median_ratio(long, short)


def targets(rows: list[dict], device: str, memory: float | None, growth: float | None) -> list[dict]:
    """What is aimed at, beside what was measured: None where a length was not run or a package is missing."""
    by_length = {row["tokens"]: row for row in rows}

    def of(tokens: int, name: str) -> float | None:
        return by_length.get(tokens, {}).get(name)

    listed = []

    def add(what: str, bound: str, target: float, measured: float | None) -> None:
        met = None if measured is None else (measured >= target if bound == "at least" else measured <= target)
        listed.append({"what": what, "bound": bound, "target": target, "measured": measured, "met": met})

    softmax = "over_sdpa_forward_backward"
    if device == "cuda":
        add("forward+backward, times faster than SDPA at 8192", "at least", 5.0, of(8192, softmax))
        add("the same over flash-linear-attention", "at least", 1.3, of(8192, "over_fla_forward_backward"))
        add("share of the copy bandwidth at 8192", "at least", 0.6, of(8192, "share_of_copy_rate"))
        return listed
    add("forward+backward, times faster than SDPA at 8192", "at least", 15.0, of(8192, softmax))
    add("forward+backward, times faster than SDPA at 2048", "at least", 3.0, of(2048, softmax))
    add("share of the matrix-product rate at 8192", "at least", 0.5, of(8192, "share_of_matrix_rate"))
    add("time at 32768 over time at 8192", "at most", 4.4, growth)
    add("peak memory over inputs, outputs and gradients at 8192", "at most", 1.5, memory)
    return listed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=SHAPES, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768], help="tokens")
    options = parser.parse_args()
    device, shape = options.device, SHAPES[options.device]
    if device == "cpu":
        torch.set_num_threads(1)
    memory = measured_memory(8192) if device == "cpu" else None
    both = device == "cpu" and {8192, 32768} <= set(options.lengths)
    growth = measured_growth(shape, (8192, 32768), options.rounds) if both else None
    rows = [measure_length(shape, tokens, device, options.rounds) for tokens in options.lengths]
    result = {
        "benchmark": "operator",
        "command": " ".join(["python benchmarks/operator.py", *sys.argv[1:]]),
        **environment(device),
        "clock": "CUDA events" if device == "cuda" else "CPU time of one thread",
        "rounds": options.rounds,
        "shape": {**shape._asdict(), "dtype": str(shape.dtype), "decay": "fixed per head"},
        "rows": rows,
        "targets": targets(rows, device, memory, growth),
    }
    report(result, options.output, options.json)


if __name__ == "__main__":
    main()
