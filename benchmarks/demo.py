"""Is uptraining worth it? The demo's student beside its teacher and beside the same shape trained from scratch.

All three are judged on the same held-out rows, the two students after the same number of tokens of the same text:

    python benchmarks/demo.py --output benchmarks/results/demo.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import tomli_w

HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
sys.path.insert(1, str(HERE.parent))

from supra_cli.core.environment import environment  # noqa: E402

RECIPE = HERE.parent / "recipes" / "demo.toml"


TASKS = ["--tasks", "stdlib_cloze,stdlib_ppl", "--limit", "100"]


def supra(*arguments: str) -> dict:
    """What a verb says with --json."""
    command = [sys.executable, "-m", "supra_cli", *arguments, "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def uptrain(recipe: Path, output: Path) -> dict:
    return supra("uptrain", "--recipe", str(recipe), "-o", str(output))


def from_scratch(tokens: int) -> dict:
    """The demo's recipe with fresh weights and one stage of next-token training over as many tokens."""
    recipe = tomllib.loads(RECIPE.read_text(encoding="utf-8"))
    stage = {"kind": "finetune", "tokens": tokens, "batch_tokens": 2048, "lr": 3e-3, "warmup_steps": 30}
    return recipe | {"init": "scratch", "stages": [stage]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        student = uptrain(RECIPE, Path(folder) / "demo")
        for model in ("demo/converted", "demo"):
            supra("eval", str(Path(folder) / model), *TASKS)
        report = supra("report", str(Path(folder) / "demo"))
        control = Path(folder) / "scratch.toml"
        control.write_text(tomli_w.dumps(from_scratch(student["tokens"])), encoding="utf-8")
        scratch = uptrain(control, Path(folder) / "scratch")
    document = {
        "nats_per_token": {
            "teacher": student["teacher_loss"],
            "student": student["loss"],
            "from_scratch": scratch["loss"],
        },
        "above_teacher": student["loss"] - student["teacher_loss"],
        "report": report,
        "tokens": {"student": student["tokens"], "from_scratch": scratch["tokens"]},
        "seconds": {"student": student["seconds"], "from_scratch": scratch["seconds"]},
        "environment": environment("cpu") | {"command": ["python", "benchmarks/demo.py"]},
    }
    print(json.dumps(document, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
