"""What makes a student remember: every row a student of the bundled teacher, trained on 0.9M tokens in all.

    python benchmarks/ablation.py [--rows NAME ...] [--seeds N] [--tokens N] [--jobs N] [--device cuda]

A row is a mixer, what it is trained by and on; TARGETS says what is asked of the best. Each (row, seed) is a process,
and what it found is written to benchmarks/results/ablation.json as soon as it is there: started again, the script goes
on with what is missing, a run that was cut off where it was. `--tokens 90000 --seeds 1` is the reduced form, which is
for trying and writes elsewhere. The figure (docs/ablation.svg) needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
sys.path[1:1] = [str(ROOT), str(ROOT / "kernels")]

import tomli_w  # noqa: E402
import torch  # noqa: E402

from supra_cli.core import checkpoint, need  # noqa: E402
from supra_cli.core.environment import environment  # noqa: E402

TOKENS = 900_000
"""5 % of the 18M that the teacher was trained on."""
TEXT, REPEATED, RANDOM = (
    {"path": "python-stdlib"},
    {"path": "python-stdlib", "repeat": "text"},
    {"path": "python-stdlib", "repeat": "random"},
)
WINDOW = {"name": "window", "window": 64, "sinks": 4}
BEST = {"name": "gated_delta", "key_width": 4, "short_conv": True}


@dataclass(frozen=True)
class Row:
    """A student: its mixer, the layers that it keeps, and how it is trained."""

    mixer: dict[str, Any]
    keep: str = "none"
    seq_len: int = 256
    seeds: int = 1
    transfer: float = 0.25
    """Share of the tokens that attention transfer takes; the rest is distilled."""
    weights: tuple[int, int, int] = (4, 2, 1)
    """Shares of rows that are text, repeat text, repeat random tokens: as the teacher's own by default."""
    stage: dict[str, Any] = field(default_factory=dict)
    """Keys of the last stage in place of DISTILL's."""
    scratch: bool = False
    trained: bool = True


DISTILL = {"kind": "distill", "batch_tokens": 2048, "lr": 1e-3, "mixer_lr": 5e-3, "warmup_steps": 20}
DISTILL |= {"final_lr_fraction": 0.02}
TRANSFER = {"kind": "transfer", "batch_tokens": 2048, "mixer_lr": 1e-2, "warmup_steps": 10}
FINETUNE = {"kind": "finetune", "lr": 1e-3, "mixer_lr": 5e-3}

ROWS = {
    "gated_delta": Row(BEST, seeds=3),
    "gated_delta, keys as wide as heads": Row(BEST | {"key_width": 1}, seeds=3),
    "gated_delta, no convolution": Row(BEST | {"short_conv": False}),
    "gated_delta, no rows that repeat": Row(BEST, weights=(1, 0, 0)),
    "gated_delta, half the rows repeat random tokens": Row(BEST, weights=(1, 1, 2)),
    "gated_delta, no transfer": Row(BEST, transfer=0.0),
    "kda": Row(BEST | {"name": "kda"}),
    "supra, the paper's recipe": Row({"name": "supra"}, transfer=0.0, stage=FINETUNE, weights=(1, 0, 0), seeds=3),
    "supra, transfer and distillation": Row({"name": "supra", "gain": "head"}, seeds=3),
    "t2r": Row({"name": "t2r", "feature_size": 32}),
    "retention": Row({"name": "retention", "gain": "head"}),
    "gated": Row({"name": "gated"}),
    "hedgehog": Row({"name": "hedgehog"}),
    "mamba2": Row({"name": "mamba2"}),
    "supra, from scratch": Row(
        {"name": "supra"}, transfer=0.0, stage=FINETUNE | {"lr": 3e-3, "mixer_lr": 3e-3}, scratch=True
    ),
    "supra, only new weights": Row({"name": "supra"}, transfer=0.0, stage=FINETUNE | {"train": "mixer"}),
    "window": Row(WINDOW, seq_len=512, trained=False),
    "window and gated_delta": Row({"name": "lolcats", "branch": "gated_delta"}, seq_len=512, seeds=3),
    "window and hedgehog": Row({"name": "lolcats", "branch": "hedgehog"}, seq_len=512),
    "one softmax layer by need": Row(BEST, keep="auto:1", seq_len=512, seeds=3),
    "one softmax layer in six": Row(BEST, keep="every:6", seq_len=512),
    "window, one softmax layer": Row(WINDOW, keep="3", seq_len=512, trained=False),
}


def recipe(row: Row, seed: int, stages: list[dict[str, Any]], keep: str) -> dict[str, Any]:
    text = [TEXT | {"weight": row.weights[0]}]
    for source, weight in zip((REPEATED, RANDOM), row.weights[1:], strict=True):
        text += [source | {"weight": weight}] if weight else []
    steps = max(1, sum(stage["tokens"] // stage["batch_tokens"] for stage in stages) // 6)
    return {
        "base": "tiny",
        "seed": seed,
        "keep": keep,
        **({"init": "scratch"} if row.scratch else {}),
        "validate_every_steps": steps,
        "mixer": row.mixer,
        "data": {"seq_len": row.seq_len, "validation_tokens": 65_536, "sources": text, "validation": [TEXT]},
        "checkpoint": {"every_steps": steps, "keep_last": 20},
        "stages": stages,
    }


def train(row: Row, seed: int, tokens: int, folder: Path, device: str) -> Iterator[Path]:
    """Train a student of `row` in `folder`; the runs that it took, the last with the student itself."""
    transferred = int(row.transfer * tokens)
    transfer = [TRANSFER | {"tokens": transferred}] if transferred else []
    distill = [DISTILL | row.stage | {"tokens": tokens - transferred}]
    if not row.keep.startswith("auto"):
        yield uptrain(recipe(row, seed, transfer + distill, row.keep), folder / "run", device)
        return
    first = uptrain(recipe(row, seed, transfer, "none"), folder / "transferred", device)
    yield first
    hybrid = folder / "hybrid"
    supra("convert", str(first), "--keep", row.keep, "-o", str(hybrid), "--overwrite", "--device", device)
    yield uptrain(recipe(row, seed, distill, row.keep), folder / "run", device, "--model", str(hybrid))


def supra(*arguments: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "supra_cli", *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"supra {' '.join(arguments)}: {done.stderr.splitlines()[-1]}")
    return done.stdout


def uptrain(recipe: dict[str, Any], output: Path, device: str, *more: str) -> Path:
    """Run or resume a recipe; returns `output`."""
    written = output.with_suffix(".toml")
    written.parent.mkdir(parents=True, exist_ok=True)
    written.write_text(tomli_w.dumps(recipe), encoding="utf-8")
    begun = ["--resume"] if output.is_dir() else []
    supra("uptrain", "-r", str(written), "-o", str(output), "--device", device, "--dtype", "float32", *more, *begun)
    return output


def student(row: Row, seed: int, tokens: int, folder: Path, device: str) -> dict[str, Any]:
    """Train a student of `row` and measure it at every save: excess over the teacher in nats, recall by gap."""
    runs = list(train(row, seed, tokens, folder, device)) if row.trained else []
    if not runs:
        supra("convert", "tiny", *converted(row), "-o", str(folder / "run"), "--overwrite")
    curve, seen, teacher = [], 0, None
    for run in runs:
        events = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        at = {0: 0} | {event["step"]: event["tokens"] for event in events if event["event"] == "step"}
        for event in (event for event in events if event["event"] == "validation"):
            teacher, saved = event["teacher"], run / f"step-{event['step']:06d}"
            recalled = recall(saved, row.seq_len, device) if saved.is_dir() else None
            curve.append({"tokens": seen + at[event["step"]], "nats": event["loss"], "repeats": recalled})
        seen += at[max(at)]
    ...
