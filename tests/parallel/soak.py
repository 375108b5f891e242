"""A run that meets a fault every few steps, and goes on after each, ends with the bits of one that met none: `make soak`."""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path

import faults
from faults import bits, checkpoints, run

KINDS = ("kill one", "stop one", "kill all", "kill in a save", "damage")


def soak(folder: Path, *, steps: int, every: int, saved: int, ranks: int = 3, seed: int = 0) -> None:
    """AssertionError unless so. There is a save after `saved` steps, by which `every` and half of `steps` divide.

    Faults come in rounds of all KINDS, shuffled, each to a rank drawn by `seed`.
    """
    drawn, kinds = random.Random(seed), []
    recipe, output = faults.recipe(folder, steps, saved), folder / "disturbed"
    began = time.monotonic()
    whole = run(recipe, folder / "undisturbed", ranks=ranks)
    assert whole.wait() == 0, whole.said()
    print(f"undisturbed: {time.monotonic() - began:.0f} s", flush=True)
    for at in range(every, steps, every):
        kinds = kinds or drawn.sample(KINDS, len(KINDS))
        kind, everyone = kinds.pop(), ",".join(map(str, range(ranks)))
        one = str(drawn.randrange(ranks))
        fault = {
            "kill one": f"SIGKILL@{at}:{one}",
            "stop one": f"SIGTERM@{at}:{one}",
            "kill all": f"SIGKILL@{at}:{everyone}",
            "kill in a save": f"SIGKILL-in-save@{at}:{everyone}",
            "damage": f"SIGKILL@{at}:{everyone}",
        }[kind]
        began, launch = time.monotonic(), run(recipe, output, "--resume", ranks=ranks, fault=fault)
        assert launch.wait() == 1, launch.said()
        newest = checkpoints(output)[-1]
        assert newest == (at if kind == "stop one" else at - saved), launch.said()
        if kind == "damage":
            faults.truncate(output)
        print(f"step {at}: {kind}, {fault}, {time.monotonic() - began:.0f} s", flush=True)
    launch = run(recipe, output, "--resume", ranks=ranks)
    assert launch.wait() == 0, launch.said()
    assert faults.steps(output) == list(range(1, steps + 1))
    assert bits(output) == bits(folder / "undisturbed")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--every", type=int, default=25, help="steps between two faults")
    parser.add_argument("--saved", type=int, default=5, help="steps between two saves")
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        began = time.monotonic()
        soak(Path(scratch), **vars(given))
        print(f"the same bits after {given.steps} steps, {(time.monotonic() - began) / 60:.1f} minutes")
