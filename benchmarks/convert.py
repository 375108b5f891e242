"""What does it take to convert a 7B model, beside a copy of the parameters that are new?

    python -m benchmarks.convert [--output FILE] [--rounds 3] [--layers 32]

The base has Llama-2-7B's shape, 13.5 GB of random bf16, one block a shard. Each round is a process of its own. It runs
`supra convert tiny`, after which all is imported, and then `supra convert` of the base, whose shards it links. Timed is
the second; memory is the rise of resident memory in it (VmHWM over VmRSS before it, Linux). In the same round the files
of new parameters are copied by `cp` and synced to the disk. A conversion computes and a copy does not, so neighbours on
the machine (`load_before`, the load average) lengthen the one more than the other.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.measure import arguments, machine, report, target
from benchmarks.saving import peak, reset_peak
from supra_cli.__main__ import main as supra
from supra_cli.core import checkpoint, hub
from supra_cli.core.files import sync_tree, write_json


def write_base(folder: Path, layers: int) -> None:
    """A model of Llama-2-7B's shape with so many layers, a block in each shard."""
    config = checkpoint.read_config(hub.config_folder(hub.resolve("llama-7b"))).plain()
    config.num_hidden_layers, config.dtype = layers, torch.bfloat16
    config.save_pretrained(folder)
    config = checkpoint.read_config(folder)
    shapes = {name: tensor.shape for name, tensor in checkpoint.skeleton(config).state_dict().items()}
    placed, drawn = {}, {}  # every block has the same numbers: they are not read
    for layer in range(layers):
        inside = f"model.layers.{layer}."
        names = [name for name in shapes if name.startswith(inside) or (layer == 0 and ".layers." not in name)]
        file = f"model-{layer + 1:05}-of-{layers:05}.safetensors"
        for name in names:
            if (key := name.removeprefix(inside)) not in drawn:
                drawn[key] = torch.empty(shapes[name], dtype=torch.bfloat16).uniform_(-0.05, 0.05)
        shard = {name: drawn[name.removeprefix(inside)] for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(names, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": placed})
    sync_tree(folder)


def work(base: str, folder: Path) -> None:
    """One conversion of `base` to `folder`/converted; found.json has its seconds and bytes."""
    assert supra(["convert", "tiny", "--output", str(folder / "tiny")]) == 0
    resident = peak("VmRSS")
    reset_peak()
    start, computing = time.perf_counter(), time.process_time()
    assert supra(["convert", base, "--output", str(folder / "converted")]) == 0
    found = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - computing}
    found |= {"imports_bytes": resident, "peak_bytes": peak()}
    (folder / "found.json").write_text(json.dumps(found))


def one_round(base: Path, folder: Path) -> dict:
    """What a conversion and the copy took."""
    (folder / "copy").mkdir(parents=True)
    load = os.getloadavg()[0]
    command = [sys.executable, "-m", "benchmarks.convert", "--work", str(base), str(folder)]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.DEVNULL)
    converted = folder / "converted"
    linked = [file for file in base.glob("*.safetensors") if file.samefile(converted / file.name)]
    new = sorted(converted.glob("model-mixers*.safetensors"))
    start = time.perf_counter()
    subprocess.run(["cp", *map(str, new), str(folder / "copy")], check=True)
    sync_tree(folder / "copy")
    copied = time.perf_counter() - start
    found = json.loads((folder / "found.json").read_text())
    found |= {
        "load_before": load,
        "copy_seconds": copied,
        "shards_linked": len(linked),
        "new_bytes": sum(file.stat().st_size for file in new),
    }
    shutil.rmtree(folder)
    return found


def main() -> None:
    given = arguments(__doc__, rounds=3, layers=32)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        write_base(base, given.layers)
        size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
        rounds = [one_round(base, Path(folder) / f"round-{number}") for number in range(given.rounds)]
    for taken in rounds:
        taken["over_copy"] = taken["seconds"] / taken["copy_seconds"]
        taken["above_imports_mb"] = (taken.pop("peak_bytes") - taken.pop("imports_bytes")) / 1e6
    command = f"python -m benchmarks.convert --rounds {given.rounds} --layers {given.layers}"
    result = {"benchmark": "convert", "command": command, **machine(), "clock": "wall time", "base_bytes": size}
    most = max(taken["above_imports_mb"] for taken in rounds)
    over = statistics.median(taken["over_copy"] for taken in rounds)
    result["rows"] = rounds
    result["targets"] = [
        target("peak memory above imports, MB", "at most", 1000.0, most),
        target("seconds over those of cp and fsync of the new parameters", "at most", 3.0, over),
    ]
    report(result, given.output)


if __name__ == "__main__":
    work(sys.argv[2], Path(sys.argv[3])) if sys.argv[1:2] == ["--work"] else main()
