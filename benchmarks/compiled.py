"""What the compiler makes of every kernel for a card that need not be there: registers, spills, shared memory, and how
many programs one multiprocessor holds. Triton brings its assembler.

    python benchmarks/compiled.py [--target 80] [--output FILE] [--cases mha packed ...] [--kernels states ...]

The target is a compute capability: 80 (A100), 86 (A10, RTX 3090), 89 (L4, RTX 4090) or 90 (H100, H200). The launcher
runs as on that card, with every launch compiled and none made, so the arguments, the tiles and the options are those of
a real call. The exit code is 1 where a kernel takes more shared memory than a program may have on that card.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "kernels")]
os.environ.pop("TRITON_INTERPRET", None)

import torch  # noqa: E402
import triton  # noqa: E402
from supra_kernels.gpu import fit, launch  # noqa: E402
from supra_kernels.gpu import tokens as single  # noqa: E402
from supra_kernels.gpu.fit import RESERVED, Card  # noqa: E402
from torch import Tensor  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402

from benchmarks.measure import machine, report  # noqa: E402

REGISTERS = 2**16
"""Of one multiprocessor."""


class Target(NamedTuple):
    """A card by its compute capability, from the CUDA C++ programming guide's table of technical specifications."""

    card: Card
    warps: int
    """That one multiprocessor holds."""


TARGETS = {
    80: Target(Card("A100", 166_912, 108, hopper=False), 64),
    86: Target(Card("A10", 101_376, 72, hopper=False), 48),
    89: Target(Card("L4", 101_376, 58, hopper=False), 48),
    90: Target(fit.H100, 64),
}


class Driver:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, target: int):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.target, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Compiled:
    """Stands where a kernel of the launcher stood; a launch compiles it and notes what came out."""

    def __init__(self, kernel: triton.JITFunction, target: Target, rows: list[dict], note: Callable[[], dict]):
        self._kernel, self._target, self._rows, self._note = kernel, target, rows, note

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def compiled(*arguments, **given) -> None:
            built = self._kernel.warmup(*arguments, grid=grid, **given)
            self._rows.append({**self._note(), "kernel": self._name(given), **resources(built, self._target)})

        return compiled

    def _name(self, given: dict) -> str:
        name = self._kernel.__name__.removesuffix("_kernel")
        if name not in WRITES:
            return name
        flag, written = WRITES[name]
        return f"{name} {written[given[flag]]}"


class NoKernel:
    """Stands for a kernel that is not wanted."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: None


WRITES = {
    "states": ("REVERSE", ("S", "dS")),
    "query_side": ("GRADIENT", ("o", "dq")),
    "key_side": ("TRANSPOSED", ("dv", "dk")),
}
"""The kernels of two uses: the flag that tells which, and what is written without it and with it."""


def resources(built, target: Target) -> dict:
    """Of a kernel for one multiprocessor: per thread, per program, and programs that it holds at a time."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        asked = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    warps, shared = built.metadata.num_warps, built.metadata.shared
    by_memory = (target.card.shared_bytes + RESERVED) // (shared + RESERVED)
    fits = min(REGISTERS // (-(-registers // 8) * 8 * 32 * warps), by_memory, target.warps // warps)
    return {
        "warps": warps,
        "registers": registers,
        "stack_bytes": stack,
        "shared_bytes": shared,
        "programs": fits,
        "matrix_instructions": len(re.findall(r"wgmma\.mma_async|mma\.sync", built.asm["ptx"])),
        "async_copies": len(re.findall(r"cp\.async\.c[ag]", built.asm["ptx"])),
    }


def case(
    heads: int = 32,
    kv_heads: int = 8,
    widths: tuple[int, int] = (128, 128),
    dtype: torch.dtype = torch.bfloat16,
    decay: str = "fixed",
    packed: bool = False,
    norm_eps: float | None = 1e-5,
    denominator_min: float | None = None,
    tokens: int = 1024,
    spans: int = 1,
    continued: bool = False,
    before: bool = True,
) -> None:
    """One call forward, backward and one decode step; a per-token decay has its gradient. `continued`: from a state,
    and with a gradient of the last. `before`: ReLU and rotation too."""
    key_dim, v_dim = widths

    def drawn(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=dtype)

    q, k = drawn(1, tokens, heads, key_dim), drawn(1, tokens, kv_heads, key_dim)
    v = drawn(1, tokens, kv_heads, v_dim)
    g = {"none": None, "fixed": torch.zeros(heads), "token": torch.zeros(1, tokens, heads)}[decay]
    documents = torch.zeros(1, tokens, dtype=torch.int32) if packed else None
    after = {"norm_eps": norm_eps, "denominator_min": denominator_min}
    sums = denominator_min is not None
    S = torch.zeros(1, heads, key_dim, v_dim + sums) if continued else None

    problem = launch.Problem(q, k, v, g, documents, 1.0, sums=sums)
    o, end, row = launch.forward(problem, S, dtype, spans=spans, **after)
    plain = norm_eps is None and denominator_min is None
    finish = None if plain else launch.Finish(o, row, denominator_min)
    launch.backward(problem, S, torch.zeros_like(o), finish, S, decays=decay == "token", spans=spans)

    one = [None if x is None else x if x.dim() == 1 else x[:, :1].contiguous() for x in (q, k, v, g)]
    table = drawn(1, tokens, key_dim)
    raw = {"cos": table[:, :1], "sin": table[:, :1], "relu": True} if before else {}
    single.step(launch.Problem(*one, None, 1.0, sums=sums), end, dtype, **raw, **after)
    single.rotate(q, table, table, relu=before)
    single.rotate_backward(q, q if before else None, table, table)


CASES = {
    "mha": {"kv_heads": 32},
    "gqa": {},
    "packed": {"packed": True},
    "token": {"decay": "token"},
    "gated": {"decay": "token", "norm_eps": None, "denominator_min": 1e-6, "widths": (256, 128)},
    "t2r": {
        "decay": "none", "norm_eps": None, "denominator_min": 0.01, "kv_heads": 32, "widths": (256, 128),
        "before": False,
    },
    "narrow": {"widths": (64, 64)},
    "fp16": {"dtype": torch.float16},
    "wide": {"heads": 8, "kv_heads": 4, "widths": (256, 256)},
    "uneven": {"heads": 6, "kv_heads": 3, "widths": (72, 40)},
    "odd": {"heads": 6, "kv_heads": 3, "widths": (20, 33), "norm_eps": None, "tokens": 333, "before": False},
    "spans": {"kv_heads": 32, "spans": 4, "continued": True, "before": False},
    "token-packed-sums": {
        "decay": "token", "packed": True, "norm_eps": None, "denominator_min": 0.01, "continued": True
    },
    "fp32": {"dtype": torch.float32},
    "fp32-token-packed-sums": {
        "dtype": torch.float32, "decay": "token", "packed": True, "norm_eps": None, "denominator_min": 0.01
    },
    "fp32-gated": {
        "dtype": torch.float32, "decay": "token", "norm_eps": None, "denominator_min": 1e-6, "widths": (256, 128)
    },
    "fp32-wide": {"dtype": torch.float32, "heads": 8, "kv_heads": 4, "widths": (256, 256)},
    "fp16-wide": {"dtype": torch.float16, "heads": 8, "kv_heads": 4, "widths": (256, 256)},
}  # fmt: skip
"""Where nothing else is said bf16, 32 heads on 8 kv heads, K = V = 128, fixed decay, with the norm."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=int, choices=tuple(TARGETS), default=90, help="compute capability, times ten")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=tuple(CASES))
    parser.add_argument("--kernels", nargs="+", default=[""], help="only those whose names begin so")
    arguments = parser.parse_args()
    target = TARGETS[arguments.target]
    driver.set_active(Driver(arguments.target))
    fit.card_of = lambda device: target.card
    rows: list[dict] = []
    now, wanted = "", tuple(arguments.kernels)
    for module in (launch, single):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            kernel = Compiled(getattr(module, name), target, rows, lambda: {"case": now})
            setattr(module, name, kernel if name.startswith(wanted) else NoKernel())
    for now in arguments.cases:
        case(**CASES[now])
    command = " ".join(["python benchmarks/compiled.py", *sys.argv[1:]])
    limit = {"target": f"sm_{arguments.target}", "shared_bytes": target.card.shared_bytes}
    report(
        {"benchmark": "compiled", "command": command, **limit, **machine(), "rows": rows, "targets": []},
        arguments.output,
    )
    over = [row for row in rows if row["shared_bytes"] > target.card.shared_bytes]
    for row in over:
        print(f"{row['case']} {row['kernel']}: {row['shared_bytes']:,} bytes of shared memory", file=sys.stderr)
    return int(bool(over))


if __name__ == "__main__":
    sys.exit(main())
