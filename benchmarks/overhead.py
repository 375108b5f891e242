"""What does the training loop cost beside the bare passes: its own work, waiting for data, a save?

    python benchmarks/overhead.py [--device cpu|cuda] [--json] [--output FILE] [--steps 30] [--rows 8] [--tokens 256]

`supra uptrain` trains the bundled model's shape with the finetune loss, saving every tenth step. Between its steps, the
same weights at the start take the same rows through forward, the same loss, backward and AdamW, and nothing else. The
two take turns; medians over the steps are shown, the first left out. On a CPU: fp32, one thread, CPU time beside wall
time. On a GPU: bf16, wall time with the device idle at both ends.
"""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "kernels")]

import argparse  # noqa: E402
import statistics  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import NamedTuple  # noqa: E402

import torch  # noqa: E402

from benchmarks.measure import machine, report  # noqa: E402

SAVE_EVERY = 10


class Spent(NamedTuple):
    cpu_ms: float
    wall_ms: float


def spent(run: Callable[[], object], device: str) -> tuple[object, Spent]:
    """What `run` returned, and what it took."""
    wall, cpu = time.perf_counter_ns(), time.process_time_ns()
    result = run()
    if device == "cuda":
        torch.cuda.synchronize()
    return result, Spent((time.process_time_ns() - cpu) / 1e6, (time.perf_counter_ns() - wall) / 1e6)


def recipe(steps: int, rows: int, tokens: int):
    from supra_cli.core import recipe as recipes

    stage = {"kind": "finetune", "tokens": steps * rows * tokens, "batch_tokens": rows * tokens, "lr": 1e-3}
    return recipes.validate(
        {
            "base": "tiny",
            "data": {"seq_len": tokens, "sources": [{"path": "python-stdlib"}]},
            "checkpoint": {"every_steps": SAVE_EVERY, "keep_last": 2},
            "stages": [stage],
        }
    )


def bare_steps(model: Path, parsed, device: str):
    """A function that takes the next step on the rows of the recipe; waiting for data is not in it."""
    from supra_cli.core import checkpoint
    from supra_cli.core.data import rows
    from supra_cli.core.stages import stages
    from supra_cli.core.train.step import computing_in

    spec = parsed.stages[0]
    student = checkpoint.load(model, device=device, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=spec.lr, betas=spec.betas, fused=True)
    mixture = rows.training(parsed.data, checkpoint.load_tokenizer(model), parsed.seed)
    stage = stages.get("finetune")(stages.get("finetune").Options())
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def draw():
        return mixture.batch(parsed.rows(spec), parsed.seq_len(spec)).to(torch.device(device))

    def step(batch) -> None:
        with computing_in(dtype, torch.device(device)):
            loss = stage.loss(student, None, batch, lambda part: part)
        (loss.sum / stage.scored(batch)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return draw, step


def measure(steps: int, rows: int, tokens: int, device: str) -> dict[str, list[Spent]]:
    """What each part took, step by step."""
    from supra_cli.core import checkpoint, hub
    from supra_cli.core.data.rows import Mixture
    from supra_cli.core.train import loop
    from supra_cli.core.train.events import Saved, Step

    parsed = recipe(steps, rows, tokens)
    taken: dict[str, list[Spent]] = {"bare": [], "loop": [], "data": [], "save": []}
    batch, waiting = Mixture.batch, []

    def timed(self, *args):
        result, took = spent(lambda: batch(self, *args), device)
        waiting.append(took)
        return result

    with tempfile.TemporaryDirectory() as folder:
        base = hub.fetch(hub.resolve("tiny"))
        student = checkpoint.convert(base, Path(folder) / "student", mixer="supra", options={}, keep="none", seed=0)
        draw, bare = bare_steps(student, parsed, device)
        events = loop.uptrain(parsed, Path(folder) / "run", model=student, device=device)
        Mixture.batch = timed
        try:
            while True:
                event, took = spent(lambda: next(events, None), device)
                if event is None:
                    break
                if isinstance(event, Saved):
                    taken["save"].append(took)
                if isinstance(event, Step):
                    taken["loop"].append(took)
                    taken["data"].append(waiting.pop())
                    rows_of_step = draw()
                    waiting.clear()
                    taken["bare"].append(spent(lambda rows=rows_of_step: bare(rows), device)[1])
        finally:
            Mixture.batch = batch
    return {name: spans[1:] for name, spans in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    parser.add_argument("--steps", type=int, default=30, help=f"optimizer steps, at least {3 * SAVE_EVERY}")
    parser.add_argument("--rows", type=int, default=8, help="rows in a step")
    parser.add_argument("--tokens", type=int, default=256, help="tokens in a row")
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    taken = measure(options.steps, options.rows, options.tokens, options.device)
    clock = "wall_ms" if options.device == "cuda" else "cpu_ms"
    medians = {
        name: {unit: statistics.median(getattr(span, unit) for span in spans) for unit in Spent._fields}
        for name, spans in taken.items()
    }
    pairs = list(zip(taken["loop"], taken["bare"], taken["data"], strict=True))
    over = statistics.median(getattr(a, clock) / getattr(b, clock) for a, b, _ in pairs) - 1
    data = statistics.median(c.wall_ms / a.wall_ms for a, _, c in pairs)
    save = medians["save"]["wall_ms"] / medians["loop"]["wall_ms"]
    result = {
        "benchmark": "overhead",
        "command": " ".join(["python benchmarks/overhead.py", *sys.argv[1:]]),
        **machine(),
        "clock": "wall time" if options.device == "cuda" else "CPU time of one thread; data and save: wall time",
        "steps": len(taken["loop"]),
        "rows": [{"part": name, "times": len(taken[name]), **values} for name, values in medians.items()],
        "targets": [
            {"what": what, "bound": "at most", "target": most, "measured": measured, "met": measured <= most}
            for what, most, measured in (
                ("loop over bare passes, more", 0.05, over),
                ("share of a step waiting for data", 0.01, data),
                ("save over step", 1.0, save),
            )
        ],
    }
    report(result, options.output, options.json)


if __name__ == "__main__":
    main()
