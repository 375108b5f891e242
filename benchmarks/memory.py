"""Does a run take the memory that `supra plan` said?

    python benchmarks/memory.py [--device cuda] [--output FILE] [CASE ...]

Every case is a recipe that runs for two steps on a randomly drawn model, by one process or by two under torchrun.
Measured is the rise of a process's resident memory (VmHWM of /proc/self/status, reset when the stage begins) over what
it had after its imports and a small run of the same kind, of the rank that took more; planned is what
supra_cli.core.accounting says of the recipe and as many processes, with what an offloading optimizer keeps, in the same
memory. One thread; glibc gives every block above 64 KiB back to the system when it is freed, so that no freed tensor
counts. Linux.

On a GPU the model is larger, cases run by one process and in bf16, several side by side, and measured is what PyTorch's
allocator had given out at most, over what it had after the small run; the memory of the CPU is not.
"""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = PATHS = [ROOT, os.path.join(ROOT, "kernels")]

import argparse  # noqa: E402
import ctypes  # noqa: E402
import gc  # noqa: E402
import json  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
from concurrent.futures import ThreadPoolExecutor  # noqa: E402
from functools import partial  # noqa: E402
from itertools import islice  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from benchmarks import saving  # noqa: E402
from benchmarks.measure import machine, report  # noqa: E402
from supra_cli.core import accounting, corpus, parallel  # noqa: E402
from supra_cli.core import recipe as recipes  # noqa: E402
from supra_cli.core.data import tokenizer  # noqa: E402
from supra_cli.core.train import loop  # noqa: E402
from supra_cli.core.train.events import StageStarted, Step  # noqa: E402

TOLERANCE = 0.1
STEPS = 2
"""The second is the first that finds the optimizer's moments in place."""
SHAPE = {"hidden_size": 384, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 1024}
SHAPE |= {"num_hidden_layers": 4, "vocab_size": 8192, "max_position_embeddings": 8192}
WIDER = {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 2816}
WIDER |= {"num_hidden_layers": 8}
"""On a GPU, so that what libraries keep for themselves is little beside it."""
AT_ONCE = {"cpu": 1, "cuda": 8}
CLOCK = {"cpu": "rise of a process's resident memory, MiB", "cuda": "rise of what PyTorch's allocator gave out, MiB"}
BF16, CHECKPOINTED = {"dtype": "bfloat16"}, {"activation_checkpointing": True}
USUAL = {"rows": 4, "length": 512, "passes": 1, "processes": 1, "base": "untied", "mixer": "supra", "keep": "none"}
USUAL |= {"kind": "finetune", "dtype": "float32"}
"""Of a case: `rows` rows of `length` tokens for each process, in so many passes; further keys are the stage's."""

CASES = {
    "finetune": {},
    "finetune, bf16": {**BF16},
    "finetune, in 4 passes": {"rows": 8, "passes": 4},
    "finetune, checkpointed, bf16": {"rows": 8, **CHECKPOINTED, **BF16},
    "finetune, one long row": {"rows": 1, "length": 4096},
    "finetune, mixers alone": {"train": "mixer"},
    "finetune, offloaded, in 2 passes, bf16": {"rows": 8, "passes": 2, "optimizer": "adamw-offload", **BF16},
    "finetune, t2r": {"mixer": "t2r"},
    "finetune, gated": {"mixer": "gated"},
    "finetune, window": {"mixer": "window"},
    "distill, bf16": {"kind": "distill", **BF16},
    "distill, checkpointed, one long row": {"rows": 1, "length": 4096, "kind": "distill", **CHECKPOINTED},
    "transfer": {"kind": "transfer"},
    "transfer, t2r, one long row": {"rows": 1, "length": 2048, "mixer": "t2r", "kind": "transfer"},
    "transfer, gated, in 2 passes": {"rows": 8, "passes": 2, "mixer": "gated", "kind": "transfer"},
    "2 × finetune, half softmax": {"processes": 2, "keep": "every:2"},
    "2 × finetune, tied head, in 4 passes": {"rows": 8, "passes": 4, "processes": 2, "base": "tied"},
    "2 × finetune, checkpointed, bf16": {"rows": 8, "processes": 2, **CHECKPOINTED, **BF16},
    "2 × finetune, offloaded, bf16": {"processes": 2, "optimizer": "adamw-offload", **BF16},
    "2 × distill, bf16": {"processes": 2, "kind": "distill", **BF16},
    "2 × transfer": {"processes": 2, "kind": "transfer"},
}

ON_A_CPU = ("finetune", *(name for name, case in CASES.items() if "processes" in case))
"""Alone: on one GPU there are no two processes, and in bf16 the first is the second."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="all by default")
    given = parser.parse_args()
    if unknown := set(given.cases) - set(CASES):
        parser.error(f"no case '{min(unknown)}'; there are {'; '.join(CASES)}")
    able = [name for name in CASES if given.device == "cpu" or name not in ON_A_CPU]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(AT_ONCE[given.device]) as pool:
        folder, device = Path(name), given.device
        write_inputs(folder, {**SHAPE, **(WIDER if device == "cuda" else {})})
        planned = {case: mib_planned(case, folder, device) for case in given.cases or able}
        measured = pool.map(partial(mib_measured, folder=folder, device=device), planned)
        rows = [row(case, mib, found) for (case, mib), found in zip(planned.items(), measured, strict=True)]
    result = {"benchmark": "memory", "command": " ".join(["python benchmarks/memory.py", *sys.argv[1:]]), **machine()}
    result |= {"clock": CLOCK[given.device], "rows": rows}
    off = {one["case"]: abs(one["planned_over_measured"] - 1) for one in rows}
    result["targets"] = [
        {"what": f"off by: {name}", "bound": "at most", "target": TOLERANCE, "measured": by, "met": by <= TOLERANCE}
        for name, by in off.items()
    ]
    report(result, given.output)


def write_inputs(folder: Path, shape: dict[str, int]) -> None:
    """Text in short documents, and models with its tokenizer: the measured ones, tied and not, and one to warm up."""
    texts = [document.text[:2000] for document in islice(corpus.documents("validation"), 60)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    words = tokenizer.train(texts, SHAPE["vocab_size"])
    ends = {name: getattr(words, name) for name in ("bos_token_id", "eos_token_id")}
    for name, smaller in (("tied", {}), ("untied", {}), ("small", {"num_hidden_layers": 2})):
        whole = {**shape, **ends, **smaller, "tie_word_embeddings": name == "tied"}
        LlamaForCausalLM(LlamaConfig(**whole)).save_pretrained(folder / name)
        words.save_pretrained(folder / name)


def mib_planned(case: str, folder: Path, device: str) -> float:
    recipe, dtype = described(case, folder, device)
    memory = accounting.plan(recipe, dtype, device).stages[0].memory(CASES[case].get("processes", 1))
    return (memory.total + (memory.host if device == "cpu" else 0)) / 2**20


def mib_measured(case: str, folder: Path, device: str) -> float:
    """Of the rank that took most."""
    processes = CASES[case].get("processes", 1)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    paths = os.pathsep.join([*PATHS, os.environ.get("PYTHONPATH", "")])
    settings |= {"HF_HUB_OFFLINE": "1", "SUPRA_CACHE": str(folder / "cache"), "PYTHONPATH": paths}
    found = Path(tempfile.mkdtemp(dir=folder))
    command = [sys.executable, *launch, __file__, "--work", case, device, folder, found]
    subprocess.run(command, env={**os.environ, **settings}, check=True)
    return max(int((found / f"{rank}").read_text()) for rank in range(processes)) / 2**20


def row(case: str, planned: float, measured: float) -> dict:
    processes, of = CASES[case].get("processes", 1), {"planned_mib": planned, "measured_mib": measured}
    found = {"case": case, "processes": processes, **of, "planned_over_measured": planned / measured}
    print(json.dumps(found), file=sys.stderr, flush=True)
    return found


def described(name: str, folder: Path, device: str, base: str | None = None) -> tuple[recipes.Recipe, torch.dtype]:
    """The recipe of a case, and what it is computed in."""
    stage = USUAL | CASES[name] | (BF16 if device == "cuda" else {})
    rows, length, passes, processes = (stage.pop(key) for key in ("rows", "length", "passes", "processes"))
    own, mixer, keep, dtype = (stage.pop(key) for key in ("base", "mixer", "keep", "dtype"))
    step = rows * length * processes
    stage |= {"tokens": STEPS * step, "batch_tokens": step, "micro_batch_tokens": rows * length // passes, "lr": 1e-4}
    data = {"seq_len": length, "sources": [{"path": str(folder / "text.jsonl")}]}
    raw = {"base": str(folder / (base or own)), "keep": keep, "mixer": {"name": mixer}, "data": data, "stages": [stage]}
    return recipes.validate(raw), getattr(torch, dtype)


def work(name: str, device: str, folder: Path, found: Path) -> None:
    """Run the case and write into `found` by how much this process rose."""
    with parallel.joined(device) as world:
        for base in ("small", None):
            before, (recipe, dtype) = settled(device), described(name, folder, device, base)
            output = world.shared(Path(tempfile.mkdtemp(dir=found)) / "run")
            for event in loop.uptrain(recipe, output, device=device, dtype=dtype, world=world):
                if isinstance(event, StageStarted):
                    settled(device)
                    forget_peak(device)
                if isinstance(event, Step):
                    (found / f"{world.rank}").write_text(f"{peak(device) - before}")


def settled(device: str) -> int:
    """Bytes that are held when what nobody wants any more is not."""
    gc.collect()
    if device == "cuda":
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    return saving.peak("VmRSS")


def forget_peak(device: str) -> None:
    torch.cuda.reset_peak_memory_stats() if device == "cuda" else saving.reset_peak()


def peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else saving.peak()


if __name__ == "__main__":
    work(*sys.argv[2:4], *map(Path, sys.argv[4:])) if sys.argv[1:2] == ["--work"] else main()
