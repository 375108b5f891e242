"""What work takes at least: FLOPs and bytes counted, over the rates that the machine shows in the same run."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from supra_cli.core import ops
from supra_cli.core.bench.timing import Run
from supra_cli.core.flops import SDPA_FLOPS, operator_flops

MATRIX = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the two matrices whose product shows the arithmetic rate."""
COPY_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}


class Rates(NamedTuple):
    matrix_gflops: float
    copy_gb_per_s: float
    """Bytes read and bytes written, both counted."""

    def least_ms(self, flops: float, moved: float) -> float:
        """Milliseconds that neither the arithmetic nor the memory can beat."""
        return max(flops / self.matrix_gflops, moved / self.copy_gb_per_s) / 1e6


def rate_runs(device: str, dtype: torch.dtype) -> dict[str, Run]:
    """One large matrix product and one large copy, to be timed among the contenders."""
    square = torch.randn(MATRIX[device], MATRIX[device], device=device, dtype=dtype)
    source = torch.zeros(COPY_BYTES[device], dtype=torch.uint8, device=device)
    copied = torch.zeros_like(source)
    return {"matrix": lambda: square @ square, "copy": lambda: copied.copy_(source)}


def rates(median: dict[str, float], device: str) -> Rates:
    """From the median milliseconds of `rate_runs`."""
    return Rates(2 * MATRIX[device] ** 3 / median["matrix"] / 1e6, 2 * COPY_BYTES[device] / median["copy"] / 1e6)


def counted_flops(run: Run) -> int:
    """FLOPs of whatever `run` multiplies; causal softmax attention by whole squares, as PyTorch counts it."""
    supra = torch.ops.supra
    formulas = {
        **SDPA_FLOPS,
        supra.chunk: lambda q, k, v, *_, **__: _chunked(q, v, "cpu")[0],
        supra.triton: lambda q, k, v, *_, **__: _chunked(q, v, "cuda")[0],
        supra.chunk_backward: lambda do, dS, q, k, v, *_, **__: _chunked(q, v, "cpu")[1],
        supra.triton_backward: lambda do, dS, q, k, v, *_, **__: _chunked(q, v, "cuda")[1],
        supra.triton_step: lambda q, k, v, *_, **__: 4 * q[0] * q[1] * q[2] * q[3] * v[3],
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        run()
    return counter.get_total_flops()


def _chunked(q, v, device: str) -> tuple[int, int]:
    return operator_flops(q[0] * q[1] * q[2], q[3], v[3], ops.chunk_tokens(device, q[3], v[3]))
