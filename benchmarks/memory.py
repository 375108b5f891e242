"""Does a run take the memory that `supra plan` said?

    python benchmarks/memory.py [--cases NAME ...] [--json] [--output FILE]

Every case is a recipe that runs for two steps on randomly drawn models, by one process or by two under torchrun.
Measured is the rise of a process's resident memory (VmHWM of /proc/self/status, reset when the stage begins) over what
it had after its imports and a small run of the same kind, of the rank that took more; planned is what
supra_cli.core.accounting says of the same recipe and as many processes, with what an offloading optimizer keeps in the
same memory. One thread; glibc gives every block above 64 KiB back to the system when it is freed
(MALLOC_MMAP_THRESHOLD_), so that no freed tensor counts. Linux.
"""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "kernels")]

import argparse  # noqa: E402
import ctypes  # noqa: E402
import gc  # noqa: E402
import json  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
from itertools import islice  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402

from benchmarks.measure import machine, report  # noqa: E402

TOLERANCE = 0.1
STEPS = 2
"""The second is the first that finds the optimizer's moments in place."""
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
SHAPE = {
    "hidden_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "intermediate_size": 1024,
    "vocab_size": 8192,
    "max_position_embeddings": 8192,
}
SMALL = {**SHAPE, "num_hidden_layers": 2}
"""For the warm-up run."""


def case(rows: int = 4, length: int = 512, passes: int = 1, mixer: str = "supra", processes: int = 1, **keys) -> dict:
    """`rows` rows of `length` tokens for each process in a step, in so many passes; further keys are the stage's, `dtype`
    what is computed in, `tied` whether the base's head is its embedding."""
    return {"rows": rows, "length": length, "passes": passes, "mixer": mixer, "processes": processes, **keys}


BF16, CHECKPOINTED = {"dtype": "bfloat16"}, {"activation_checkpointing": True}
CASES = {
    "finetune": case(),
    "finetune, bf16": case(**BF16),
    "finetune, in 4 passes": case(rows=8, passes=4),
    "finetune, checkpointed": case(rows=8, **CHECKPOINTED),
    "finetune, checkpointed, bf16": case(rows=8, **CHECKPOINTED, **BF16),
    "finetune, one long row": case(rows=1, length=4096),
    "finetune, tied head": case(tied=True),
    "finetune, head untied": case(tied=True, untie=True),
    "finetune, mixers alone": case(train="mixer"),
    "finetune, offloaded": case(optimizer="adamw-offload"),
    "finetune, offloaded, in 2 passes, bf16": case(rows=8, passes=2, optimizer="adamw-offload", **BF16),
    "finetune, t2r": case(mixer="t2r"),
    "finetune, gated": case(mixer="gated"),
    "finetune, window": case(mixer="window"),
    "finetune, half softmax": case(keep="every:2"),
    "distill": case(kind="distill"),
    "distill, bf16": case(kind="distill", **BF16),
    "distill, checkpointed, one long row": case(1, 4096, kind="distill", **CHECKPOINTED),
    "distill, gated, in 2 passes": case(8, passes=2, mixer="gated", kind="distill"),
    "transfer": case(kind="transfer"),
    "transfer, bf16": case(kind="transfer", **BF16),
    "transfer, t2r, one long row": case(1, 2048, mixer="t2r", kind="transfer"),
    "transfer, gated, in 2 passes": case(rows=8, passes=2, mixer="gated", kind="transfer"),
    "2 × finetune": case(processes=2),
    "2 × finetune, bf16": case(processes=2, **BF16),
    "2 × finetune, in 4 passes, tied head": case(rows=8, passes=4, processes=2, tied=True),
    "2 × finetune, checkpointed, bf16": case(rows=8, processes=2, **CHECKPOINTED, **BF16),
    "2 × finetune, offloaded, bf16": case(processes=2, optimizer="adamw-offload", **BF16),
    "2 × distill, bf16": case(processes=2, kind="distill", **BF16),
    "2 × transfer": case(processes=2, kind="transfer"),
    "2 × transfer, t2r, bf16": case(processes=2, kind="transfer", mixer="t2r", **BF16),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES, metavar="NAME", help="all by default")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder))
        rows = [row(name, Path(folder)) for name in given.cases]
    result = {"benchmark": "memory", "command": " ".join(["python benchmarks/memory.py", *sys.argv[1:]]), **machine()}
    result |= {"clock": "rise of resident memory of a process, MiB", "rows": rows}
    off = {one["case"]: abs(one["planned_over_measured"] - 1) for one in rows}
    result["targets"] = [
        {"what": f"off by: {name}", "bound": "at most", "target": TOLERANCE, "measured": by, "met": by <= TOLERANCE}
        for name, by in off.items()
    ]
    report(result, given.output, given.json)


def write_inputs(folder: Path) -> None:
    """Text in short documents, and random models with a tokenizer: the measured ones, tied and not, and a small one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from supra_cli.core import corpus
    from supra_cli.core.data import tokenizer as bpe

    texts = [document.text[:2000] for document in islice(corpus.documents("validation"), 60)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    words = bpe.train(texts, SHAPE["vocab_size"])
    ids = {name: getattr(words, name) for name in ("bos_token_id", "eos_token_id")}
    for name, shape in (("tied", SHAPE), ("untied", SHAPE), ("small", SMALL)):
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=name == "tied", **ids)).save_pretrained(folder / name)
        words.save_pretrained(folder / name)


def row(name: str, folder: Path) -> dict:
    from supra_cli.core import accounting

    processes = CASES[name]["processes"]
    recipe, dtype = described(name, folder)
    memory = accounting.plan(recipe, dtype, "cpu").stages[0].memory(processes)
    worker = f"import benchmarks.memory as m; m.work({name!r}, m.Path({str(folder)!r}))"
    command = [sys.executable, "-c", worker]
    if processes > 1:
        (folder / "worker.py").write_text(worker)
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc-per-node={processes}",
            f"{folder}/worker.py",
        ]
    paths = os.pathsep.join([ROOT, os.path.join(ROOT, "kernels")])
    cache = {"SUPRA_CACHE": str(folder / "cache"), "PYTHONPATH": paths}
    subprocess.run(command, env={**os.environ, **ENVIRONMENT, **cache}, check=True)
    planned, measured = (
        memory.total + memory.host,
        max(int((folder / f"{rank}").read_text()) for rank in range(processes)),
    )
    found = {"case": name, "processes": processes, "planned_mib": planned / 2**20, "measured_mib": measured / 2**20}
    found["planned_over_measured"] = planned / measured
    print(json.dumps(found), file=sys.stderr, flush=True)
    return found


def described(name: str, folder: Path, base: str | None = None):
    """The recipe of a case, and what it is computed in."""
    from supra_cli.core import recipe as recipes

    keys = {"kind": "finetune", "tied": False, "keep": "none", "dtype": "float32", **CASES[name]}
    tied, mixer, keep, dtype = (keys.pop(key) for key in ("tied", "mixer", "keep", "dtype"))
    rows, length, passes, processes = (keys.pop(key) for key in ("rows", "length", "passes", "processes"))
    own = rows * length
    batch = {"tokens": STEPS * own * processes, "batch_tokens": own * processes, "micro_batch_tokens": own // passes}
    raw = {
        "base": str(folder / (base or ("tied" if tied else "untied"))),
        "keep": keep,
        "mixer": {"name": mixer},
        "data": {"seq_len": length, "sources": [{"path": str(folder / "text.jsonl")}]},
        "stages": [{**batch, "lr": 1e-4, **keys}],
    }
    return recipes.validate(raw), getattr(torch, dtype)


def work(name: str, folder: Path) -> None:
    """Run the case and write, as one of its processes, by how much it rose."""
    from supra_cli.core.parallel import joined
    from supra_cli.core.train import loop
    from supra_cli.core.train.events import StageStarted, Step

    before = 0
    with joined("cpu") as world:
        for base in ("small", None):
            settle()
            before, (recipe, dtype) = status("VmRSS"), described(name, folder, base)
            output = world.shared(Path(tempfile.mkdtemp(dir=folder)))
            for event in loop.uptrain(recipe, output / "run", device="cpu", dtype=dtype, world=world):
                if isinstance(event, StageStarted):
                    settle()
                    Path("/proc/self/clear_refs").write_text("5")
                peak = status("VmHWM") if isinstance(event, Step) else 0
                if isinstance(event, Step) and event.step == STEPS:
                    (folder / f"{world.rank}").write_text(f"{peak - before}")


def settle() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


if __name__ == "__main__":
    main()
