"""How fast a model trains with each mixer, beside its softmax base: forward and backward of the cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from supra_cli.core.bench.models import configs, draw
from supra_cli.core.bench.roofline import counted_flops, rate_runs, rates
from supra_cli.core.bench.timing import Run, measured, median_ratio, medians, result
from supra_cli.core.recipe.keep import SOFTMAX

MIXERS = (SOFTMAX, "supra", "t2r")
SHAPES = ((8, 512), (1, 4096))


def measure(device: str, *, model: str = "tiny", rounds: int = 5, shapes: Sequence[tuple[int, int]] = SHAPES) -> dict:
    """`shapes` are (batch, tokens). All parameters move. CPU: fp32, one thread, CPU time. GPU: bf16, time between
    events, and the peak memory. The roofline is the counted FLOPs over the rate of one large matrix product.
    """
    if device == "cpu":
        torch.set_num_threads(1)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    models = {name: draw(config, device, dtype) for name, config in configs(model, MIXERS).items()}
    rows = [row for batch, tokens in shapes for row in _rows(models, batch, tokens, device, dtype, rounds)]
    return result("train", device, rounds, model=model, rows=rows, targets=[])


def _rows(
    models: dict[str, nn.Module], batch: int, tokens: int, device: str, dtype: torch.dtype, rounds: int
) -> list[dict]:
    vocabulary = models[SOFTMAX].config.vocab_size
    ids = torch.randint(0, vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    runs = {name: _step(student, ids) for name, student in models.items()}
    times = measured(runs | rate_runs(device, dtype), rounds, device)
    median = medians(times)
    machine, rows = rates(median, device), []
    for name in models:
        row = {"mixer": name, "batch": batch, "tokens": tokens, "step_ms": median[name]}
        row["tokens_per_s"] = batch * tokens / median[name] * 1e3
        row["over_softmax"] = median_ratio(times[SOFTMAX], times[name])
        flops = counted_flops(runs[name])
        row["gflops"], row["matrix_gflops"] = flops / median[name] / 1e6, machine.matrix_gflops
        row["share_of_matrix_rate"] = row["gflops"] / machine.matrix_gflops
        row["roofline_ms"] = machine.least_ms(flops, 0)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            runs[name]()
            row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        rows.append(row)
    return rows


def _step(student: nn.Module, ids: torch.Tensor) -> Run:
    def run() -> None:
        student.zero_grad(set_to_none=True)
        student(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    return run
