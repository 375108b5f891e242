"""What goes wrong while several ranks train, each time with real processes: nobody waits for the dead, one sentence
says what happened, what was saved is whole, and the run goes on to the bits of one that nothing happened to.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from tests.parallel import soak
from tests.parallel.faulty import Fault
from tests.parallel.launching import finish, made_once, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # the first to come makes what all look at

STEPS = 12
"""Of which every fifth and each stage's last are saved: 3, 5, 6, 10, 12."""

MISSED = "error: another rank of this run ended without a word: killed, crashed or cut off; go on with --resume"


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe and its run on two ranks."""

    def make(root: Path) -> None:
        ended = soak.launch(soak.prepare(root, STEPS), root / "run", 2, None)
        assert ended.returncode == 0, ended.stderr

    return made_once(tmp_path_factory, "faults", make)


@pytest.fixture
def recipe(shared: Path) -> Path:
    return shared / "recipe.toml"


@pytest.fixture
def wanted(shared: Path) -> dict[str, bytes]:
    return soak.bits(shared / "run")


def errors(ended: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in ended.stderr.splitlines() if line.startswith("error: ")]


def exit_codes(ended: subprocess.CompletedProcess[str]) -> list[str]:
    """As torchrun reports them."""
    return re.findall(r"exitcode\s*: (-?\d+)", ended.stderr)


def steps(output: Path) -> list[int]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if line["event"] == "step"]


def saves(output: Path) -> list[str]:
    return sorted(path.parent.name for path in output.glob("step-*/COMPLETE"))


def test_torchrun_starts_a_run_again_of_which_a_rank_was_killed(recipe: Path, wanted: dict, tmp_path: Path) -> None:
    ended = soak.launch(recipe, tmp_path / "run", 2, Fault("kill", 8, rank=0), options=("--max-restarts", "1"))
    assert ended.returncode == 0, ended.stderr
    assert errors(ended) == [MISSED]
    assert "resuming from step-000006" in ended.stderr
    assert soak.bits(tmp_path / "run") == wanted
    assert steps(tmp_path / "run") == list(range(1, STEPS + 1))


def test_where_a_rank_is_killed_for_good_the_other_ends_with_a_sentence(recipe: Path, tmp_path: Path) -> None:
    ended = soak.launch(recipe, tmp_path / "run", 2, Fault("kill", 8, rank=1))
    assert ended.returncode == 1
    assert errors(ended) == [MISSED]
    assert saves(tmp_path / "run") == ["step-000005", "step-000006"]


def test_what_torchrun_starts_again_overwrites_the_run_that_was_to_be_overwritten(
    recipe: Path, shared: Path, tmp_path: Path
) -> None:
    """Killed before the old run was cleared, processes started again do not take that for theirs and go on with it."""
    output = tmp_path / "run"
    shutil.copytree(shared / "run", output, symlinks=True)
    (output / "last").resolve().joinpath("mark").touch()
    fault, options = Fault("kill at start", 0, rank=0), ("--max-restarts", "1")
    ended = soak.launch(recipe, output, 2, fault, "--overwrite", options=options)
    assert ended.returncode == 0, ended.stderr
    assert "resuming" not in ended.stderr
    assert "finished: " in ended.stderr
    assert not list(output.glob("step-*/mark"))


def test_all_refuse_a_step_that_is_not_finite_on_one(recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    ended = soak.launch(recipe, output, 2, Fault("nan", 8, rank=1))
    assert ended.returncode == 1
    (error,) = errors(ended)
    assert "loss nan and gradient norm nan in stage 2 (finetune), step 8; nothing was updated" in error
    assert steps(output) == list(range(1, 8))
    assert (output / "non-finite" / "step-000008" / "batch.safetensors").exists()
    assert set(exit_codes(ended)) == {"1"}

    again = tmp_path / "again"
    ended = soak.launch(recipe, again, 2, Fault("nan", 8, rank=1), options=("--max-restarts", "2"))
    assert (ended.returncode, len(errors(ended))) == (1, 1)  # ranks that start again come to the same
    assert steps(again) == list(range(1, 8))


def test_saves_that_were_killed_met_a_full_disk_or_were_damaged_are_not_taken_for_any(
    recipe: Path, wanted: dict, tmp_path: Path
) -> None:
    """One after the other, and after each the run goes on."""
    output = tmp_path / "run"
    ended = soak.launch(recipe, output, 2, Fault("kill in save", 10))
    assert set(exit_codes(ended)) == {"-9"}
    assert list(output.glob(".writing-*"))
    assert saves(output) == ["step-000005", "step-000006"]

    for rank in (0, 1):
        ended = soak.launch(recipe, output, 2, Fault("full disk", 10, rank=rank), "--resume")
        assert ended.returncode == 1
        (error,) = errors(ended)
        assert "cannot write" in error
        assert "No space left on device" in error
        assert saves(output) == ["step-000005", "step-000006"]
        assert not list(output.glob(".writing-*"))

    weights = next((output / "step-000006").glob("model*.safetensors"))
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size - 1)
    ended = soak.launch(recipe, output, 2, None, "--resume")
    assert ended.returncode == 0, ended.stderr
    assert "checkpoint step-000006 is damaged" in ended.stderr
    assert "resuming from step-000005" in ended.stderr
    assert soak.bits(output) == wanted


@pytest.mark.parametrize("kind", ["term", "usr1"])
def test_one_of_four_that_is_asked_to_stop_stops_all_and_stays_stopped(kind: str, recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    ended = soak.launch(recipe, output, 4, Fault(kind, 8, rank=3), options=("--max-restarts", "1"))
    assert ended.returncode == 1  # torchrun's own, whatever its processes'
    assert errors(ended) == [
        "error: stopped after step 8 with everything saved; go on with --resume",
        f"error: {output} was asked to stop, so that it is not started again; launch it anew to go on",
    ]
    assert "75" in exit_codes(ended)
    assert (output / "stopped").exists()
    assert steps(output) == list(range(1, 9))
    ended = soak.launch(recipe, output, 2, None, "--resume")  # on fewer
    assert ended.returncode == 0, ended.stderr
    assert steps(output) == list(range(1, STEPS + 1))
    assert not (output / "stopped").exists()


def test_one_that_is_asked_after_the_sums_of_a_step_stops_all_after_the_next(recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    ended = soak.launch(recipe, output, 2, Fault("term after sums", 7, rank=1))
    assert errors(ended) == ["error: stopped after step 8 with everything saved; go on with --resume"]
    assert steps(output) == list(range(1, 9))
    assert saves(output)[-1] == "step-000008"

    ended = soak.launch(recipe, output, 2, Fault("term after sums", STEPS, rank=1), "--resume")
    assert ended.returncode == 0, ended.stderr  # there was no next
    assert steps(output) == list(range(1, STEPS + 1))


@pytest.mark.parametrize("signal", ["SIGUSR1", "SIGHUP", "SIGQUIT"])
def test_a_signal_to_torchrun_is_one_to_all_ranks(signal: str, tmp_path: Path) -> None:
    output, fault = tmp_path / "run", Fault(f"{signal} to torchrun", 3, rank=1)
    options = ("--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "--max-restarts", "1")
    ended = soak.launch(soak.prepare(tmp_path, 400), output, 2, fault, options=options)
    assert ended.returncode == 1
    last = steps(output)[-1]
    assert errors(ended) == [f"error: stopped after step {last} with everything saved; go on with --resume"]
    assert last < 400
    assert saves(output)[-1] == f"step-{last:06d}"
    assert (output / "stopped").exists()


def test_of_two_launches_into_one_directory_one_is_refused(
    recipe: Path, shared: Path, wanted: dict, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    script = ["-m", "supra_cli", "uptrain", "--recipe", str(recipe), "--output", str(output)]
    launches = [start(2, script, "--max-restarts", "1", cache=shared / "cache") for _ in range(2)]
    both = [finish(process) for process in launches]
    winner, refused = sorted(both, key=lambda ended: ended.returncode)
    assert (winner.returncode, refused.returncode) == (0, 1), [ended.stderr for ended in both]
    (error,) = errors(refused)  # not again by those that torchrun started again, nor did they go on
    assert "another run is writing to" in error or "is not empty" in error
    assert "2" in exit_codes(refused)
    assert soak.bits(output) == wanted


def test_two_nodes_meet_by_rendezvous(recipe: Path, shared: Path, wanted: dict, tmp_path: Path) -> None:
    """Two agents on this machine, of one rank each; one of the ranks is killed, and both agents start theirs again."""
    output = tmp_path / "run"
    meeting = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", "meeting", "--max-restarts", "1"]
    fault = Fault("kill", 8, rank=1)._asdict()
    script = [soak.faulty.__file__, json.dumps(fault)]
    script += ["uptrain", "--recipe", str(recipe), "--output", str(output)]
    place = ["--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    agents = [start(1, script, *meeting, *place, cache=shared / "cache") for _ in range(2)]
    both = [finish(agent) for agent in agents]
    assert [ended.returncode for ended in both] == [0, 0], [ended.stderr for ended in both]
    assert sorted(line for ended in both for line in errors(ended)) == [MISSED]
    assert any("resuming from step-000006" in ended.stderr for ended in both)
    assert soak.bits(output) == wanted


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def test_soak(tmp_path: Path) -> None:
    """`make soak` with three faults."""
    recipe = soak.prepare(tmp_path, 24)
    soak.disturbed(recipe, tmp_path / "undisturbed", 3, [])
    faults = [Fault("kill in save", 5, rank=1), Fault("usr1", 12, rank=2), Fault("truncated", 17, rank=0)]
    soak.disturbed(recipe, tmp_path / "disturbed", 3, faults)
    assert soak.bits(tmp_path / "disturbed") == soak.bits(tmp_path / "undisturbed")
    assert steps(tmp_path / "disturbed") == list(range(1, 25))
