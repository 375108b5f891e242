"""Do two processes train twice as fast as one?   python -m benchmarks.parallel [--output FILE] [--rounds 20]

Two processes of one thread, started by torchrun, drive `uptrain` of the bundled model in three forms, which take turns
step by step: one process takes all rows of a step while the other sleeps (`alone`), both take half of them and share
the model over gloo (`together`), and both take half of them in runs that know nothing of each other (`apart`: what the
machine itself allows). Wall time from barrier to barrier; ratios are within a round, medians over rounds are shown.
"""

import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.measure import arguments, by_two_ranks, machine, report, target
from supra_cli.core import parallel
from supra_cli.core import recipe as recipes
from supra_cli.core.parallel import ALONE, World
from supra_cli.core.train import loop
from supra_cli.core.train.events import Step

LENGTH, WARM = 512, 2
CASES = (("finetune", 8), ("finetune", 32), ("distill", 32), ("transfer", 32))
"""(stage, rows of a step): a recipe's usual 4,096 tokens, and four times as many."""


def steps(stage: str, rows: int, rounds: int, run: Path, world: World) -> Iterator[Step]:
    step = rows * LENGTH
    spec = {"kind": stage, "tokens": (WARM + rounds + 1) * step, "batch_tokens": step, "lr": 1e-3}
    data = {"seq_len": LENGTH, "sources": [{"path": "python-stdlib"}]}
    recipe = recipes.validate({"base": "tiny", "data": data, "stages": [spec]})
    return (event for event in loop.uptrain(recipe, run, world=world) if isinstance(event, Step))


def work(rounds: int, folder: Path) -> None:
    """What a rank does; the first writes the seconds of every form's steps, stage by stage."""
    torch.set_num_threads(1)
    with parallel.joined("cpu") as world:
        found = []
        for stage, rows in CASES:
            runs = folder / f"{stage}-{rows}"
            forms = {
                "alone": steps(stage, rows, rounds, runs / "alone", ALONE) if world.leads else iter(()),
                "together": steps(stage, rows, rounds, runs / "together", world),
                "apart": steps(stage, rows // 2, rounds, runs / f"apart-{world.rank}", ALONE),
            }
            seconds: dict[str, list[float]] = {form: [] for form in forms}
            for _ in range(WARM + rounds):
                for form, events in forms.items():
                    world.barrier()
                    start = time.perf_counter()
                    next(events, None)
                    world.barrier()
                    seconds[form].append(time.perf_counter() - start)
            found.append({form: taken[WARM:] for form, taken in seconds.items()})
        if world.leads:
            (folder / "found.json").write_text(json.dumps(found))


def row(stage: str, rows: int, seconds: dict[str, list[float]]) -> dict:
    over = {
        form: sorted(one / other for one, other in zip(seconds["alone"], seconds[form], strict=True))
        for form in ("together", "apart")
    }
    step = rows * LENGTH
    rates = {f"{form}_tokens_per_s": step / statistics.median(taken) for form, taken in seconds.items()}
    low, middle, high = statistics.quantiles(over["together"], n=4)
    faster = {"times_faster": middle, "lower_quartile": low, "upper_quartile": high}
    return {
        "stage": stage,
        "tokens_per_step": step,
        **rates,
        **faster,
        "apart_times_faster": statistics.median(over["apart"]),
    }


def main() -> None:
    given = arguments(__doc__, rounds=20)
    found = by_two_ranks("parallel", given.rounds)
    rows = [row(*case, seconds) for case, seconds in zip(CASES, found, strict=True)]
    result = {"benchmark": "parallel", "command": f"python -m benchmarks.parallel --rounds {given.rounds}"}
    result |= {**machine(), "clock": "wall time", "rows": rows}
    result["targets"] = [
        target(f"{one['stage']}, {one['tokens_per_step']} tokens, times faster", "at least", 1.6, one["times_faster"])
        for one in rows
    ]
    report(result, given.output)


if __name__ == "__main__":
    work(int(sys.argv[2]), Path(sys.argv[3])) if sys.argv[1:2] == ["--work"] else main()
