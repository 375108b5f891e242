"""How fast is the linear attention operator, beside softmax attention and the hardware's own rate?

    python benchmarks/operator.py [--json] [--output FILE] [--rounds 7] [--lengths 2048 8192 32768]

On a CPU: fp32, B1 H4 D64, one thread, CPU time, in interleaved rounds. `sdpa` is scaled_dot_product_attention
(is_causal, no mask, contiguous). The matrix-product rate is that of two 1024 x 1024 fp32 matrices, measured in the same rounds.
"""

from __future__ import annotations

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.dirname(os.path.abspath(__file__)) in sys.path:
    sys.path.remove(os.path.dirname(os.path.abspath(__file__)))  # this file would hide the standard library's operator
sys.path[:0] = [ROOT, os.path.join(ROOT, "kernels")]

import argparse  # noqa: E402
import gc  # noqa: E402
import multiprocessing  # noqa: E402
import statistics  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from supra_kernels import linear_attention  # noqa: E402
from supra_kernels.chunk import chunk_length  # noqa: E402

from benchmarks.measure import cpu_ms, environment, interleave, median_ratio, report  # noqa: E402

HEADS, WIDTH, MATRIX = 4, 64, 1024
SOFTMAX_UP_TO = 8192
RECURRENCE_AT = 2048


def flops(tokens: int, heads: int, key_dim: int, v_dim: int) -> tuple[int, int]:
    """Of the matrix products, a multiplication and an addition counted as two: (forward, backward).

    Forward: q k^T and its product with v inside a chunk, q S, k v^T. Backward: five products inside a chunk, k v^T
    again, and four with the state or its gradient.
    """
    length = chunk_length(key_dim, v_dim)
    inside, across = length * (key_dim + v_dim), 2 * key_dim * v_dim
    backward_inside = length * (3 * key_dim + 2 * v_dim)
    return 2 * tokens * heads * (inside + across), 2 * tokens * heads * (backward_inside + 5 * key_dim * v_dim)


def operands(tokens: int) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(1, tokens, HEADS, WIDTH, generator=rng) for _ in range(4))
    slopes = torch.exp2(-8 * torch.arange(1.0, HEADS + 1) / HEADS)
    return [x.requires_grad_() for x in (q, k, v)], -slopes, do


def runs_at(tokens: int) -> dict:
    """Callables by name: ours and softmax attention, forward and forward + backward, and the matrix product."""
    leaves, g, do = operands(tokens)
    heads_first = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in leaves]
    do_first = do.transpose(1, 2).contiguous()
    square = torch.randn(MATRIX, MATRIX)

    def forward(form):
        with torch.no_grad():
            return linear_attention(*leaves, g, scale=WIDTH**-0.5, form=form)

    def both(form):
        o, _ = linear_attention(*leaves, g, scale=WIDTH**-0.5, form=form)
        torch.autograd.grad(o, leaves, do)

    def softmax_forward():
        with torch.no_grad():
            torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True)

    def softmax_both():
        o = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True)
        torch.autograd.grad(o, heads_first, do_first)

    runs = {"forward": lambda: forward("chunk"), "both": lambda: both("chunk"), "matrix": lambda: square @ square}
    if tokens <= SOFTMAX_UP_TO:
        runs |= {"sdpa_forward": softmax_forward, "sdpa_both": softmax_both}
    if tokens == RECURRENCE_AT:
        runs["naive_forward"] = lambda: forward("naive")
    return runs


def measure_length(tokens: int, rounds: int) -> dict:
    times = interleave(runs_at(tokens), rounds, cpu_ms)
    median = {name: statistics.median(values) for name, values in times.items()}
    matrix_rate = 2 * MATRIX**3 / median["matrix"] / 1e6
    rate = sum(flops(tokens, HEADS, WIDTH, WIDTH)) / median["both"] / 1e6
    row = {
        "tokens": tokens,
        "forward_ms": median["forward"],
        "forward_backward_ms": median["both"],
        "sdpa_forward_ms": median.get("sdpa_forward"),
        "sdpa_forward_backward_ms": median.get("sdpa_both"),
        "speedup_forward": None,
        "speedup_forward_backward": None,
        "naive_forward_ms": median.get("naive_forward"),
        "gflops": rate,
        "matrix_gflops": matrix_rate,
        "share_of_matrix_rate": rate / matrix_rate,
    }
    if "sdpa_both" in times:
        row["speedup_forward"] = median_ratio(times["sdpa_forward"], times["forward"])
        row["speedup_forward_backward"] = median_ratio(times["sdpa_both"], times["both"])
    return row


def backward_memory(tokens: int, queue) -> None:
    """Puts the peak of resident memory over forward and backward, relative to q, k, v, o and their four gradients.

    Counted from before the operands exist, in a process of its own; a short run first brings libraries and caches in.
    """
    torch.set_num_threads(1)
    _forward_backward(*operands(256))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    held = operands(tokens)
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


def targets(rows: list[dict], memory: float | None) -> list[dict]:
    by_length = {row["tokens"]: row for row in rows}
    listed = []

    def add(name: str, bound: str, target: float, measured: float | None) -> None:
        met = None if measured is None else (measured >= target if bound == "at least" else measured <= target)
        listed.append({"what": name, "bound": bound, "target": target, "measured": measured, "met": met})

    for tokens, target in ((8192, 15.0), (2048, 3.0)):
        if tokens in by_length:
            measured = by_length[tokens]["speedup_forward_backward"]
            add(f"forward+backward, times faster than SDPA at {tokens}", "at least", target, measured)
    if 8192 in by_length:
        share = by_length[8192]["share_of_matrix_rate"]
        add("share of the matrix-product rate at 8192", "at least", 0.5, share)
    if {8192, 32768} <= by_length.keys():
        growth = by_length[32768]["forward_backward_ms"] / by_length[8192]["forward_backward_ms"]
        add("time at 32768 over time at 8192", "at most", 4.4, growth)
    add("peak memory over inputs, outputs and gradients at 8192", "at most", 1.5, memory)
    return listed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768], help="tokens")
    options = parser.parse_args()
    torch.set_num_threads(1)
    memory = measured_memory(8192)
    rows = [measure_length(tokens, options.rounds) for tokens in options.lengths]
    shape = {
        "batch": 1,
        "heads": HEADS,
        "key_dim": WIDTH,
        "v_dim": WIDTH,
        "dtype": "float32",
        "decay": "fixed per head",
    }
    result = {
        "benchmark": "operator",
        "command": "python benchmarks/operator.py " + " ".join(sys.argv[1:]),
        **environment("cpu"),
        "clock": "CPU time of one thread, median of interleaved rounds",
        "rounds": options.rounds,
        "shape": shape,
        "rows": rows,
        "targets": targets(rows, memory),
    }
    report(result, options.output, options.json)


if __name__ == "__main__":
    main()
