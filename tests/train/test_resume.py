"""A run that was stopped, killed or damaged and then resumed ends with the bits of one that was not."""

from __future__ import annotations

import errno
import json
import os
import pty
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import pytest
import tomli_w
import torch
from running import assert_same, run
from safetensors.torch import load_file, save_file

from supra_cli.__main__ import main
from supra_cli.core import checkpoint, parallel
from supra_cli.core import recipe as recipes
from supra_cli.core.checkpoint.files import sha256
from supra_cli.core.data import streamed
from supra_cli.core.errors import SupraError, UsageError
from supra_cli.core.lookup import lookup
from supra_cli.core.train import loop
from supra_cli.core.train.events import Finished, Note, Saved, Step
from supra_cli.core.train.run import MARKER, RunDirectory

STEPS = 12


def weights(output: Path) -> dict[str, bytes]:
    """Every file of weights and moments of the last checkpoint, byte for byte."""
    last = output / "last"
    files = [*last.glob("*.safetensors"), last / "training" / "optimizer.safetensors"]
    return {file.name: file.read_bytes() for file in files}


@pytest.fixture
def whole(recipe_file: Callable[..., Path], tmp_path: Path) -> dict[str, bytes]:
    run(recipe_file(), tmp_path / "whole")
    return weights(tmp_path / "whole")


@pytest.mark.parametrize("stop_after", [1, 3, 4, 5, 8, 11], ids=lambda step: f"after step {step}")
def test_a_stopped_run_resumes_to_the_same_bits(
    stop_after: int, device: str, recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    run(recipe_file(), tmp_path / "whole", device=device)
    output = tmp_path / "stopped"
    events = run(recipe_file(), output, stop_after=stop_after, device=device)
    assert isinstance(events[-1], Saved)
    assert max(event.step for event in events if isinstance(event, Step)) == stop_after
    run(recipe_file(), output, resume=True, device=device)
    assert_same(weights(output), weights(tmp_path / "whole"), device)


def test_windows_are_dropped_less_from_step_to_step_and_the_same_ones_after_a_resume(
    recipe_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, take = [], loop.take

    def spy(stage, student, *given):
        told.extend({layer.mixer.progress for _, layer in student.swapped_layers()})
        return take(stage, student, *given)

    monkeypatch.setattr(loop, "take", spy)
    mixer = {"name": "lolcats", "window": 4, "sinks": 1}
    recipe = recipe_file(mixer={**mixer, "window_dropout": 0.8})
    run(recipe, tmp_path / "whole")
    assert told == [0, 0.25, 0.5, 0.75] + [1] * 8  # attention transfer, then the other stages
    run(recipe, tmp_path / "stopped", stop_after=6)
    run(recipe, tmp_path / "stopped", resume=True)
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")
    run(recipe_file(mixer=mixer), tmp_path / "undropped")
    assert weights(tmp_path / "undropped") != weights(tmp_path / "whole")


def test_two_runs_of_one_recipe_give_the_same_bits(
    whole: dict[str, bytes], recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    run(recipe_file(), tmp_path / "again")
    assert weights(tmp_path / "again") == whole


def test_another_seed_gives_other_bits(
    whole: dict[str, bytes], recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    run(recipe_file(seed=1), tmp_path / "other")
    assert weights(tmp_path / "other") != whole


@pytest.mark.parametrize("stop_after", [3, 5], ids=["base linked", "base written"])
def test_bfloat16_checkpoints_keep_their_masters(
    stop_after: int, device: str, recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = recipe_file(checkpoint={"every_steps": 3, "keep_last": 2, "dtype": "bfloat16"})
    run(recipe, tmp_path / "whole", device=device)
    run(recipe, tmp_path / "stopped", stop_after=stop_after, device=device)
    run(recipe, tmp_path / "stopped", resume=True, device=device)
    assert_same(weights(tmp_path / "stopped"), weights(tmp_path / "whole"), device)
    masters = load_file(tmp_path / "stopped" / "last" / "training" / "masters.safetensors")
    assert any(not value.equal(value.bfloat16().float()) for value in masters.values())


def test_a_base_that_cannot_be_linked_is_kept_in_float32_too(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    """Others save base and mixers in one file: what attention transfer does not move is then written, and rounded."""
    run(recipe_file(), tmp_path / "first", stop_after=1)
    model = tmp_path / "model"
    shutil.copytree(tmp_path / "first" / "converted", model)
    base = checkpoint.read_provenance(model)["base"]
    for file in (*model.glob("*.safetensors"), model / "model.safetensors.index.json"):
        file.unlink()
    checkpoint.load(tmp_path / "first" / "converted").save_pretrained(model)
    (model / "supra.json").write_text(json.dumps({"base": base}))
    recipe = recipe_file(checkpoint={"every_steps": 3, "keep_last": 2, "dtype": "bfloat16"})
    run(recipe, tmp_path / "whole", model=model)
    run(recipe, tmp_path / "stopped", model=model, stop_after=2)
    run(recipe, tmp_path / "stopped", model=model, resume=True)
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")


@pytest.mark.parametrize(
    "file", ["model-mixers.safetensors", "training/optimizer.safetensors", "training/state.json", "config.json"]
)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    file: str, whole: dict[str, bytes], recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "damaged"
    run(recipe_file(), output, stop_after=5)
    newest = output / "step-000005"
    if not (newest / file).exists():
        file = "model-base.safetensors" if (newest / "model-base.safetensors").exists() else "model.safetensors"
    damaged = newest / file
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    events = run(recipe_file(), output, resume=True)
    notes = [event.text for event in events if isinstance(event, Note)]
    assert any("step-000005 is damaged" in note for note in notes)
    assert "resuming from step-000004" in notes
    assert weights(output) == whole


def test_a_newest_checkpoint_that_the_disk_does_not_give_back_falls_back_too(
    whole: dict[str, bytes], recipe_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "unreadable"
    run(recipe_file(), output, stop_after=5)
    verify = checkpoint.verify

    def reading(path: Path) -> None:
        if path.name == "step-000005":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path / "model.safetensors"))
        verify(path)

    monkeypatch.setattr(checkpoint, "verify", reading)
    notes = [event.text for event in run(recipe_file(), output, resume=True) if isinstance(event, Note)]
    assert "step-000005 is damaged ([Errno 5]" in notes[0]
    assert weights(output) == whole


def test_a_state_of_an_older_version_is_told_as_that_and_not_as_damage(
    recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    run(recipe_file(), tmp_path / "run", stop_after=2)
    (state,) = (tmp_path / "run").glob("step-*/training/state.json")
    kept = json.loads(state.read_text())
    del kept["same"]
    state.write_text(json.dumps(kept))
    with pytest.raises(UsageError, match="older supra"):
        run(recipe_file(), tmp_path / "run", resume=True)
    assert state.exists()


def test_a_damaged_checkpoint_of_a_later_step_costs_the_newest_nothing(tmp_path: Path) -> None:
    """Stopped at 150 after falling back from 200 to 100."""
    directory = RunDirectory(tmp_path)
    for step in (50, 100, 150, 200):
        directory.step_path(step).mkdir()
        (directory.step_path(step) / MARKER).touch()
    directory.link("best", directory.step_path(100))
    directory.link("last", directory.step_path(150))
    directory.prune(keep_last=1)
    assert [path.name for path in directory.complete()] == ["step-000100", "step-000150", "step-000200"]


def of_a_run(path: Path) -> RunDirectory:
    """Three complete checkpoints, the newest of them the last and the best."""
    directory = RunDirectory(path)
    for step in (1, 2, 3):
        directory.step_path(step).mkdir(parents=True)
        (directory.step_path(step) / MARKER).touch()
    directory.link("best", directory.step_path(3))
    directory.link("last", directory.step_path(3))
    return directory


def test_a_clearing_that_is_cut_short_leaves_the_newest_as_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run is not gone through again, so nothing would make its link anew."""
    directory = of_a_run(tmp_path)

    def cut_short(path: Path, **_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", cut_short)
    with pytest.raises(KeyboardInterrupt):
        directory.clear()
    assert (tmp_path / "last").resolve() == directory.complete()[-1] == directory.step_path(3)


def test_clearing_takes_only_what_a_run_writes(tmp_path: Path) -> None:
    """A checkpoint moved elsewhere stays there, whole; only its link goes."""
    directory, moved = of_a_run(tmp_path / "run"), tmp_path / "moved"
    directory.step_path(2).rename(moved)
    directory.step_path(2).symlink_to(moved)
    (tmp_path / "run" / ".notes.tmp").touch()
    (tmp_path / "run" / "step-3-notes").mkdir()
    (tmp_path / "run" / ".step-000003.17.tmp").mkdir()
    directory.sweep()
    directory.clear()
    assert (moved / MARKER).exists()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".notes.tmp", "step-3-notes"}


def test_when_nothing_can_be_read_the_error_says_so(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    output = tmp_path / "damaged"
    run(recipe_file(), output, stop_after=5)
    for path in output.glob("step-*/training/state.json"):
        path.write_text("{")
    with pytest.raises(SupraError, match=r"no checkpoint in .* can be read"):
        run(recipe_file(), output, resume=True)


def test_resuming_before_the_first_checkpoint_starts_over_and_says_so(
    whole: dict[str, bytes], recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "early"
    events = loop.uptrain(recipes.load(recipe_file(), lookup=lookup), output)
    assert next(event for event in events if isinstance(event, Step)).step == 1
    events.close()
    notes = [event.text for event in run(recipe_file(), output, resume=True) if isinstance(event, Note)]
    assert any("no complete checkpoint" in note for note in notes)
    assert weights(output) == whole


def test_resuming_a_finished_run_does_nothing(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    output = tmp_path / "finished"
    run(recipe_file(), output)
    before = weights(output)
    events = run(recipe_file(), output, resume=True)
    assert [type(event) for event in events] == [Note, Note]
    assert weights(output) == before


def test_a_kill_between_a_save_and_its_links_leaves_none_behind(
    recipe_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, output = recipe_file(), tmp_path / "run"
    original = RunDirectory.link

    def link(self: RunDirectory, name: str, target: Path) -> None:
        if target.name == "step-000012":
            raise KeyboardInterrupt
        original(self, name, target)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "link", link)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, output)
    assert (output / "last").resolve().name != "step-000012"
    best = json.loads((output / "step-000012" / "training" / "state.json").read_text())["counters"]["best_step"]
    run(recipe, output, resume=True)
    assert (output / "last").resolve().name == "step-000012"
    assert (output / "best").resolve().name == f"step-{best:06d}"


def test_a_changed_recipe_is_refused(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    output = tmp_path / "changed"
    run(recipe_file(), output, stop_after=3)
    with pytest.raises(UsageError, match=r"the recipe is not the one .* differs in seed"):
        run(recipe_file(seed=5), output, resume=True)


def test_a_base_whose_tokenizer_is_told_to_cut_makes_a_run_that_goes_on(
    base: Path, recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    """Encoding takes that out of the tokenizer: the second source would meet another than the first."""
    shutil.copytree(base, tmp_path / "base")
    words = json.loads((tmp_path / "base" / "tokenizer.json").read_text())
    words["truncation"] = {"max_length": 8, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    (tmp_path / "base" / "tokenizer.json").write_text(json.dumps(words))
    recipe = recipe_file(base=str(tmp_path / "base"))
    run(recipe, tmp_path / "run", stop_after=1)
    assert isinstance(run(recipe, tmp_path / "run", resume=True)[-1], Finished)


@pytest.mark.parametrize("known", [True, False], ids=["its commit saved", "as an older supra saved it"])
def test_held_out_text_on_the_hub_is_that_of_the_run_whatever_was_pushed_since(
    known: bool, recipe_file: Callable[..., Path], raw_recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = ["c1"]

    def push(commit: str, text: str) -> None:
        (tmp_path / f"{commit}.jsonl").write_text(json.dumps({"text": text * 500}))
        head[0] = commit

    def dataset(source: object, split: str, commit: str | None) -> tuple[Any, str]:
        commit = commit or head[0]
        files = str(tmp_path / f"{commit}.jsonl")
        return datasets.load_dataset("json", data_files=files, split="train", streaming=True), commit

    def state(**changes: Any) -> dict[str, Any]:
        (file,) = (tmp_path / "run").glob("step-*/training/state.json")
        saved = json.loads(file.read_text())
        saved["same"] = {key: value for key, value in (saved["same"] | changes).items() if value is not None}
        file.write_text(json.dumps(saved))
        return saved["same"]

    monkeypatch.setattr(streamed, "_dataset", dataset)
    push("c1", "one two three four five ")
    recipe = recipe_file(data=raw_recipe["data"] | {"validation": [{"path": "org/set"}]})
    run(recipe, tmp_path / "run", stop_after=1)
    assert state()["held_out_commits"] == {"0": "c1"}
    if not known:
        state(held_out_commits=None)
        run(recipe, tmp_path / "run", resume=True, stop_after=2)
    push("c2", "six seven eight nine ten ")
    assert isinstance(run(recipe, tmp_path / "run", resume=True)[-1], Finished)


PROJECT = {
    "base": "./models/base",
    "mixer": {"name": "supra"},
    "data": {
        "seq_len": 32,
        "sources": [{"path": "text/own.txt"}],
        "validation": [{"path": "text/held-out.txt"}],
        "validation_tokens": 128,
    },
    "checkpoint": {"every_steps": 1, "keep_last": 2},
}


@pytest.fixture
def project(base: Path, text_file: Path, tmp_path: Path) -> Path:
    """A directory with a base, a teacher, text and a recipe that names them by where they lie beside it."""
    folder, teacher = tmp_path / "before", {"kind": "distill", "teacher": "./models/teacher"}
    shutil.copytree(base, folder / "models" / "base")
    shutil.copytree(base, folder / "models" / "teacher")
    nudge(folder / "models" / "teacher")
    (folder / "text").mkdir()
    text = text_file.read_text()
    (folder / "text" / "own.txt").write_text(text[:20_000])
    (folder / "text" / "held-out.txt").write_text(text[20_000:40_000])
    stage = {"tokens": 128, "batch_tokens": 64, "lr": 1e-3}
    stages = [{"kind": "transfer"}, {"kind": "distill"}, teacher, {"kind": "finetune"}]
    raw = PROJECT | {"stages": [kind | stage for kind in stages]}
    (folder / "recipe.toml").write_text(tomli_w.dumps(raw))
    return folder


def nudge(model: Path) -> None:
    """Other weights under the same names."""
    weights = load_file(model / "model.safetensors")
    save_file({name: value + 0.01 for name, value in weights.items()}, model / "model.safetensors", {"format": "pt"})


def move(project: Path) -> Path:
    """`mv before after`."""
    return project.rename(project.with_name("after"))


@pytest.mark.parametrize("stop_after", [1, 3, 5, 7], ids=["transfer", "distill", "other teacher", "finetune"])
@pytest.mark.parametrize("converted", [False, True], ids=["from its base", "from --model"])
def test_a_project_that_was_moved_goes_on_to_the_same_bits(stop_after: int, converted: bool, project: Path) -> None:
    settings = {"mixer": "supra", "options": {}, "keep": "none", "seed": 0}
    if converted:
        checkpoint.convert(project / "models" / "base", project / "models" / "student", **settings)
    model = {"model": project / "models" / "student"} if converted else {}
    run(project / "recipe.toml", project / "whole", **model)
    run(project / "recipe.toml", project / "run", stop_after=stop_after, **model)
    project = move(project)
    # Where the link to it leads nowhere, a run may be told where it is, or do without.
    model = {"model": project / "models" / "student"} if converted and stop_after > 1 else {}
    run(project / "recipe.toml", project / "run", resume=True, **model)
    assert weights(project / "run") == weights(project / "whole")
    told = checkpoint.read_provenance((project / "run" / "last").resolve())
    assert told["base"] == str(project / "models" / "base")
    if model:
        assert (project / "run" / "converted").resolve() == project / "models" / "student"


CHANGES = {
    "own.txt": (
        "the data changed",
        lambda project: (project / "text" / "own.txt").write_text("six seven eight " * 500),
    ),
    "held-out.txt": (
        "held-out text",
        lambda project: (project / "text" / "held-out.txt").write_text("six seven eight " * 500),
    ),
    "base": (r"models/base \(base\) has other weights", lambda project: nudge(project / "models" / "base")),
    "teacher": (r"teacher \(stages.2.teacher\) has other", lambda project: nudge(project / "models" / "teacher")),
    "no base": ("there is no directory|holds no", lambda project: shutil.rmtree(project / "models" / "base")),
}


@pytest.mark.parametrize("moved", [False, True], ids=["in its place", "moved"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_run_stands_on_is_known_by_its_content(change: str, moved: bool, project: Path) -> None:
    run(project / "recipe.toml", project / "run", stop_after=1)
    project = move(project) if moved else project
    told, harm = CHANGES[change]
    harm(project)
    before = {path: path.stat().st_mtime_ns for path in project.rglob("*") if path.is_file()}
    with pytest.raises(SupraError, match=told):
        run(project / "recipe.toml", project / "run", resume=True)
    assert {path: path.stat().st_mtime_ns for path in project.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("step", [6, 7], ids=["where the stage ended", "in the next stage"])
def test_models_that_no_later_stage_learns_from_may_be_gone(step: int, project: Path) -> None:
    run(project / "recipe.toml", project / "run", stop_after=step)
    project = move(project)
    shutil.rmtree(project / "models")
    assert isinstance(run(project / "recipe.toml", project / "run", resume=True)[-1], Finished)


def test_another_model_than_the_run_began_with_is_refused(project: Path) -> None:
    for seed in (0, 1):
        settings = {"mixer": "supra", "options": {}, "keep": "none", "seed": seed}
        checkpoint.convert(project / "models" / "base", project / f"student-{seed}", **settings)
    run(project / "recipe.toml", project / "run", stop_after=1, model=project / "student-0")
    with pytest.raises(UsageError, match="student-1 is not the converted model that this run began with"):
        run(project / "recipe.toml", project / "run", resume=True, model=project / "student-1")


def test_a_run_goes_on_in_the_dtype_that_it_began_in(
    recipe_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(recipe_file(), tmp_path / "whole", dtype=torch.bfloat16)
    run(recipe_file(), tmp_path / "run", dtype=torch.bfloat16, stop_after=5)
    with pytest.raises(UsageError, match="computes in bfloat16, got float32; resume with --dtype bfloat16"):
        run(recipe_file(), tmp_path / "run", dtype=torch.float32, resume=True)
    run(recipe_file(), tmp_path / "run", resume=True)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_going_on_under_other_versions_is_told(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    output = tmp_path / "run"
    run(recipe_file(), output, stop_after=5)
    record = json.loads((output / "env.json").read_text())
    (output / "env.json").write_text(json.dumps(record | {"torch": "2.10.0", "threads": 8, "command": ["other"]}))
    notes = [event.text for event in run(recipe_file(), output, resume=True) if isinstance(event, Note)]
    (told,) = [note for note in notes if "other conditions" in note]
    assert f"torch 2.10.0 → {record['torch']}, threads 8 → 1" in told
    assert "command" not in told


def test_a_checkpoint_whose_removal_was_cut_off_goes_with_the_next_save(
    recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    run(recipe_file(), output, stop_after=5)
    shutil.copytree(output / "step-000005", output / "step-000001")
    (output / "step-000001" / MARKER).unlink()
    run(recipe_file(), output, resume=True)
    assert not (output / "step-000001").exists()


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("supra_cli.core.train.run.fcntl.flock", refuse)
    with (
        pytest.raises(SupraError, match=r"cannot lock .* \(Function not implemented\)"),
        RunDirectory(tmp_path / "run").locked(),
    ):
        pass
    assert not (tmp_path / "run").exists()


def test_changed_text_is_refused(recipe_file: Callable[..., Path], raw_recipe: dict, tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    text.write_text("one two three four five " * 200)
    recipe = recipe_file(data=raw_recipe["data"] | {"sources": [{"path": str(text)}]})
    run(recipe, tmp_path / "run", stop_after=3)
    text.write_text("six seven eight nine ten " * 200)
    with pytest.raises(SupraError, match="the data changed"):
        run(recipe, tmp_path / "run", resume=True)


def test_an_occupied_directory_is_refused_and_left_alone(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    output = tmp_path / "mine"
    output.mkdir()
    (output / "notes.txt").write_text("precious")
    with pytest.raises(UsageError, match="not empty"):
        run(recipe_file(), output)
    assert [path.name for path in output.iterdir()] == ["notes.txt"]
    with pytest.raises(UsageError, match="is a file"):
        run(recipe_file(), output / "notes.txt")


def test_a_second_run_in_the_same_directory_is_refused(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    parsed = recipes.load(recipe_file(), lookup=lookup)
    first = loop.uptrain(parsed, tmp_path / "run")
    next(first)
    with pytest.raises(UsageError, match="another run is writing"):
        next(loop.uptrain(parsed, tmp_path / "run", resume=True))
    first.close()


def test_metrics_have_every_step_once_after_a_resume(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    output = tmp_path / "run"
    run(recipe_file(), output, stop_after=5)
    with (output / "metrics.jsonl").open("a", errors="surrogateescape") as stream:
        stream.write('[1]\n\udcff\n{"event": "step", "step": 6, "lo')
    run(recipe_file(), output, resume=True)
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["event"] == "step"] == list(range(1, STEPS + 1))


def command(recipe: Path, output: Path, *more: str) -> list[str]:
    """On a CPU, as `run` does it where nothing is said."""
    where = ["-o", str(output), "--device", "cpu"]
    return [sys.executable, "-m", "supra_cli", "uptrain", "--recipe", str(recipe), *where, *more]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([".", "kernels"]), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_process_killed_at_a_random_moment_resumes_to_the_same_bits(
    seed: int, whole: dict[str, bytes], recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "killed"
    process = subprocess.Popen(command(recipe_file(), output), env=environment(), stderr=subprocess.DEVNULL)
    chance = random.Random(seed)
    wanted = chance.randrange(1, STEPS)
    while process.poll() is None and not _reached(output, wanted):
        time.sleep(0.005)
    time.sleep(chance.random() * 0.1)
    process.kill()
    process.wait()
    done = subprocess.run(command(recipe_file(), output, "--resume"), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert weights(output) == whole


DYING = """
import os, signal, sys
left, began = int(sys.argv.pop(1)), False

def watch(event, given):
    global left, began
    began = began or (event == "os.mkdir" and str(given[0]).endswith(".starting"))
    if began and event in ("os.mkdir", "os.rename", "os.link", "os.symlink", "os.remove", "os.rmdir"):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)
from supra_cli.__main__ import main
sys.exit(main())
"""
"""`supra`, killed before a given change to the files, counted from the first that a new run makes."""


@pytest.mark.slow
@pytest.mark.parametrize("change", [0, 7, 29, 53])
def test_a_process_killed_while_it_replaces_a_run_leaves_one_that_goes_on(
    change: int, whole: dict[str, bytes], recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    run(recipe_file(seed=1), output)
    old, stored = RunDirectory(output), (output / "recipe.toml").read_text()
    before, names = weights(output), {path.name for path in output.iterdir()}
    again = [*command(recipe_file(), output), "--overwrite"]
    dying = [sys.executable, "-c", DYING, str(change), *again[3:]]
    assert subprocess.run(dying, env=environment(), capture_output=True).returncode == -signal.SIGKILL
    for path in old.complete():
        checkpoint.verify(path)
        assert (output / "recipe.toml").read_text() == stored
    if (output / "last").exists():
        assert weights(output) == before
        run(recipe_file(seed=1), output, resume=True)
        assert weights(output) == before
    run(recipe_file(), output, overwrite=True)
    assert weights(output) == whole
    assert {path.name for path in output.iterdir()} == names


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1], ids=lambda n: n.name)
def test_a_signal_saves_everything_and_exits_75(
    number: signal.Signals, whole: dict[str, bytes], recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "stopped"
    process = subprocess.Popen(command(recipe_file(), output), env=environment(), stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not _reached(output, 2):
        time.sleep(0.005)
    process.send_signal(number)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 75, told
    assert "--resume" in told
    assert "Traceback" not in told
    run(recipe_file(), output, resume=True)
    assert weights(output) == whole


@pytest.mark.slow
def test_a_terminal_that_is_gone_takes_nothing_with_it(
    whole: dict[str, bytes], recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    output, (ours, terminal) = tmp_path / "left", pty.openpty()
    process = subprocess.Popen(command(recipe_file(), output), env=environment(), stdout=terminal, stderr=terminal)
    os.close(terminal)
    os.set_blocking(ours, False)
    while process.poll() is None and not _reached(output, 2):
        time.sleep(0.005)
        with suppress(BlockingIOError):
            os.read(ours, 100_000)
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(120) == 75
    run(recipe_file(), output, resume=True)
    assert weights(output) == whole


@pytest.mark.slow
@pytest.mark.parametrize("file", ["model-base.safetensors", "training/optimizer.safetensors", "training/state.json"])
def test_a_disk_that_is_full_while_saving_costs_nothing_but_the_save(
    file: str, whole: dict[str, bytes], recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    """Full: no file may grow to the size of the one that cannot be written."""
    output = tmp_path / "full"
    run(recipe_file(), output, stop_after=5)
    room = (output / "step-000005" / file).stat().st_size - 1
    failed = subprocess.run(
        command(recipe_file(), output, "--resume"),
        env=environment(),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
    )
    assert failed.returncode == 1, failed.stderr
    told = failed.stderr.strip().splitlines()[-1]
    assert told.startswith("error: ")
    assert "internal error" not in told
    assert (output / "last").resolve().name == "step-000005"
    assert not list(output.glob(".writing*"))
    run(recipe_file(), output, resume=True)
    assert weights(output) == whole


def test_a_stop_that_is_asked_for_while_a_run_starts_is_heeded(
    recipe_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    joined = parallel.joined

    def slowly(device: str) -> Any:
        signal.raise_signal(signal.SIGUSR1)
        return joined(device)

    monkeypatch.setattr(parallel, "joined", slowly)
    assert main(["uptrain", "--recipe", str(recipe_file()), "-o", str(tmp_path / "run"), "--device", "cpu"]) == 75
    assert "stopped after step 1 with everything saved" in capfd.readouterr().err
    assert (tmp_path / "run" / "step-000001").is_dir()


def _reached(output: Path, step: int) -> bool:
    metrics = output / "metrics.jsonl"
    return metrics.exists() and f'"step": {step},' in metrics.read_text()


def test_a_checkpoint_that_holds_random_state_is_gone_on_from(recipe_file, whole: dict[str, bytes], tmp_path) -> None:
    """As supra wrote it when it knew one device only: beside the moments the generators' states, under their hash."""
    output = tmp_path / "older"
    run(recipe_file(), output, stop_after=5)
    training = output / "last" / "training"
    save_file({"torch": torch.get_rng_state(), "numpy": torch.zeros(624)}, training / "random.safetensors")
    state = json.loads((training / "state.json").read_text())
    state["files"]["random.safetensors"] = sha256(training / "random.safetensors")
    (training / "state.json").write_text(json.dumps(state))
    run(recipe_file(), output, resume=True)
    assert weights(output) == whole
