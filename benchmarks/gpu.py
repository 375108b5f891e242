"""Every test that wants a GPU, and every GPU benchmark: one call of at most ten minutes.

It ends with a short table and writes JSON.

    python benchmarks/gpu.py [--output DIR] [--seconds N] [PART ...]

Needs torch, triton, transformers, safetensors, pytest, numpy, pyarrow, pydantic and tomli-w, no network, no
installation of this package; torchao, lm-eval and flash-linear-attention are tried too where they are, and with
pytest-xdist the tests, most of which is compiling, run side by side. `make wheels` fetches what a machine may lack.
JSON goes to DIR, else to $OUT, else to benchmarks/results. Each part is a process with its own limit, so that one that
fails leaves the others be; the exit code is 1 if any did.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIDE_BY_SIDE = ["-n", str(min(10, os.cpu_count() or 1)), "--dist", "load"] if find_spec("xdist") else []
TESTS = ["-m", "pytest", "-q", "-m", "gpu", "-o", "addopts=", "-p", "no:cacheprovider", *SIDE_BY_SIDE]
MEASURE, MEMORY = MEASURES = ("benchmarks/measure.py", "benchmarks/memory.py")
UPTRAIN = [MEASURE, "train", "--mixers", "softmax", "supra", "--rounds", "5"]
PARTS = {
    # First, since nothing measured means anything where a model cannot be converted, trained, resumed and read back.
    "tests": (145, [*TESTS, "tests/gpu", "tests/kernels", "tests/core", "tests/train", "tests/laws"]),
    **({"compile-fla": (60, ["benchmarks/autotuned.py"])} if find_spec("fla") else {}),
    "operator": (80, [MEASURE, "operator", "--rounds", "7"]),
    "decode-step": (40, [MEASURE, "step", "--rounds", "50"]),
    # Both models and the base's 16 × 32,768 keys and values would take some 100 GB with all 32 layers.
    "decode-7b": (
        100,
        [MEASURE, "decode", "--model", "mistral-7b", "--layers", "20", "--positions", "32768", "--batch", "16"],
    ),
    # fp32 weights, gradients and moments of both models are on the GPU at once: 35 GB of 1B, 50 GB of 6 layers of 7B.
    "uptrain-1b": (45, [*UPTRAIN, "--model", "tinyllama-1.1b", "--shapes", "4x2048"]),
    "uptrain-7b": (45, [*UPTRAIN, "--model", "mistral-7b", "--layers", "6", "--shapes", "2x2048"]),
    "memory": (75, [MEMORY]),
}
"""Name of a part -> (seconds that are kept for it, arguments of the interpreter)."""
SECONDS = 595


def run(name: str, seconds: int, arguments: list[str], output: Path) -> dict:
    if arguments[0] in MEASURES:
        arguments = [*arguments, "--device", "cuda", "--output", str(output / f"{name}-gpu.json")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    print(f"== {name}", flush=True)
    start = time.perf_counter()
    # A session of its own, so that at the limit everything that the part has started ends with it.
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, start_new_session=True)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    verdict = "ok" if code == 0 else f"over {seconds} s" if code is None else f"exit {code}"
    return {"part": name, "verdict": verdict, "seconds": round(time.perf_counter() - start, 1)}


def results(output: Path, began: float) -> dict[str, dict]:
    """Part -> result, of those written since `began`, in seconds since the epoch."""
    files = {name: output / f"{name}-gpu.json" for name in PARTS}
    fresh = {name: path for name, path in files.items() if path.is_file() and path.stat().st_mtime >= began}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in fresh.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    parser.add_argument("--output", type=Path, default=default, help="folder for the JSON")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="that all parts may take together")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    given = parser.parse_args()
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"no part '{min(unknown)}' here; there are {', '.join(PARTS)}")
    output, chosen = given.output.resolve(), {name: PARTS[name] for name in given.parts or PARTS}
    output.mkdir(parents=True, exist_ok=True)
    began = time.time()
    parts, kept = [], sum(seconds for seconds, _ in chosen.values())
    for name, (seconds, arguments) in chosen.items():
        kept -= seconds
        left = int(given.seconds - kept - (time.time() - began))  # a part may use what those before it did not
        parts.append(run(name, max(seconds, left), arguments, output))
    found = results(output, began)
    met = [target for result in found.values() for target in result["targets"]]
    (output / "gpu.json").write_text(json.dumps({"parts": parts, "targets": met}, indent=1) + "\n", encoding="utf-8")
    print("== summary")
    for part in parts:
        print(f"{part['part']:14} {part['verdict']:12} {part['seconds']:6.1f} s")
    for row in [row for name in found if name.startswith("uptrain") for row in found[name]["rows"]]:
        mfu = "unknown" if row["mfu"] is None else f"{row['mfu']:.3f}"
        rates = f"{row['tokens_per_s']:.0f} tokens/s, MFU {mfu}, {row['over_softmax']:.2f} × softmax"
        print(f"{row['mixer']}, {row['layers']} layers, {row['batch']} × {row['tokens']}: {rates}")
    for target in met:
        measured = "not measured" if target["measured"] is None else f"{target['measured']:.3g}"
        print(f"{target['what']}: {measured} ({target['bound']} {target['target']:g})")
    return 0 if all(part["verdict"] == "ok" for part in parts) else 1


if __name__ == "__main__":
    sys.exit(main())
