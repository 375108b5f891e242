"""A run that something happens to again and again ends with the bits of one that nothing happened to.

`python tests/parallel/soak.py`: 500 steps on three ranks, something every 25. What, and to which rank, is drawn by a
seed. Prints a line a fault; exit code 1 where a bit differs.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tomli_w

from supra_cli.core import corpus
from tests.parallel import faulty
from tests.parallel.faulty import Fault
from tests.parallel.launching import finish, start
from tests.tiny import save_base

KINDS = ("kill", "kill all", "kill in save", "full disk", "term", "usr1", "truncated")
SAVES = 5
"""Steps from one save to the next."""


def prepare(folder: Path, steps: int) -> Path:
    """A recipe of so many steps of transfer, then distill, then finetune, on a tiny base."""
    text = "".join(document.text for document in corpus.documents("validation"))[:60_000]
    (folder / "text.txt").write_text(text, encoding="utf-8")
    save_base(folder / "base", [text])
    shares = {"transfer": steps // 4, "distill": steps // 4, "finetune": steps - 2 * (steps // 4)}
    shared = {"batch_tokens": 128, "micro_batch_tokens": 32, "lr": 1e-3, "warmup_steps": 1}
    recipe = {
        "base": str(folder / "base"),
        "mixer": {"name": "supra", "gain": "head"},
        "data": {"seq_len": 32, "sources": [{"path": str(folder / "text.txt")}]},
        "checkpoint": {"every_steps": SAVES, "keep_last": 2, "dtype": "bfloat16"},
        "stages": [{"kind": kind, "tokens": 128 * share, **shared} for kind, share in shares.items()],
    }
    path = folder / "recipe.toml"
    path.write_text(tomli_w.dumps(recipe), encoding="utf-8")
    return path


def drawn(steps: int, every: int, ranks: int, seed: int = 0) -> list[Fault]:
    """A fault at about every so many steps, in an order in which each kind comes before any comes twice."""
    dice, faults, kinds = random.Random(seed), [], []
    for step in range(every, steps, every):
        kinds = kinds or dice.sample(KINDS, len(KINDS))
        kind = kinds.pop()
        # One in a save strikes at a step that is saved.
        strikes = step if kind in ("kill in save", "full disk") else step + dice.randrange(1, SAVES)
        faults.append(Fault(kind, strikes, None if kind == "kill all" else dice.randrange(ranks)))
    return faults


def disturbed(recipe: Path, output: Path, ranks: int, faults: list[Fault]) -> None:
    """Make the run in as many launches as it takes, and see that each ends as its fault should end it."""
    for fault in [*faults, None]:
        before, more = time.perf_counter(), ["--resume"] if (output / "last").exists() else []
        ended = launch(recipe, output, ranks, fault, *more, seconds=1200)  # all steps may be one launch's
        assert (ended.returncode == 0) == (fault is None), ended.stderr
        assert "internal error" not in ended.stderr, ended.stderr
        if fault is not None and fault.kind == "truncated":
            weights = max((output / "last").resolve().glob("model*.safetensors"), key=lambda path: path.stat().st_size)
            with weights.open("r+b") as file:
                file.truncate(weights.stat().st_size // 2)
        told = "ends" if fault is None else f"step {fault.step}: {fault.kind}, rank {fault.rank}"
        print(f"{told} ({time.perf_counter() - before:.0f} s)", flush=True)


def launch(
    recipe: Path,
    output: Path,
    ranks: int,
    fault: Fault | None,
    *more: str,
    options: tuple[str, ...] = (),
    seconds: float = 300,
) -> subprocess.CompletedProcess[str]:
    """`torchrun ... supra uptrain`, in which `fault` strikes; an error where a rank hangs.

    One that all wait for hangs if it takes more than `seconds`, one that is left over if torchrun has to kill it.
    """
    script = ["-m", "supra_cli"]
    if fault is not None:
        # Of "kill all" every rank dies; a file is truncated once the run has been killed.
        kind = {"kill all": "kill", "truncated": "kill"}.get(fault.kind, fault.kind)
        script = [faulty.__file__, json.dumps(fault._replace(kind=kind)._asdict())]
    script += ["uptrain", "--recipe", str(recipe), "--output", str(output), *more]
    ended = finish(start(ranks, script, *options, cache=recipe.parent / "cache"), seconds)
    assert "forcefully exiting" not in ended.stderr, ended.stderr
    return ended


def bits(output: Path) -> dict[str, bytes]:
    """Every tensor of a run's last save."""
    last = output / "last"
    return {str(path.relative_to(last)): path.read_bytes() for path in sorted(last.rglob("*.safetensors"))}


def main(steps: int = 500, every: int = 25, ranks: int = 3) -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = prepare(folder, steps)
        disturbed(recipe, folder / "undisturbed", ranks, [])
        disturbed(recipe, folder / "disturbed", ranks, drawn(steps, every, ranks))
        wanted, ours = bits(folder / "undisturbed"), bits(folder / "disturbed")
        different = sorted(name for name in wanted.keys() | ours.keys() if wanted.get(name) != ours.get(name))
        print(f"different: {', '.join(different)}" if different else f"the same bits in {', '.join(wanted)}")
        return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
