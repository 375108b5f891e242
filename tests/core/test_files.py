"""Directories that are whole or not there."""

from __future__ import annotations

import errno
import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from supra_cli.core import files
from supra_cli.core.checkpoint import atomic_directory
from supra_cli.core.errors import SupraError, UsageError

OLD = '{"model_type": "llama"}'
"""As much as tells a model."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Something that may be overwritten."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(OLD)
    return path


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_block_that_ends_well_takes_the_place_of_what_was_there(model: Path) -> None:
    with atomic_directory(model, overwrite=True) as directory:
        (directory / "config.json").write_text("new")
    assert contents(model.parent) == {"model/config.json": "new"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_has_appeared_meanwhile_is_kept(tmp_path: Path, overwrite: bool) -> None:
    told = "holds files but no model" if overwrite else "is not empty"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious").write_text("kept")
    with pytest.raises(UsageError, match=told), atomic_directory(tmp_path / "out", overwrite=overwrite):
        (tmp_path / "other").rename(tmp_path / "out")
    assert contents(tmp_path) == {"out/precious": "kept"}


def test_a_file_that_cannot_be_read_is_not_called_unwritable(model: Path) -> None:
    missing = model.parent / "missing.json"
    with (
        pytest.raises(SupraError, match=f"^cannot read {missing} .* restore it$"),
        atomic_directory(model, overwrite=True) as directory,
    ):
        shutil.copyfile(missing, directory / "config.json")
    assert contents(model.parent) == {"model/config.json": OLD}


@pytest.mark.parametrize("named", ["model/half", "source", None])
def test_a_full_disk_is_never_called_unreadable(named: str | None, model: Path) -> None:
    """A copy that finds the disk full names the file that it reads."""
    full = OSError(errno.ENOSPC, "No space left on device", named and str(model.parent / named))
    with (
        pytest.raises(SupraError, match=f"^cannot write {model} .* make room"),
        atomic_directory(model, overwrite=True),
    ):
        raise full
    assert contents(model.parent) == {"model/config.json": OLD}


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_where_writing_is_forbidden_room_is_not_asked_for(code: int, model: Path) -> None:
    with (
        pytest.raises(SupraError, match=f"^cannot write {model} .*; choose another output$"),
        atomic_directory(model, overwrite=True),
    ):
        raise OSError(code, os.strerror(code), str(model.parent))


def test_what_cannot_be_replaced_stays(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError(errno.EIO, "Input/output error", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(SupraError, match="cannot write"), atomic_directory(model, overwrite=True) as directory:
        (directory / "config.json").write_text("new")
    assert contents(model.parent) == {"model/config.json": OLD}


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_a_link_names_is_written_there(overwrite: bool, model: Path) -> None:
    there = model.parent / "larger" / "disk"
    link = model.parent / "link"
    link.symlink_to(model if overwrite else there)
    with atomic_directory(link, overwrite=overwrite) as directory:
        (directory / "config.json").write_text("new")
    link.unlink()
    assert contents(model.parent) == (
        {"model/config.json": "new"} if overwrite else {"model/config.json": OLD, "larger/disk/config.json": "new"}
    )


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_folders_that_were_made_for_an_output_go_with_it(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises((SupraError, KeyboardInterrupt)), atomic_directory(tmp_path / "a" / "b" / "model"):
        raise error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("there", [True, False])
def test_a_file_that_cannot_be_written_whole_stays_as_it_was(there: bool, tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "scores.json"
    if there:
        file.write_text(OLD)

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{file}'"):
        files.write_json(file, {"new": 1})
    assert contents(tmp_path) == ({"scores.json": OLD} if there else {})


def test_a_file_is_written_where_its_link_leads(tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to(tmp_path / "there.json")
    for _ in range(2):
        files.write_json(tmp_path / "link.json", [])
    assert (tmp_path / "link.json").is_symlink()
    assert contents(tmp_path) == {"link.json": "[]\n", "there.json": "[]\n"}


def test_what_a_process_has_open_is_not_replaced(tmp_path: Path) -> None:
    """As `-o /dev/stdout` is, into a pipe or a file."""
    reading, writing = os.pipe()
    files.write_json(Path(f"/dev/fd/{writing}"), [])
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert pipe.read() == "[]\n"
    with open(tmp_path / "shown", "w") as shown:
        files.write_json(Path(f"/dev/fd/{shown.fileno()}"), [])
        assert os.fstat(shown.fileno()).st_ino == (tmp_path / "shown").stat().st_ino
    assert contents(tmp_path) == {"shown": "[]\n"}


def test_a_file_keeps_its_mode_and_any_name_can_be_written(tmp_path: Path) -> None:
    file = tmp_path / ("x" * 255)
    file.write_text("old")
    file.chmod(0o600)
    files.write_json(file, [])
    assert (file.stat().st_mode & 0o777, file.read_text()) == (0o600, "[]\n")


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EACCES])
def test_a_file_that_cannot_be_replaced_is_written_in_place(code: int, tmp_path: Path, monkeypatch) -> None:
    """One that is mounted by itself, or whose folder may not be written."""

    def refused(self: Path, target: Path) -> None:
        raise OSError(code, os.strerror(code), str(self))

    monkeypatch.setattr(Path, "replace", refused)
    (tmp_path / "scores.json").write_text("old")
    files.write_json(tmp_path / "scores.json", [])
    assert contents(tmp_path) == {"scores.json": "[]\n"}
    with pytest.raises(OSError, match=r"new\.json"):
        files.write_json(tmp_path / "new.json", [])


def ended() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(model: Path) -> None:
    machine, living = platform.node(), os.getppid()
    names = [f".model.{ended()}.{machine}.tmp", f".model.{ended()}.{machine}.old"]
    others = [f".model.{living}.{machine}.tmp", f".model.{ended()}.elsewhere.tmp", f".model.x.{machine}.tmp"]
    for name in (*names, *others, ".model.notes"):
        (model.parent / name).mkdir()
    with atomic_directory(model, overwrite=True) as directory:
        (directory / "config.json").write_text("new")
    assert {path.name for path in model.parent.iterdir()} == {"model", *others, ".model.notes"}


def test_a_model_that_was_moved_out_of_the_way_by_a_killed_process_is_put_back(model: Path) -> None:
    model.rename(model.with_name(f".model.{ended()}.{platform.node()}.old"))
    with pytest.raises(UsageError, match="is not empty"), atomic_directory(model):
        pass
    assert contents(model.parent) == {"model/config.json": OLD}
