"""Does attention transfer help? Every trainable mixer in the bundled teacher, distilled with and without it.

python benchmarks/curves.py --output benchmarks/results/curves.json --figure docs/curves.svg

Both runs of a mixer see the same number of tokens, the transfer's included, with the same rates. `retention` and
`window` stand beside them, distilled: they have no parameters for a transfer to move. As many runs at once as there are
cores, with one thread each. The figure needs matplotlib (`pip install '.[plot]'`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tomli_w

HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
sys.path.insert(1, str(HERE.parent))

from supra_cli.core.environment import environment  # noqa: E402

RECIPE = HERE.parent / "recipes" / "demo.toml"
MIXERS: dict[str, dict[str, Any]] = {
    "supra": {"name": "supra"},
    "supra, gain": {"name": "supra", "gain": "head"},
    "t2r": {"name": "t2r", "feature_size": 32},
    "gated": {"name": "gated"},
    "retention": {"name": "retention"},
    "window": {"name": "window", "window": 64, "sinks": 4},
}
WITHOUT_PARAMETERS = {"retention", "window"}
TOKENS, TRANSFERRED = 409_600, 102_400


def recipe(mixer: dict[str, Any], transferred: int) -> dict[str, Any]:
    """The demo's recipe with another mixer, `transferred` of TOKENS spent on transfer and the rest on distillation."""
    demo = tomllib.loads(RECIPE.read_text(encoding="utf-8"))
    transfer, distill = demo["stages"]
    stages = [transfer | {"tokens": transferred}] if transferred else []
    stages.append(distill | {"tokens": TOKENS - transferred})
    return demo | {"mixer": mixer, "validate_every_steps": 40, "stages": stages}


def run(folder: Path, name: str, transferred: int) -> dict[str, Any]:
    """Held-out nats per token over tokens, and what each layer's transfer began and ended with."""
    mixer = MIXERS[name]
    written, output = folder / f"{name}-{transferred}.toml", folder / f"{name}-{transferred}"
    written.write_text(tomli_w.dumps(recipe(mixer, transferred)), encoding="utf-8")
    command = [sys.executable, "-m", "supra_cli", "uptrain", "--recipe", str(written), "-o", str(output), "--json"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=HERE.parent, env=one_thread)
    events = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    tokens = {0: 0} | {event["step"]: event["tokens"] for event in steps}
    held_out = [event for event in events if event["event"] == "validation"]
    layers = [step["metrics"] for step in steps if "layer.0" in step["metrics"]]
    return {
        "mixer": name,
        "transferred": transferred,
        "teacher": held_out[-1]["teacher"],
        "curve": [[tokens[event["step"]], event["loss"]] for event in held_out],
        "transfer_loss": [
            {"layer": int(key.removeprefix("layer.")), "first": layers[0][key], "last": layers[-1][key]}
            for key in (layers[0] if layers else ())
            if key.startswith("layer.")
        ],
        "seconds": sum(event["seconds"] for event in steps),
    }


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """One panel a mixer: held-out nats per token over tokens."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "supra"
    from matplotlib import pyplot

    names = list(dict.fromkeys(entry["mixer"] for entry in runs))
    figure, panels = pyplot.subplots(1, len(names), figsize=(2.6 * len(names), 3), sharey=True, layout="constrained")
    for panel, name in zip(panels, names, strict=True):
        for entry in (entry for entry in runs if entry["mixer"] == name):
            thousands, nats = zip(*[(tokens / 1000, loss) for tokens, loss in entry["curve"]], strict=True)
            label = "transfer, then distill" if entry["transferred"] else "distill alone"
            panel.plot(thousands, nats, label=label, color="C0" if entry["transferred"] else "C1")
        teacher = runs[0]["teacher"]
        panel.axhline(teacher, linestyle="--", color="black", linewidth=0.8, label="teacher")
        panel.set(title=name, xlabel="thousand tokens")
    panels[0].set_ylabel("held-out nats per token")
    panels[-1].legend(*panels[0].get_legend_handles_labels(), fontsize="small")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cases = [
            (name, transferred)
            for name in MIXERS
            for transferred in ([0] if name in WITHOUT_PARAMETERS else [0, TRANSFERRED])
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            runs = list(pool.map(lambda case: run(Path(folder), *case), cases))
    document = {
        "benchmark": "curves",
        "environment": environment("cpu") | {"command": ["python", "benchmarks/curves.py"]},
        "tokens": TOKENS,
        "runs": runs,
    }
    print(json.dumps(document, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if arguments.figure:
        draw(runs, arguments.figure)


if __name__ == "__main__":
    main()
