"""What the compiler makes of every kernel for compute capability 9.0 (H100, H200): registers, spills, shared memory,
and how many programs one multiprocessor holds. It needs no GPU: Triton brings its assembler.

    python benchmarks/compiled.py [--json] [--output FILE] [--cases mha packed ...]

The launcher runs as on a GPU, with every launch compiled and none made, so the arguments, the tiles and the options are
those of a real call.
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

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "kernels")]
os.environ.pop("TRITON_INTERPRET", None)

import torch  # noqa: E402
import triton  # noqa: E402
from supra_kernels.gpu import launch  # noqa: E402
from supra_kernels.gpu import tokens as single  # noqa: E402
from torch import Tensor  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402

from benchmarks.measure import machine, report  # noqa: E402

REGISTERS, SHARED, WARPS = 2**16, 228 * 1024, 64
"""Of one multiprocessor of compute capability 9.0. A program takes 1 KiB of shared memory beside its own."""


class Hopper:
    """As much of a Triton driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Compiled:
    """Stands where a kernel of the launcher stood; a launch compiles it and notes what came out."""

    def __init__(self, kernel: triton.JITFunction, rows: list[dict], note: Callable[[], dict]):
        self._kernel, self._rows, self._note = kernel, rows, note

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def compiled(*arguments, **given) -> None:
            built = self._kernel.warmup(*arguments, grid=grid, **given)
            self._rows.append({**self._note(), "kernel": self._name(given), **resources(built)})

        return compiled

    def _name(self, given: dict) -> str:
        name = self._kernel.__name__.removesuffix("_kernel")
        if name not in WRITES:
            return name
        flag, written = WRITES[name]
        return f"{name} {written[given[flag]]}"


WRITES = {
    "states": ("REVERSE", ("S", "dS")),
    "query_side": ("GRADIENT", ("o", "dq")),
    "key_side": ("TRANSPOSED", ("dv", "dk")),
}
"""The kernels of two uses: the flag that tells which, and what is written without it and with it."""


def resources(built) -> dict:
    """Of a kernel for one multiprocessor: per thread, per program, and programs that it holds at a time."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        asked = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    warps, shared = built.metadata.num_warps, built.metadata.shared
    fits = min(REGISTERS // (-(-registers // 8) * 8 * 32 * warps), SHARED // (shared + 1024), WARPS // warps)
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
    segment = torch.zeros(1, tokens, dtype=torch.long) if packed else None
    after = {"norm_eps": norm_eps, "denominator_min": denominator_min}
    sums = denominator_min is not None
    S = torch.zeros(1, heads, key_dim, v_dim + sums) if continued else None

    problem = launch.Problem(q, k, v, g, segment, 1.0, sums=sums)
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
}  # fmt: skip
"""Where nothing else is said bf16, 32 heads on 8 kv heads, K = V = 128, fixed decay, with the norm."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=tuple(CASES))
    given = parser.parse_args()
    driver.set_active(Hopper())
    rows: list[dict] = []
    now = ""
    for module in (launch, single):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            setattr(module, name, Compiled(getattr(module, name), rows, lambda: {"case": now}))
    for now in given.cases:
        case(**CASES[now])
    command = " ".join(["python benchmarks/compiled.py", *sys.argv[1:]])
    found = {"benchmark": "compiled", "command": command, "target": "sm_90", **machine(), "rows": rows}
    report({**found, "targets": []}, given.output, given.json)


if __name__ == "__main__":
    main()
