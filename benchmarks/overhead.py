"""What does the training loop cost beside the bare passes, and how long does a step wait for its rows?

    python -m benchmarks.overhead [--output FILE] [--steps 40]

`uptrain` finetunes the bundled model, 8 rows of 256 tokens a step, one rank, one thread; after each of its steps the
same student takes the same rows through forward, the same loss, backward and AdamW, and nothing else. Compared is CPU
time, the loop's with all that it does between two steps; shown are medians. What waited is told by the loop's `Step`.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.measure import arguments, machine, report, target
from supra_cli.core import checkpoint, hub
from supra_cli.core import recipe as recipes
from supra_cli.core.data import rows
from supra_cli.core.train import loop
from supra_cli.core.train.build import stage_of
from supra_cli.core.train.events import Step

ROWS, LENGTH, WARM = 8, 256, 3


def main() -> None:
    given = arguments(__doc__, steps=40)
    spec = {"kind": "finetune", "tokens": (given.steps + WARM) * ROWS * LENGTH, "batch_tokens": ROWS * LENGTH}
    data = {"seq_len": LENGTH, "sources": [{"path": "python-stdlib"}]}
    recipe = recipes.validate({"base": "tiny", "data": data, "stages": [spec]})
    taken = []
    with tempfile.TemporaryDirectory() as folder:
        swap = {"mixer": "supra", "options": {}, "keep": "none", "seed": 0}
        made = checkpoint.convert(hub.open("tiny"), Path(folder) / "student", **swap)
        student, stage = checkpoint.load(made, dtype=torch.float32).train(), stage_of(recipe.stages[0])
        optimizer = torch.optim.AdamW(student.parameters(), lr=recipe.stages[0].lr, fused=True)
        drawn = rows.training(recipe.data, checkpoint.load_tokenizer(made), recipe.seed)
        wall, start = time.perf_counter(), time.process_time()
        for event in loop.uptrain(recipe, Path(folder) / "run", model=made):
            if isinstance(event, Step):
                ours, waited = time.process_time() - start, event.data_seconds / (time.perf_counter() - wall)
                batch, start = drawn.batch(ROWS, LENGTH), time.process_time()
                loss = stage.loss(student, None, batch, lambda part: part)
                (loss.sum / stage.scored(batch)).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                bare = time.process_time() - start
                taken.append({"loop": ours, "bare": bare, "over": ours / bare - 1, "waiting": waited})
                wall, start = time.perf_counter(), time.process_time()
    medians = {name: statistics.median(step[name] for step in taken[WARM:]) for name in taken[0]}
    low, _, high = statistics.quantiles([step["over"] for step in taken[WARM:]], n=4)
    result = {"benchmark": "overhead", "command": f"python -m benchmarks.overhead --steps {given.steps}", **machine()}
    result |= {"clock": "CPU time of one thread, in seconds; waiting: share of wall time", "steps": given.steps}
    result["rows"] = [{**medians, "over_quartiles": [low, high]}]
    result["targets"] = [
        target("loop over bare passes, more", "at most", 0.05, medians["over"]),
        target("share of a step waiting for data", "at most", 0.01, medians["waiting"]),
    ]
    report(result, given.output)


if __name__ == "__main__":
    main()
