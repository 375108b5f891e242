"""What `supra bench` measures, on a machine that has only torch, triton and transformers, and beside what is asked:

    python benchmarks/measure.py operator|delta|step|decode|train [--rounds 20] [--output FILE]

docs/performance.md has the lines by which benchmarks/results/ was written. `step` is the operator's decode step alone,
`delta` the delta rule's operator. What the other scripts here share stands below.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "kernels")]

import argparse  # noqa: E402
import ctypes  # noqa: E402
import json  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Callable  # noqa: E402
from contextlib import suppress  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention as softmax  # noqa: E402

from supra_cli.core import bench  # noqa: E402
from supra_cli.core.accounting import GPUS  # noqa: E402
from supra_cli.core.environment import hardware, versions  # noqa: E402
from supra_cli.core.ops import delta_rule, linear_attention  # noqa: E402


def machine() -> dict:
    """The hardware and versions that stand in every record."""
    return {"hardware": hardware(), "versions": versions("triton", "flash-linear-attention", "numpy")}


def target(what: str, bound: str, value: float, found: float | None) -> dict:
    """What is aimed at, `at least` or `at most`, beside what was measured; None where it was not."""
    met = None if found is None else found >= value if bound == "at least" else found <= value
    return {"what": what, "bound": bound, "target": value, "measured": found, "met": met}


def report(result: dict, path: Path | None) -> None:
    """Print the result as JSON, and write it where asked."""
    text = json.dumps(result, indent=1)
    print(text)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def arguments(about: str, **counts: int) -> argparse.Namespace:
    """`--output`, and counts with their defaults, as `--rounds`, of a script that `about` describes."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    for name, default in counts.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    torch.set_num_threads(1)
    return parser.parse_args()


def by_two_ranks(script: str, rounds: int) -> Any:
    """found.json, as `python -m benchmarks.SCRIPT --work ROUNDS FOLDER` leaves it, run by two ranks of one thread."""
    with tempfile.TemporaryDirectory() as folder:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*torchrun, "-m", f"benchmarks.{script}", "--work", str(rounds), folder]
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
        return json.loads((Path(folder) / "found.json").read_text())


def step(device: str, batches: list[int], rounds: int) -> dict:
    """32 decode steps of the operator, H32 K = V = 128, on a GPU in a CUDA graph; each reads and writes its state."""
    rows = []
    for batch in batches:
        q, k, v = torch.randn((3, batch, 1, 32, 128), device=device, dtype=bench.DTYPES[device])
        states = torch.zeros(min(32, max(1, 256 // batch)), batch, 32, 128, 128, device=device)
        g = torch.full((32,), -0.1, device=device)

        def steps(q=q, k=k, v=v, g=g, states=states) -> None:
            for layer in range(32):
                linear_attention(q, k, v, g, state=states[layer % len(states)])

        steps()
        times = bench.timed({"steps": bench.graphed(steps) if device == "cuda" else steps}, rounds, device)
        flops, moved = 32 * 4 * states[0].numel(), 32 * 2 * states[0].nbytes  # products with k and with q
        rows.append({"batch": batch} | times.row("steps", None, 32 * batch, flops, moved))
    return bench.result("step", device, rounds, rows)


def delta(device: str, lengths: list[int], rounds: int) -> dict:
    """The delta rule with a decay a head, as `gated_delta` has it, and one a channel, as `kda`: forward and backward,
    to decays and write strengths too, beside causal softmax attention (on a CPU up to 8,192 tokens).
    """
    (batch, heads, width), dtype, runs = bench.OPERATORS[device], bench.DTYPES[device], {}
    for tokens in lengths:
        *inputs, do = torch.randn((4, batch, tokens, heads, width), device=device, dtype=dtype).unbind()
        q, k, v = torch.nn.functional.normalize(inputs[0], dim=-1), *inputs[1:]
        k, beta = torch.nn.functional.normalize(k, dim=-1), torch.rand(q.shape[:3], device=device)
        for name, shape in (("head", q.shape[:3]), ("channel", q.shape)):
            leaves = [q, k, v, -0.1 * torch.rand(shape, device=device), beta]
            runs[tokens, name] = _both(lambda *x: delta_rule(*x)[0], leaves, do)
        if device == "cuda" or tokens <= 8192:
            leaves = [x.transpose(1, 2).contiguous() for x in inputs]
            runs[tokens, "softmax"] = _both(partial(softmax, is_causal=True), leaves, do.transpose(1, 2))
    times = bench.timed(runs, rounds, device)
    rows = []
    for (tokens, name), run in runs.items():
        if name != "softmax":
            beside = (tokens, "softmax")
            row = {"tokens": tokens, "decay": name, "softmax_ms": times.ms(beside) if beside in runs else None}
            rows.append(row | times.row((tokens, name), beside, batch * tokens, bench.counted_flops(run)))
    return bench.result("delta", device, rounds, rows)


def _both(attend: Callable[..., torch.Tensor], inputs: list[torch.Tensor], do: torch.Tensor) -> bench.Run:
    """Forward and backward, to every input."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    return lambda: torch.autograd.grad(attend(*leaves), leaves, do)


def asked(found: dict, device: str) -> list[dict]:
    """What this project asks of such figures."""
    rows = found["rows"]
    if found["benchmark"] in ("operator", "delta"):
        at = {row["tokens"]: row for row in rows if row.get("decay") != "channel"}
        over = {tokens: row["over_softmax"] for tokens, row in at.items()}
        longer = at[32768]["ms"] / at[8192]["ms"] if {8192, 32768} <= at.keys() else None
    if found["benchmark"] == "operator":
        rate, share, faster = ("matrix", 0.5, 15.0) if device == "cpu" else ("copy", 0.6, 5.0)
        fla = [target("the same over flash-linear-attention", "at least", 1.3, at.get(8192, {}).get("over_fla"))]
        return [
            target("forward+backward, times faster than softmax at 8192", "at least", faster, over.get(8192)),
            *([target("the same at 2048", "at least", 3.0, over.get(2048))] if device == "cpu" else fla),
            target(
                f"share of the {rate} rate at 8192", "at least", share, at.get(8192, {}).get(f"share_of_{rate}_rate")
            ),
            target("time at 32768 over time at 8192", "at most", 4.4, longer),
        ]
    if found["benchmark"] == "delta":
        faster = "delta rule, forward+backward, times faster than softmax at 8192"
        return [
            target(faster, "at least", 4.0, over.get(8192)),
            target("the same, the goal", "at least", 6.0, over.get(8192)),
            target("its time at 32768 over time at 8192", "at most", 4.4, longer),
        ]
    if found["benchmark"] == "step":
        shares = [row["share_of_copy_rate"] for row in rows if row["batch"] >= 16]
        return [target("step, share of the copy rate from batch 16", "at least", 0.7, min(shares, default=None))]
    if found["benchmark"] == "decode" and device == "cuda":
        return [target(f"{found['model']}, tokens/s over softmax", "at least", 3.0, rows[-1]["over_softmax"])]
    if found["benchmark"] == "decode":
        ours = [row for row in rows if row["model"] != "softmax"]
        what = f"ms/token at {ours[-1]['position']} over {ours[0]['position']}"
        return [target(what, "at most", 1.1, ours[-1]["ms"] / ours[0]["ms"])]
    return []


def with_mfu(rows: list[dict]) -> list[dict]:
    """With the share of the data sheet's dense bf16 rate, where the GPU is a known one."""
    sheets = {name.removesuffix(" SXM").removesuffix(" 80GB"): tera for name, (_, tera) in GPUS.items()}
    peak = next((tera for name, tera in sheets.items() if name in torch.cuda.get_device_name()), None)
    return [row | {"mfu": peak and row["gflops"] / peak / 1e3} for row in rows]


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed, for all contenders alike; True where it does.

    By its own rule outputs may go back to the system, and every call then pays up to 20 ms of page faults.
    """
    with suppress(AttributeError, OSError, TypeError):
        most_mapped, trim_above = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD
        return bool(ctypes.CDLL(None).mallopt(most_mapped, 0) and ctypes.CDLL(None).mallopt(trim_above, 2**31 - 1))
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("operator", "delta", "step", "decode", "train"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    parser.add_argument("--rounds", type=int, default=20, help="interleaved rounds")
    parser.add_argument("--model", default="tiny", help="directory, alias or hub id; weights are drawn")
    parser.add_argument("--layers", type=int, help="build only so many, where memory is small")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--positions", type=int, nargs="+", default=[100, 16000])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64, 256], help="of step")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--shapes", nargs="+", default=["8x512", "1x4096"], help="batch x tokens")
    parser.add_argument("--mixers", nargs="+", default=["softmax", "supra", "t2r"])
    given = parser.parse_args()
    device, rounds = given.device, given.rounds
    kept = keep_freed_memory() if device == "cpu" and given.what in ("operator", "delta") else False
    shapes = [tuple(map(int, shape.split("x"))) for shape in given.shapes]
    found = {
        "operator": lambda: bench.operator(device, given.tokens, rounds),
        "delta": lambda: delta(device, given.tokens, rounds),
        "step": lambda: step(device, given.batches, rounds),
        "decode": lambda: bench.decode(
            device, given.model, given.positions, given.batch, given.layers, given.compile, rounds
        ),
        "train": lambda: bench.train(device, given.model, shapes, given.layers, given.mixers, rounds),
    }[given.what]()
    if device == "cuda" and given.what == "train":
        found["rows"] = with_mfu(found["rows"])
    command = {"command": " ".join(["python benchmarks/measure.py", *sys.argv[1:]]), "freed_memory_kept": kept}
    report({**command, **found, "targets": asked(found, device)}, given.output)


if __name__ == "__main__":
    main()
