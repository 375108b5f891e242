"""Does a run take the memory that `supra plan` said?

    python benchmarks/memory.py [--cases NAME ...] [--measured FILE] [--json] [--output FILE]

Every case is a recipe that `supra uptrain` runs for two steps on randomly drawn models, in a process of its own.
Measured is the rise of resident memory (VmHWM of /proc/self/status, reset when the stage begins) over what the process
had after its imports and a small run of the same kind; planned is what supra_cli.core.accounting says of the same
recipe. Beside it, under PyTorch's profiler, the rise of what its allocator handed out to the thread that trains (a
teacher in bf16 is made by others). One thread; glibc gives every block above 64 KiB back to the system when it is freed
(MALLOC_MMAP_THRESHOLD_), so that no freed tensor counts. Linux.
"""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "kernels")]

import argparse  # noqa: E402
import ctypes  # noqa: E402
import gc  # noqa: E402
import json  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from itertools import islice  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402

from benchmarks.measure import machine, report  # noqa: E402

TOLERANCE = 0.1
STEPS = 2
"""The second is the first that finds the optimizer's moments in place."""
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
"""Read when a process begins."""
WORDS = 8192
"""The models' whole vocabulary: text of few words would touch few of the embedding's pages."""
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


def case(rows: int = 4, length: int = 512, passes: int = 1, mixer: str = "supra", **keys) -> dict:
    """`rows` rows of `length` tokens in a step, in so many passes; further keys are the stage's, `dtype` what is
    computed in, `tied` whether the base's head is its embedding."""
    return {"rows": rows, "length": length, "passes": passes, "mixer": mixer, **keys}


NOTE = (
    "Resident memory has only those pages of the mapped weights that were read, and so does the plan for a CPU: a "
    "transfer stage reads no output head. An embedding counts as read whole: rows of ordinary text lie in nearly all "
    "of its pages."
)

CASES = {
    "finetune": case(),
    "finetune, bf16": case(dtype="bfloat16"),
    "finetune, in 4 passes": case(rows=8, passes=4),
    "finetune, checkpointed": case(rows=8, activation_checkpointing=True),
    "finetune, checkpointed, bf16": case(rows=8, activation_checkpointing=True, dtype="bfloat16"),
    "finetune, one long row": case(rows=1, length=4096),
    "finetune, tied head": case(tied=True),
    "finetune, head untied": case(tied=True, untie=True),
    "finetune, mixers alone": case(train="mixer"),
    "finetune, offloaded": case(optimizer="adamw-offload"),
    "finetune, offloaded, in 2 passes, bf16": case(rows=8, passes=2, optimizer="adamw-offload", dtype="bfloat16"),
    "finetune, t2r": case(mixer="t2r"),
    "finetune, gated": case(mixer="gated"),
    "finetune, window": case(mixer="window"),
    "finetune, half softmax": case(keep="every:2"),
    "distill": case(kind="distill"),
    "distill, bf16": case(kind="distill", dtype="bfloat16"),
    "distill, checkpointed, one long row": case(1, 4096, kind="distill", activation_checkpointing=True),
    "distill, gated, in 2 passes": case(8, passes=2, mixer="gated", kind="distill"),
    "transfer": case(kind="transfer"),
    "transfer, bf16": case(kind="transfer", dtype="bfloat16"),
    "transfer, t2r, one long row": case(1, 2048, mixer="t2r", kind="transfer"),
    "transfer, gated, in 2 passes": case(rows=8, passes=2, mixer="gated", kind="transfer"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES, metavar="NAME", help="all by default")
    parser.add_argument("--measured", type=Path, help="an earlier result: plan anew and measure only what it lacks")
    given = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(
            sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR}
        )  # read when a process begins
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SUPRA_CACHE"] = str(Path(folder) / "cache")
        write_inputs(Path(folder))
        known = {} if given.measured is None else json.loads(given.measured.read_text(encoding="utf-8"))
        before = {one["case"]: one for one in known.get("rows", [])}
        rows = [row(name, Path(folder), before.get(name, {})) for name in given.cases]
    result = {
        "benchmark": "memory",
        "command": " ".join(["python benchmarks/memory.py", *sys.argv[1:]]),
        **machine(),
        "clock": "rise of resident memory, MiB",
        "note": NOTE,
        "rows": rows,
        "targets": [
            {
                "what": f"planned over resident, off by: {one['case']}",
                "bound": "at most",
                "target": TOLERANCE,
                "measured": abs(one["planned_over_resident"] - 1),
                "met": abs(one["planned_over_resident"] - 1) <= TOLERANCE,
            }
            for one in rows
        ],
    }
    report(result, given.output, given.json)


def row(name: str, folder: Path, known: dict) -> dict:
    found = {"case": name, "planned_mib": forked(planned, name, folder) / 2**20}
    for key, measure in (("resident_mib", resident), ("allocated_mib", allocated)):
        found[key] = known[key] if key in known else forked(measure, name, folder) / 2**20
        found[f"planned_over_{key.removesuffix('_mib')}"] = found["planned_mib"] / found[key]
    print(json.dumps(found), file=sys.stderr, flush=True)
    return found


def forked(measure: Callable[[str, Path], int], name: str, folder: Path) -> int:
    """What `measure` finds in a process of its own, which begins with the imports of this one."""
    from supra_cli.core import accounting  # noqa: F401
    from supra_cli.core.train import loop  # noqa: F401

    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        torch.set_num_threads(1)  # makes the thread pool anew, which a fork leaves to the first of several threads
        os.write(writing, str(measure(name, folder)).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        found = stream.read()
    os.waitpid(process, 0)
    return int(found)


def write_inputs(folder: Path) -> None:
    """Text in short documents, and random models with a tokenizer: the measured ones, tied and not, and a small one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from supra_cli.core import corpus
    from supra_cli.core.data import tokenizer as bpe

    texts = [document.text[:2000] for document in islice(corpus.documents("validation"), 60)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    words = bpe.train(texts, WORDS)
    ids = {name: getattr(words, name) for name in ("bos_token_id", "eos_token_id")}
    for name, shape in (("tied", SHAPE), ("untied", SHAPE), ("small", SMALL)):
        torch.manual_seed(0)
        config = LlamaConfig(**shape, tie_word_embeddings=name == "tied", **ids)
        LlamaForCausalLM(config).save_pretrained(folder / name)
        words.save_pretrained(folder / name)


def recipe(name: str, folder: Path, base: str | None = None):
    from supra_cli.core import recipe as recipes

    keys = {"kind": "finetune", "tied": False, "keep": "none", **CASES[name]}
    tied, mixer, keep = keys.pop("tied"), keys.pop("mixer"), keys.pop("keep")
    rows, length, passes = keys.pop("rows"), keys.pop("length"), keys.pop("passes")
    keys.pop("dtype", None)
    step = rows * length
    stage = {"tokens": STEPS * step, "batch_tokens": step, "micro_batch_tokens": step // passes, "lr": 1e-4, **keys}
    return recipes.validate(
        {
            "base": str(folder / (base or ("tied" if tied else "untied"))),
            "keep": keep,
            "mixer": {"name": mixer},
            "data": {"seq_len": length, "sources": [{"path": str(folder / "text.jsonl")}]},
            "stages": [stage],
        }
    )


def dtype(name: str) -> torch.dtype:
    return getattr(torch, CASES[name].get("dtype", "float32"))


def planned(name: str, folder: Path) -> int:
    from supra_cli.core import accounting

    return accounting.plan(recipe(name, folder), dtype(name), "cpu").stages[0].memory.together


def steps(name: str, folder: Path, base: str | None = None) -> Iterator[str]:
    """`begun` when the stage is ready, then `step` after each."""
    from supra_cli.core.train import loop
    from supra_cli.core.train.events import StageStarted, Step

    with tempfile.TemporaryDirectory(dir=folder) as output:
        events = loop.uptrain(recipe(name, folder, base), Path(output) / "run", device="cpu", dtype=dtype(name))
        for event in events:
            if isinstance(event, StageStarted):
                yield "begun"
            if isinstance(event, Step):
                yield "step"
                if event.step == STEPS:
                    break
        events.close()


def settle() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def resident(name: str, folder: Path) -> int:
    for _ in steps(name, folder, "small"):
        pass
    settle()
    before = status("VmRSS")
    for what in steps(name, folder):
        if what == "begun":
            settle()
            Path("/proc/self/clear_refs").write_text("5")
        peak = status("VmHWM")
    return peak - before


def allocated(name: str, folder: Path) -> int:
    """The allocator's highest sum, and all weights, read or not: a mapped file has them until a step changes them."""
    running, mapped = steps(name, folder), 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        for what in running:
            mapped = mapped if what == "step" else mapped_weights()
    sums = totals(profile.profiler.kineto_results.experimental_event_tree())
    return max(sums) - sums[0] + mapped


def mapped_weights() -> int:
    """Bytes of the files of weights in this process's address space."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [line[0].split("-") for line in lines if line[-1].endswith(".safetensors")]
    return sum(int(end, 16) - int(start, 16) for start, end in spans)


def totals(events: list) -> list[int]:
    """Bytes in the allocator's hands after each of its calls, in order."""
    found, waiting = [], list(reversed(events))
    while waiting:
        event = waiting.pop()
        if event.tag.name == "Allocation":
            found.append(event.extra_fields.total_allocated)
        waiting.extend(reversed(event.children))
    return found


if __name__ == "__main__":
    main()
