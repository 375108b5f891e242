"""What makes a student remember: every row a student of the bundled teacher, trained on 0.9M tokens in all.

    python benchmarks/ablation.py [--rows NAME ...] [--seeds N] [--tokens N] [--jobs N] [--device cuda]
    python benchmarks/ablation.py --reduced

A row is a mixer, what it is trained by and on; `targets` says what is asked of the best. Each (row, seed) is a process,
and what it found is written to benchmarks/results/ablation.json as soon as it is there: started again, the script goes
on with what is missing, a run that was cut off where it was. At the end it draws docs/ablation.svg, where there is
matplotlib. `--reduced` is for trying: the rows that matter, once and on a fifteenth of the tokens; all seven took
8 minutes and 35 seconds on two cores. It writes below runs/, as any other number of tokens does.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
sys.path[1:1] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402

from benchmarks.measure import target  # noqa: E402
from benchmarks.students import (  # noqa: E402
    RANDOM,
    REPEATED,
    TEXT,
    complaint,
    digest,
    measured,
    save,
    steps,
    supra,
    uptrain,
)
from supra_cli.core import accounting, checkpoint, hub  # noqa: E402
from supra_cli.core.data.rows import held_out  # noqa: E402
from supra_cli.core.environment import environment  # noqa: E402
from supra_cli.core.evaluate.measures import Material  # noqa: E402
from supra_cli.core.recipe import Data  # noqa: E402
from supra_cli.core.recipe.keep import SOFTMAX  # noqa: E402

TOKENS, REDUCED = 900_000, 60_000
"""5 % of the 18M that the teacher was trained on, and what a trial of the script takes."""
WINDOW = {"name": "window", "window": 64, "sinks": 4}
ALIKE = {"name": "gated_delta", "key_width": 3.75}
"""With what its convolutions keep, a state just below four times SUPRA's."""
BY_NEED = ALIKE | {"key_width": [1, 3, 1, 12, 4.5, 1]}
"""As many, where layers need them: after 225,280 tokens of attention transfer with rows alike, one layer alone costs
0.005, 0.045, 0.013, 0.132, 0.060 and 0.011 nats (`supra convert STUDENT --keep auto:1 --dry-run`)."""
SHARED = {"state_per": "kv_head"}
BEST = BY_NEED | SHARED | {"key_width": [2, 6, 2, 24, 9, 2]}
"""The same bytes: the teacher's query heads share a kv head in pairs."""
BOTH_ALIKE = WINDOW | {"name": "lolcats", "branch": "gated_delta", "key_width": 1.6875}
"""The same state, of a window and a recurrent branch."""
BOTH_BY_NEED = BOTH_ALIKE | {"window": [16, 64, 16, 64, 64, 16], "key_width": [1, 2, 1, 7.75, 2, 1]}
BOTH = BOTH_ALIKE | SHARED | {"window": [16, 64, 16, 16, 64, 16], "key_width": [1, 4, 1, 21.5, 4, 1]}
SILENCED = {"window_dropout": 0.9}
HYBRID = BOTH_ALIKE | SILENCED | {"key_width": [2, 8, 4, 1, 10, 4]}
"""Beside layer 3 with softmax, which the ranking finds with rows alike too. Its cache grows, so what is asked of a
hybrid puts no bound on the state of the others."""
SUPRAS_STATE = 98_304
"""Bytes, of a sequence."""
GAPS = {256: (96, 160), 512: (200, 400)}
"""Tokens of a row in training -> what lies between the two meetings of a passage."""
FIGURE, RESULTS = ROOT / "docs" / "ablation.svg", HERE / "results" / "ablation.json"


@dataclass(frozen=True)
class Row:
    """A student: its mixer, the layers that it keeps, and how it is trained."""

    mixer: dict[str, Any]
    keep: str = "none"
    seq_len: int = 256
    seeds: int = 1
    transfer: float = 0.25
    """Share of the tokens that attention transfer takes; the rest is distilled."""
    weights: tuple[int, int, int] = (4, 1, 1)
    """Shares of rows that are text, repeat text and repeat random tokens; the teacher's own were 4, 2, 1."""
    stage: dict[str, Any] = field(default_factory=dict)
    """Keys of the last stage in place of DISTILL's."""
    scratch: bool = False
    trained: bool = True
    """Whether anything is done to it after it was converted."""
    fitted: bool = False
    """Whether that is no more than what attention transfer sets in closed form before its first step."""


DISTILL = {"kind": "distill", "batch_tokens": 512, "lr": 4e-4, "mixer_lr": 2e-3, "warmup_steps": 20}
DISTILL |= {"final_lr_fraction": 0.02}
TRANSFER = {"kind": "transfer", "batch_tokens": 512, "mixer_lr": 1e-2, "warmup_steps": 10}
FINETUNE = {"kind": "finetune"}
FIT = TRANSFER | {"batch_tokens": 16_384, "tokens": 16_384, "mixer_lr": 0.0}
BESIDE_A_WINDOW = {"lr": 1e-4, "mixer_lr": 3e-3}
"""Less for the base, which a window leaves nearer to its teacher."""
LESS = BESIDE_A_WINDOW | {"lr": 2e-4}
FASTER = {"lr": 4e-4, "mixer_lr": 5e-3}
"""With few rows that repeat."""

ROWS = {
    "gated_delta": Row(BEST, seeds=3),
    "gated_delta, a state a head": Row(BY_NEED, seeds=3),
    "gated_delta, layers alike": Row(ALIKE, seeds=3),
    "gated_delta, keys as wide as heads": Row(ALIKE | {"key_width": 1}, seeds=3),
    "gated_delta, no convolution": Row(ALIKE | {"short_conv": 0}),
    "gated_delta, calibrated": Row(ALIKE | {"calibrate": True}),
    "gated_delta, fitted and not trained": Row(ALIKE, fitted=True),
    "gated_delta, calibrated and not trained": Row(ALIKE | {"calibrate": True}, fitted=True),
    "gated_delta, no rows that repeat": Row(ALIKE, weights=(1, 0, 0)),
    "gated_delta, half the rows repeat random tokens": Row(ALIKE, weights=(1, 1, 2)),
    "gated_delta, no transfer": Row(ALIKE, transfer=0.0),
    "kda": Row(ALIKE | {"name": "kda"}),
    "supra, the paper's recipe": Row({"name": "supra"}, transfer=0.0, stage=FINETUNE, weights=(1, 0, 0), seeds=3),
    "supra, transfer and distillation": Row({"name": "supra", "gain": "head"}, seeds=3),
    "t2r": Row({"name": "t2r", "feature_size": 32}),
    "retention": Row({"name": "retention", "gain": "head"}),
    "gated": Row({"name": "gated"}),
    "hedgehog": Row({"name": "hedgehog"}),
    "mamba2": Row({"name": "mamba2"}),
    "supra, from scratch": Row(
        {"name": "supra"},
        transfer=0.0,
        stage=FINETUNE | {"lr": 3e-3, "mixer_lr": 3e-3},
        weights=(1, 0, 0),
        scratch=True,
    ),
    "supra, only new weights": Row(
        {"name": "supra"}, transfer=0.0, stage=FINETUNE | {"train": "mixer"}, weights=(1, 0, 0)
    ),
    "window, rows of 256": Row(WINDOW, trained=False),
    "window": Row(WINDOW, seq_len=512, trained=False),
    "window and hedgehog, more repeats": Row(
        WINDOW | {"name": "lolcats"} | SILENCED, seq_len=512, stage=BESIDE_A_WINDOW
    ),
    "window and delta rule": Row(
        BOTH | SILENCED, seq_len=512, transfer=0.15, stage=FASTER, weights=(16, 1, 1), seeds=3
    ),
    "window and delta rule, a state a head": Row(
        BOTH_BY_NEED | SILENCED, seq_len=512, stage=LESS, weights=(10, 1, 1), seeds=3
    ),
    "window and delta rule, more repeats": Row(BOTH_BY_NEED | SILENCED, seq_len=512, stage=BESIDE_A_WINDOW),
    "window and delta rule, more repeats, no window dropout": Row(BOTH_BY_NEED, seq_len=512, stage=BESIDE_A_WINDOW),
    "window and delta rule, more repeats, windows alike": Row(
        BOTH_ALIKE | SILENCED | {"key_width": [1, 1, 1, 5.125, 1, 1]}, seq_len=512, stage=BESIDE_A_WINDOW
    ),
    "window and delta rule, more repeats, layers alike": Row(BOTH_ALIKE | SILENCED, seq_len=512, stage=BESIDE_A_WINDOW),
    "one softmax layer by need": Row(
        HYBRID, keep="auto:1", seq_len=512, stage=BESIDE_A_WINDOW, weights=(8, 1, 1), seeds=3
    ),
    "one softmax layer by need, more repeats, half the state": Row(
        HYBRID | {"key_width": [1, 4, 2, 1, 5, 2]}, keep="auto:1", seq_len=512, stage=BESIDE_A_WINDOW
    ),
    "one softmax layer by need, more repeats, layers alike": Row(
        BOTH_ALIKE | SILENCED, keep="auto:1", seq_len=512, stage=BESIDE_A_WINDOW
    ),
    "one softmax layer in six, more repeats, layers alike": Row(
        BOTH_ALIKE | SILENCED, keep="every:6", seq_len=512, stage=BESIDE_A_WINDOW
    ),
    "gated_delta, one softmax layer by need": Row(ALIKE, keep="auto:1", seq_len=512),
    "window, one softmax layer": Row(WINDOW, keep="3", seq_len=512, trained=False),
    "window, one softmax layer in six": Row(WINDOW, keep="every:6", seq_len=512, trained=False),
}
MATTER = (
    "gated_delta",
    "gated_delta, layers alike",
    "gated_delta, keys as wide as heads",
    "supra, the paper's recipe",
    "supra, transfer and distillation",
    "window and delta rule",
    "one softmax layer by need",
)
"""What is asked for something and what it has to be compared with, each with three seeds."""


def recipe(row: Row, seed: int, stages: list[dict[str, Any]], keep: str, saves: int) -> dict[str, Any]:
    """Of a student that is saved, and so measured, about so often."""
    text = [TEXT | {"weight": row.weights[0]}]
    for source, weight in zip((REPEATED, RANDOM), row.weights[1:], strict=True):
        text += [source | {"weight": weight}] if weight else []
    every = max(1, sum(stage["tokens"] // stage["batch_tokens"] for stage in stages) // saves)
    return {
        "base": "tiny",
        "seed": seed,
        "keep": keep,
        **({"init": "scratch"} if row.scratch else {}),
        "validate_every_steps": every,
        "mixer": row.mixer,
        "data": {"seq_len": row.seq_len, "validation_tokens": 65_536, "sources": text, "validation": [TEXT]},
        "checkpoint": {"every_steps": every, "keep_last": 20},
        "stages": stages,
    }


def stages(row: Row, tokens: int) -> list[dict[str, Any]]:
    if not row.trained:
        return []
    if row.fitted:
        return [FIT]
    transferred = int(row.transfer * tokens)
    transfer = [TRANSFER | {"tokens": transferred}] if transferred else []
    return [*transfer, DISTILL | row.stage | {"tokens": tokens - transferred}]


def made_by(name: str, seed: int, tokens: int) -> dict[str, Any]:
    """The recipe of a student; results of another one are not of that row."""
    row = ROWS[name]
    return recipe(row, seed, stages(row, tokens), row.keep, saves(tokens))


def saves(tokens: int) -> int:
    return 6 if tokens == TOKENS else 1


def train(row: Row, seed: int, tokens: int, folder: Path, device: str) -> Iterator[Path]:
    """Train a student of `row` in `folder`; the runs that it took, the last with the student itself."""
    often, planned = saves(tokens), stages(row, tokens)
    if not row.keep.startswith("auto"):
        yield uptrain(recipe(row, seed, planned, row.keep, often), folder / "run", device)
        return
    transfer, distill = planned
    first = uptrain(recipe(row, seed, [transfer], "none", often), folder / "transferred", device)
    yield first
    hybrid = folder / "hybrid"
    supra("convert", str(first), "--keep", row.keep, "-o", str(hybrid), "--overwrite", "--device", device)
    yield uptrain(recipe(row, seed, [distill], row.keep, often), folder / "run", device, "--model", str(hybrid))


def student(name: str, seed: int, tokens: int, folder: Path, device: str) -> dict[str, Any]:
    """Train a student of that row; what it loses and recalls at every save, over the tokens that it has seen."""
    row, torch_device = ROWS[name], torch.device(device)
    torch.set_num_threads(1)
    if row.trained:
        runs = list(train(row, seed, tokens, folder, device))
    else:
        runs = [folder / "run"]
        options = [f"--set=mixer.{key}={value}" for key, value in row.mixer.items() if key != "name"]
        chosen = ["--mixer", row.mixer["name"], *options, "--keep", row.keep]
        supra("convert", "tiny", *chosen, "-o", str(runs[0] / "step-000000"), "--overwrite")
    folder_of_teacher = hub.open("tiny")
    tokenizer = checkpoint.load_tokenizer(folder_of_teacher)
    data = Data(seq_len=row.seq_len, validation_tokens=65_536, sources=[TEXT], validation=[TEXT])
    text = held_out(data, tokenizer).to(torch_device)
    given = text, Material(tokenizer, lengths=GAPS[row.seq_len], train_length=row.seq_len), device
    curve, before = [], 0
    for run in runs:
        seen = {0: 0} | {step["step"]: step["tokens"] for step in (steps(run) if row.trained else [])}
        for saved in sorted(run.glob("step-*")):
            curve.append({"tokens": before + seen[int(saved.name.removeprefix("step-"))], **measured(saved, *given)})
        before += max(seen.values())
    last = sorted(runs[-1].glob("step-*"))[-1]
    config = checkpoint.read_config(last)
    found = {"row": name, "seed": seed, "tokens": before, "recipe": made_by(name, seed, tokens)}
    found["kept"] = [layer for layer, kind in enumerate(config.swap.layers) if kind == SOFTMAX]
    found |= {"state_bytes": accounting.measure(config).state_bytes, "curve": curve}
    conditions = environment(device)
    del conditions["command"]  # the child's own, with its folders
    return found | {"teacher": measured(folder_of_teacher, *given), "environment": conditions}


def targets(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is asked of the best rows of each kind, medians over seeds.

    Of a student with softmax layers, its repeats cost no more than 0.1 above what they cost its teacher.
    """

    def excess(row: str) -> float | None:
        ends = [run["curve"][-1]["nats"] - run["teacher"]["nats"] for run in found if run["row"] == row]
        return statistics.median(ends) if ends else None

    def repeats(row: str) -> float | None:
        ends = [run["curve"][-1]["repeats"] for run in found if run["row"] == row]
        worst = [max(end[f"random, gap {gap}"][0] for gap in GAPS[ROWS[row].seq_len]) for end in ends]
        return statistics.median(worst) if worst else None

    def behind(row: str) -> float | None:
        ends = [(run["curve"][-1]["repeats"], run["teacher"]["repeats"]) for run in found if run["row"] == row]
        gaps = [f"random, gap {gap}" for gap in GAPS[ROWS[row].seq_len]]
        worst = [max(end[gap][0] - taught[gap][0] for gap in gaps) for end, taught in ends]
        return statistics.median(worst) if worst else None

    def state(row: str) -> int | None:
        return max((run["state_bytes"] for run in found if run["row"] == row), default=None)

    pure, beside, hybrid = "gated_delta", "window and delta rule", "one softmax layer by need"
    asked = [
        (pure, "bytes of state", 4 * SUPRAS_STATE, state),
        (pure, "excess nats", 0.15, excess),
        (pure, "worst of its repeats", 0.2, repeats),
        (pure, "excess nats, in any case", 0.22, excess),
        (pure, "worst of its repeats, in any case", 0.25, repeats),
        (beside, "bytes of state", 4 * SUPRAS_STATE, state),
        (beside, "excess nats", 0.06, excess),
        (beside, "worst of its repeats", 0.5, repeats),
        (hybrid, "excess nats", 0.010, excess),
        (hybrid, "its repeats above the teacher's", 0.1, behind),
    ]
    return [target(f"{row}: {what}", "at most", most, measure(row)) for row, what, most, measure in asked]


def write(found: list[dict[str, Any]], path: Path, tokens: int) -> None:
    document = {
        "benchmark": "ablation",
        "command": f"python benchmarks/ablation.py --tokens {tokens}",
        "tokens": tokens,
        "targets": targets(found),
        "runs": found,
    }
    save(document, path)


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Excess and repeats at the shorter gap against tokens, of the rows that matter; a line a seed, dashed where rows
    have 512 tokens. A hybrid's begins where it has its softmax layer.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "supra"
    from matplotlib import pyplot, ticker

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for number, name in enumerate(MATTER):
        row, label = ROWS[name], name
        for run in (run for run in found if run["row"] == name):
            curve = run["curve"]
            if row.keep.startswith("auto"):
                transfer = run["recipe"]["stages"][0]
                before = -(-transfer["tokens"] // transfer["batch_tokens"]) * transfer["batch_tokens"]
                curve = [point for point in curve if point["tokens"] > before]
            thousands = [point["tokens"] / 1000 for point in curve]
            excess = [point["nats"] - run["teacher"]["nats"] for point in curve]
            gap = f"random, gap {GAPS[row.seq_len][0]}"
            style = {"color": f"C{number}", "linewidth": 1, "linestyle": "--" if row.seq_len == 512 else "-"}
            for panel, values in zip(panels, (excess, [point["repeats"][gap][0] for point in curve]), strict=True):
                panel.plot(thousands, values, label=label, **style)
            panels[1].axhline(
                run["teacher"]["repeats"][gap][0], color="gray", linewidth=0.5, linestyle=style["linestyle"]
            )
            label = None
    panels[0].set(xlabel="thousand tokens", ylabel="nats above the teacher", yscale="log")
    panels[0].yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[0].yaxis.set_minor_locator(ticker.NullLocator())
    told = f"gap {GAPS[256][0]}; dashed: rows of 512 tokens, gap {GAPS[512][0]}; gray: the teacher"
    panels[1].set(xlabel="thousand tokens", ylabel="repeats of random tokens", ylim=(0, 1.2))
    panels[1].set_title(told, fontsize="small")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(path, metadata={"Date": None})


def place(work: Path, row: str, seed: int, tokens: int) -> Path:
    """Of a student's runs; one that is to be trained in another way begins in another folder."""
    return work / f"{re.sub(r'[^a-z0-9_]+', '-', row)}-{seed}-{digest(made_by(row, seed, tokens))}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), metavar="NAME", help="these alone")
    parser.add_argument("--seeds", type=int, help="of every row, in place of its own number")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--reduced", action="store_true")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, help="where the runs are")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.reduced:
        given.rows, given.seeds = given.rows or list(MATTER), given.seeds or 1
    given.tokens = given.tokens or (REDUCED if given.reduced else TOKENS)
    whole = given.tokens == TOKENS
    given.work = given.work or ROOT / "runs" / ("ablation" if whole else f"ablation-{given.tokens}")
    given.output = given.output or (RESULTS if whole else given.work / "ablation.json")
    given.figure = given.figure or (FIGURE if given.output == RESULTS else given.work / "ablation.svg")
    if given.one:
        name, seed = given.one[0], int(given.one[1])
        folder = place(given.work, name, seed, given.tokens)
        folder.mkdir(parents=True, exist_ok=True)
        found = student(name, seed, given.tokens, folder, given.device)
        (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")
        return 0
    before = json.loads(given.output.read_text(encoding="utf-8")) if given.output.is_file() else None
    if before and before["tokens"] != given.tokens:
        parser.error(
            f"{given.output} is of {before['tokens']:,} tokens, not of {given.tokens:,}; choose another --output"
        )
    found = []
    for run in before["runs"] if before else ():
        name, asked = run["row"], not given.rows or run["row"] in given.rows
        if name in ROWS and (not asked or run.get("recipe") == made_by(name, run["seed"], given.tokens)):
            found.append(run)
        else:
            print(f"{name}, seed {run['seed']}, was trained in another way and is left out", flush=True)
    known = {(run["row"], run["seed"]) for run in found}
    # First every row once.
    cases = sorted((seed, name) for name in given.rows or ROWS for seed in range(given.seeds or ROWS[name].seeds))
    failed, writing = [], Lock()

    def run(case: tuple[int, str]) -> None:
        seed, name = case
        shared = ["--tokens", str(given.tokens), "--device", given.device, "--work", str(given.work)]
        if said := complaint(__file__, *shared, "--one", name, str(seed)):
            failed.append(name)
            print(f"{name}, seed {seed}: {said}", flush=True)
            return
        made = json.loads((place(given.work, name, seed, given.tokens) / "found.json").read_text(encoding="utf-8"))
        with writing:
            found.append(made)
            found.sort(key=lambda run: (list(ROWS).index(run["row"]), run["seed"]))
            write(found, given.output, given.tokens)
        end, teacher = made["curve"][-1], made["teacher"]["nats"]
        shares = ", ".join(f"{x[0]:.2f} at {label}" for label, x in end["repeats"].items() if "random" in label)
        print(f"{name}, seed {seed}: {end['nats'] - teacher:.4f} nats above the teacher; repeats {shares}", flush=True)

    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(run, [case for case in cases if (case[1], case[0]) not in known]))
    if find_spec("matplotlib"):
        draw(found, given.figure)
    else:
        print(f"{given.figure} is not drawn, which matplotlib does: pip install matplotlib")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
