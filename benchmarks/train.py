"""How fast does a model train with each mixer, beside its softmax base?

    python benchmarks/train.py [--device cpu|cuda] [--json] [--output FILE] [--rounds 5] [--shapes 8x512 1x4096]

Forward and backward of the cross-entropy of the bundled model's shape, all parameters moving; weights are drawn, since
time does not depend on them. On a CPU: fp32, one thread, CPU time. On a GPU: bf16, time between events, and the peak
memory. Mixers take turns within a round; medians are shown.
"""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.dirname(os.path.abspath(__file__)) in sys.path:
    sys.path.remove(os.path.dirname(os.path.abspath(__file__)))  # operator.py there would hide the standard library's
sys.path[:0] = [ROOT, os.path.join(ROOT, "kernels")]

import argparse  # noqa: E402
import statistics  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402

from benchmarks.measure import cpu_ms, cuda_ms, environment, interleave, median_ratio, report  # noqa: E402

MIXERS = ("softmax", "supra", "t2r")


def model(mixer: str, device: str) -> torch.nn.Module:
    from supra_cli.core.hub import base_config, resolve
    from supra_cli.core.modeling import SupraConfig, SupraForCausalLM

    torch.manual_seed(0)
    config = SupraConfig.from_base(base_config(resolve("tiny")), mixer=mixer)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return SupraForCausalLM._from_config(config).to(device, dtype)


def step(student: torch.nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        student.zero_grad(set_to_none=True)
        student(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    return run


def measure(models: dict[str, torch.nn.Module], batch: int, tokens: int, device: str, rounds: int) -> list[dict]:
    vocabulary = models["softmax"].config.vocab_size
    ids = torch.randint(0, vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    runs = {name: step(student, ids) for name, student in models.items()}
    times = interleave(runs, rounds, cuda_ms if device == "cuda" else cpu_ms)
    rows = []
    for name in models:
        median = statistics.median(times[name])
        row = {"mixer": name, "batch": batch, "tokens": tokens, "step_ms": median}
        row["tokens_per_s"] = batch * tokens / median * 1e3
        row["over_softmax"] = median_ratio(times["softmax"], times[name])
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            runs[name]()
            row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--shapes", nargs="+", default=["8x512", "1x4096"], help="batch x tokens")
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    models = {mixer: model(mixer, options.device) for mixer in MIXERS}
    rows = []
    for shape in options.shapes:
        batch, tokens = map(int, shape.split("x"))
        rows += measure(models, batch, tokens, options.device, options.rounds)
    result = {
        "benchmark": "train",
        "command": " ".join(["python benchmarks/train.py", *sys.argv[1:]]),
        **environment(options.device),
        "clock": "CUDA events" if options.device == "cuda" else "CPU time of one thread",
        "rounds": options.rounds,
        "rows": rows,
        "targets": [],
    }
    report(result, options.output, options.json)


if __name__ == "__main__":
    main()
