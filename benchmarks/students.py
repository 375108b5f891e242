"""What the benchmarks that train students share: verbs in processes of their own, runs that go on, what is measured."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import tomli_w
import torch

from supra_cli.core import checkpoint
from supra_cli.core.data.packing import Batch
from supra_cli.core.evaluate.measures import Material, measures
from supra_cli.core.evaluate.nats import perplexity

ROOT = Path(__file__).resolve().parent.parent
TEXT, REPEATED, RANDOM = (
    {"path": "python-stdlib"},
    {"path": "python-stdlib", "repeat": "text"},
    {"path": "python-stdlib", "repeat": "random"},
)


def supra(*arguments: str) -> str:
    """What a verb writes to stdout, without a network and on one thread; RuntimeError with its last sentence."""
    variables = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "supra_cli", *arguments]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"supra {' '.join(arguments)}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def uptrain(recipe: dict[str, Any], output: Path, device: str, *more: str) -> Path:
    """Run or resume a recipe; returns `output`."""
    written = output.with_suffix(".toml")
    written.parent.mkdir(parents=True, exist_ok=True)
    written.write_text(tomli_w.dumps(recipe), encoding="utf-8")
    begun = ["--resume"] if output.is_dir() else []
    supra("uptrain", "-r", str(written), "-o", str(output), "--device", device, "--dtype", "float32", *more, *begun)
    return output


def steps(run: Path) -> list[dict[str, Any]]:
    """The steps that a run has taken, as it wrote them down."""
    events = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [event for event in events if event["event"] == "step"]


def measured(path: Path, text: Batch, material: Material, device: str = "cpu") -> dict[str, Any]:
    """A model's nats per token of `text`, and its repeats with their intervals."""
    model = checkpoint.load(path, device=device, dtype=torch.float32)
    recalled = measures.get("repeats")(model, material)
    return {"nats": perplexity(model, *text).nats, "repeats": {label: list(x) for label, x in recalled.items()}}


def complaint(*command: str) -> str | None:
    """Run Python with these arguments; what it said last, if it failed."""
    done = subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return (done.stderr.strip().splitlines() or ["killed"])[-1] if done.returncode else None


def digest(made: Any) -> str:
    """A few letters that tell what something was made by, as the name of its folder does."""
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:8]


def save(document: Any, path: Path) -> None:
    """As JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)
