"""Directories that are whole or not there."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from supra_cli.core.checkpoint import atomic_directory
from supra_cli.core.errors import SupraError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Something that may be overwritten."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("old")
    return path


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_block_that_ends_well_takes_the_place_of_what_was_there(model: Path) -> None:
    with atomic_directory(model, overwrite=True) as directory:
        (directory / "config.json").write_text("new")
    assert contents(model.parent) == {"model/config.json": "new"}


def test_a_file_that_cannot_be_read_is_not_called_unwritable(model: Path) -> None:
    missing = model.parent / "missing.json"
    with (
        pytest.raises(SupraError, match=f"^cannot read {missing} .* restore it$"),
        atomic_directory(model, overwrite=True) as directory,
    ):
        shutil.copyfile(missing, directory / "config.json")
    assert contents(model.parent) == {"model/config.json": "old"}


@pytest.mark.parametrize("named", ["model/half", "source", None])
def test_a_full_disk_is_never_called_unreadable(named: str | None, model: Path) -> None:
    """A copy that finds the disk full names the file that it reads."""
    full = OSError(errno.ENOSPC, "No space left on device", named and str(model.parent / named))
    with (
        pytest.raises(SupraError, match=f"^cannot write {model} .* make room"),
        atomic_directory(model, overwrite=True),
    ):
        raise full
    assert contents(model.parent) == {"model/config.json": "old"}


def test_what_cannot_be_replaced_stays(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError(errno.EIO, "Input/output error", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(SupraError, match="cannot write"), atomic_directory(model, overwrite=True) as directory:
        (directory / "config.json").write_text("new")
    assert contents(model.parent) == {"model/config.json": "old"}
