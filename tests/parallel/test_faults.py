"""Ranks that are stopped, killed, spoilt, short of disk or refused: real processes, started by torchrun.

Each ends with one sentence of ours, before torchrun's own report, in no more time than a wait may take, and with a run
that goes on as if nothing had been.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import faults
import soak
from faults import bits, checkpoints, launched, run, steps

from supra_cli.core import checkpoint

STEPS, EVERY = 24, 5


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return faults.recipe(tmp_path_factory.mktemp("faults"), STEPS, EVERY)


@pytest.fixture(scope="module")
def undisturbed(recipe: Path) -> Mapping[str, bytes]:
    """The bits of a run on two ranks: here of two agents that meet on loopback, as on two nodes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    nodes = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "faults"]
    output = recipe.parent / "undisturbed"
    with (
        launched(recipe, output, ranks=1, options=nodes) as one,
        launched(recipe, output, ranks=1, options=nodes) as other,
    ):
        assert (one.wait(), other.wait()) == (0, 0), one.said() + other.said()
    spoken = [launch.said().count("finished: ") for launch in (one, other)]
    assert sorted(spoken) == [0, 1]
    assert json.loads((output / "env.json").read_text())["ranks"] == 2
    return bits(output)


def test_a_stop_asked_of_one_rank_of_four_is_all_ranks_and_is_not_undone(recipe: Path) -> None:
    output = recipe.parent / "stopped"
    asked = run(recipe, output, ranks=4, fault="SIGTERM@7:2", options=["--max-restarts", "1"])
    first, again = asked.errors()
    assert first == "error: stopped after step 7 with everything saved; go on with --resume"
    assert "was asked to stop, so that it is not started again" in again
    assert asked.wait() == 1  # by torchrun, which has seen 75
    assert "exitcode  : 75" in asked.said()
    assert (steps(output), checkpoints(output)) == ([*range(1, 8)], [5, 7])
    assert (output / "stopped").exists()

    asked = run(recipe, output, "--resume", ranks=4, fault="SIGUSR1@9:3")
    assert asked.errors() == ["error: stopped after step 9 with everything saved; go on with --resume"]
    assert (steps(output), checkpoints(output)) == ([*range(1, 10)], [7, 9])

    assert run(recipe, output, "--resume").wait() == 0  # on two
    assert steps(output) == [*range(1, STEPS + 1)]
    assert not (output / "stopped").exists()


def test_a_run_goes_on_by_itself_after_a_rank_was_killed(recipe: Path, undisturbed: Mapping[str, bytes]) -> None:
    output = recipe.parent / "restarted"
    killed = run(recipe, output, fault="SIGKILL@14:1", options=["--max-restarts", "1"])
    assert killed.wait() == 0, killed.said()
    (sentence,) = killed.errors()
    assert "another rank of this run ended without a word (" in sentence
    assert "resuming from step-000012" in killed.said()  # the end of the first stage
    assert steps(output) == [*range(1, STEPS + 1)]
    assert bits(output) == undisturbed


def test_kills_and_damage_cost_no_more_than_the_steps_since_a_save(
    recipe: Path, undisturbed: Mapping[str, bytes]
) -> None:
    output = recipe.parent / "killed"
    killed = run(recipe, output, fault="SIGKILL@12:0")  # the one that speaks
    assert killed.wait() == 1
    (sentence,) = killed.errors()
    assert "another rank of this run ended without a word (" in sentence
    assert "Traceback" not in killed.said().partition(sentence)[0]

    with launched(recipe, output, "--resume", fault="hold@13:1") as held:
        held.until((output / "held").exists)
        before = checkpoints(output)
        second = run(recipe, output, "--resume", options=["--max-restarts", "1"])
        assert second.wait() == 1
        assert second.errors() == [
            f"error: another run is writing to {output}; wait for it or choose another --output"
        ]  # once: a refusal is not tried again
        assert "exitcode  : 2" in second.said()
        assert checkpoints(output) == before
        held.process.send_signal(signal.SIGTERM)
        held.wait()
    assert held.errors() == ["error: stopped after step 13 with everything saved; go on with --resume"]

    killed = run(recipe, output, "--resume", fault="SIGKILL-in-save@15:0,1")
    assert killed.errors() == []  # nobody is left to say it
    assert (output / ".writing-000015" / "training").is_dir()
    assert checkpoints(output) == [12, 13]

    assert faults.truncate(output) == 13
    resumed = run(recipe, output, "--resume")
    assert resumed.wait() == 0, resumed.said()
    assert "checkpoint step-000013 is damaged (" in resumed.said()
    assert "resuming from step-000012" in resumed.said()
    assert not list(output.glob(".writing-*"))
    assert steps(output) == [*range(1, STEPS + 1)]
    assert bits(output) == undisturbed


def test_what_one_rank_cannot_do_ends_all_with_its_sentence(recipe: Path) -> None:
    output = recipe.parent / "refused"
    spoilt = run(recipe, output, fault="nan@7:1")
    assert spoilt.wait() == 1
    (sentence,) = spoilt.errors()
    assert sentence.startswith("error: loss nan and gradient norm nan in stage 0 (transfer), step 7; nothing was updated")
    assert (steps(output), checkpoints(output)) == ([*range(1, 7)], [5])
    assert (output / "non-finite" / "step-000007" / "batch.safetensors").exists()

    full = run(recipe, output, "--resume", fault="full@10:1")
    assert full.wait() == 1
    (sentence,) = full.errors()
    assert "cannot write" in sentence
    assert "No space left on device); make room" in sentence
    assert checkpoints(output) == [5]
    assert not list(output.glob(".writing-*"))
    checkpoint.verify(output / "last")


def test_a_short_soak(tmp_path: Path) -> None:
    soak.soak(tmp_path, steps=32, every=8, saved=4)
