"""What does the training loop cost beside the bare passes, and how long does a step wait for its rows?

    python benchmarks/overhead.py [--output FILE] [--steps 40]

`uptrain` finetunes the bundled model, 8 rows of 256 tokens a step, one rank, one thread; after each of its steps the
same student takes rows of the same shape through forward, the same loss, backward and AdamW, and nothing else. CPU time
of both, the loop's with all that it does between two steps; the median of the ratios. What waited is told by its `Step`.
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
from pathlib import Path  # noqa: E402

import torch  # noqa: E402

from benchmarks.measure import machine, report, target  # noqa: E402
from supra_cli.core import checkpoint, hub  # noqa: E402
from supra_cli.core import recipe as recipes  # noqa: E402
from supra_cli.core.data import rows  # noqa: E402
from supra_cli.core.train import loop  # noqa: E402
from supra_cli.core.train.build import stage_of  # noqa: E402
from supra_cli.core.train.events import Step  # noqa: E402

ROWS, LENGTH, WARM = 8, 256, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args()
    torch.set_num_threads(1)
    spec = {"kind": "finetune", "tokens": (given.steps + WARM) * ROWS * LENGTH, "batch_tokens": ROWS * LENGTH}
    data = {"seq_len": LENGTH, "sources": [{"path": "python-stdlib"}]}
    recipe = recipes.validate({"base": "tiny", "data": data, "stages": [spec]})
    with tempfile.TemporaryDirectory() as folder:
        made = checkpoint.convert(
            hub.open("tiny"), Path(folder) / "student", mixer="supra", options={}, keep="none", seed=0
        )
        student, stage = checkpoint.load(made, dtype=torch.float32).train(), stage_of(recipe.stages[0])
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
        batch = rows.training(recipe.data, checkpoint.load_tokenizer(made), 0).batch(ROWS, LENGTH)
        spent: dict[str, list[float]] = {"loop": [], "bare": []}
        waited, start = [], time.process_time()
        for event in loop.uptrain(recipe, Path(folder) / "run", model=made):
            if isinstance(event, Step):
                spent["loop"].append(time.process_time() - start)
                waited.append(event.data_seconds / event.seconds)
                start = time.process_time()
                loss = stage.loss(student, None, batch, lambda part: part)
                (loss.sum / stage.scored(batch)).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                spent["bare"].append(time.process_time() - start)
                start = time.process_time()
    over = [loop / bare - 1 for loop, bare in zip(spent["loop"][WARM:], spent["bare"][WARM:], strict=True)]
    low, middle, high = statistics.quantiles(over, n=4)
    waits = statistics.median(waited[WARM:])
    figures = {f"{form}_ms": 1e3 * statistics.median(seconds[WARM:]) for form, seconds in spent.items()}
    result = {
        "benchmark": "overhead",
        "command": " ".join(["python benchmarks/overhead.py", *sys.argv[1:]]),
        **machine(),
    }
    result |= {"clock": "CPU time of one thread; waiting: wall time", "steps": given.steps}
    result["rows"] = [{**figures, "over": middle, "lower_quartile": low, "upper_quartile": high, "waiting": waits}]
    result["targets"] = [
        target("loop over bare passes, more", "at most", 0.05, middle),
        target("share of a step waiting for data", "at most", 0.01, waits),
    ]
    report(result, given.output)


if __name__ == "__main__":
    main()
