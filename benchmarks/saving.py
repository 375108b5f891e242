"""What does a save take beside one plain write of the same bytes, and beside torch.distributed.checkpoint?

    python -m benchmarks.saving [--output FILE] [--rounds 7]

`uptrain` of a Llama of 60M random fp32 weights saves model and moments after every step: by one rank (`alone`) and,
started by torchrun, by two (`together`). Timed is what the loop does between a step and the word that it is saved, the
oldest checkpoint's removal included. In the same rounds stand `plain`, one rank's safetensors.save_file and fsync of
the same tensors, and `dcp`, torch.distributed.checkpoint on two ranks through HuggingFaceStorageWriter with
consolidation, and fsync of what it leaves. Memory is the peak of the first rank's resident memory (VmHWM, Linux) in a
save and in the step before it.
"""

import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import arguments, by_two_ranks, machine, report, target
from supra_cli.core import checkpoint, hub, parallel
from supra_cli.core import recipe as recipes
from supra_cli.core.files import sync, sync_tree
from supra_cli.core.parallel import ALONE, World
from supra_cli.core.train import loop
from supra_cli.core.train.events import Saved, Step

SHAPE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12}
WARM = 2
"""Saves before the first one that also removes an old one."""


def write_base(folder: Path) -> None:
    tiny = hub.open("tiny")
    ends = {
        name: getattr(checkpoint.read_config(tiny), name) for name in ("vocab_size", "bos_token_id", "eos_token_id")
    }
    LlamaForCausalLM(LlamaConfig(**SHAPE, **ends, tie_word_embeddings=True)).save_pretrained(folder)
    checkpoint.load_tokenizer(tiny).save_pretrained(folder)


def saves(base: Path, run: Path, steps: int, world: World) -> Iterator[dict[str, int]]:
    """A save each, with the peaks of resident memory in it and in its step; before each the generator waits."""
    spec = {"kind": "finetune", "tokens": steps * 128, "batch_tokens": 128}
    data = {"seq_len": 64, "sources": [{"path": "python-stdlib"}]}
    raw = {"base": str(base), "data": data, "stages": [spec], "checkpoint": {"every_steps": 1, "keep_last": 2}}
    step = 0
    for event in loop.uptrain(recipes.validate(raw), run, world=world):
        if isinstance(event, Step):
            step = peak()
            reset_peak()
            yield {}
        if isinstance(event, Saved):
            yield {"step": step, "save": peak()}
            reset_peak()


def part(tensor: Tensor, world: World) -> DTensor:
    """This rank's rows of a tensor that every rank has, without the rest of it."""
    rows = distribute_tensor(tensor, world.mesh, [Shard(0)], src_data_rank=None)
    return DTensor.from_local(
        rows.to_local().clone(), world.mesh, rows.placements, shape=rows.shape, stride=rows.stride()
    )


def peak(kind: str = "VmHWM") -> int:
    """Bytes of resident memory: the most since it was reset, or by "VmRSS" now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def work(rounds: int, folder: Path) -> None:
    """What a rank does; the first writes seconds, bytes and peaks of every form."""
    torch.set_num_threads(1)
    with parallel.joined("cpu") as world:
        if world.leads:
            write_base(folder / "base")
        world.barrier()
        steps = WARM + rounds
        alone = saves(folder / "base", folder / "alone", steps, ALONE) if world.leads else iter(())
        together = saves(folder / "base", folder / "together", steps, world)
        for events in (alone, together):
            for _ in range(2 * WARM):
                next(events, None)
        world.barrier()
        files = sorted((folder / "alone" / "last").resolve().rglob("*.safetensors"))
        tensors = {f"{file.name} {name}": x for file in files for name, x in load_file(file).items()}
        # Of whole tensors, such as the moments' step counts, every rank has its own.
        sharded = {name: part(x, world) if x.dim() else x for name, x in tensors.items()}
        seconds: dict[str, list[float]] = {}

        def timed(form: str, act: Callable[[], object]) -> object:
            world.barrier()
            start = time.perf_counter()
            found = act()
            world.barrier()
            seconds.setdefault(form, []).append(time.perf_counter() - start)
            return found

        def plain() -> None:
            if world.leads:
                save_file(tensors, folder / "plain.safetensors")
                sync(folder / "plain.safetensors")

        def by_dcp() -> None:
            writer = dcp.HuggingFaceStorageWriter(str(folder / "dcp"), save_distributed=True, enable_consolidation=True)
            dcp.save(sharded, storage_writer=writer)
            if world.leads:
                sync_tree(folder / "dcp")

        peaks: dict[str, dict[str, int]] = {}
        for _ in range(rounds):
            for form, events in (("alone", alone), ("together", together)):
                next(events, None)  # the step
                peaks[form] = timed(form, lambda events=events: next(events, None))
            timed("plain", plain)
            timed("dcp", by_dcp)
            if world.leads:
                (folder / "plain.safetensors").unlink()
                shutil.rmtree(folder / "dcp")
        if world.leads:
            size = sum(x.nbytes for x in tensors.values())
            found = {"bytes": size, "seconds": seconds, "peaks": peaks}
            (folder / "found.json").write_text(json.dumps(found))


def main() -> None:
    given = arguments(__doc__, rounds=7)
    found = by_two_ranks("saving", given.rounds)
    rows = []
    for form, ranks in (("plain", 1), ("alone", 1), ("together", 2), ("dcp", 2)):
        taken = found["seconds"][form]
        over = [ours / plain for ours, plain in zip(taken, found["seconds"]["plain"], strict=True)]
        row = {"form": form, "ranks": ranks, "seconds": statistics.median(taken), "over_plain": statistics.median(over)}
        row |= {"least": min(over), "most": max(over)}
        rows.append(row | {f"{when}_peak_mib": size / 2**20 for when, size in found["peaks"].get(form, {}).items()})
    result = {"benchmark": "saving", "command": f"python -m benchmarks.saving --rounds {given.rounds}", **machine()}
    result |= {"clock": "wall time", "bytes": found["bytes"], "rows": rows, "targets": []}
    for row in rows[1:3]:
        ranks = "1 rank" if row["ranks"] == 1 else "2 ranks"
        more = row["save_peak_mib"] / row["step_peak_mib"]
        result["targets"] += [
            target(f"save by {ranks} over a plain write", "at most", 3.0, row["over_plain"]),
            target(f"peak memory of a save over a step's, {ranks}", "at most", 1.0, more),
        ]
    report(result, given.output)


if __name__ == "__main__":
    work(int(sys.argv[2]), Path(sys.argv[3])) if sys.argv[1:2] == ["--work"] else main()
