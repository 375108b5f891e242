"""A run directory: what is in it, which checkpoint is the newest complete one, and who may write.

- `recipe.toml`, `env.json`, `metrics.jsonl`: the resolved recipe, versions and hardware, one line a step
- `tokenizer/`: what belongs beside every checkpoint's weights
- `converted/`: the student before the first step: what this run made of its base, or a link to `--model`
- `step-000500/`: a loadable model directory, with `training/` for resuming and the marker COMPLETE
- `last`, `best`: links to checkpoints
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from supra_cli.core.errors import Stopped, SupraError, UsageError
from supra_cli.core.files import dumps, read_json, sync, sync_tree, write
from supra_cli.core.parallel import ALONE, World

MARKER = "COMPLETE"
STOPPED = "stopped"
"""A file that says that the run was asked to stop: torchrun takes that for a failure, and may start it again."""

_FILES, _FOLDERS = ("recipe.toml", "env.json", "metrics.jsonl"), ("tokenizer", "converted", "tensorboard")
_STARTING = ".starting"
_NOTHING_LOST = {".lock", "non-finite", STOPPED, _STARTING}


class RunDirectory:
    def __init__(self, path: Path):
        self.path = Path(path)

    def check_free(self, replace: bool) -> None:
        """Raise a UsageError unless a run may begin here: nothing is lost, or with `replace` nothing but a run's.

        What a run, known by its env.json, has before a checkpoint is not lost.
        """
        if self.path.is_file():
            raise UsageError(f"{self.path} is a file, expected a directory to write; choose another --output")
        names = {entry.name for entry in self.path.iterdir()} if self.path.exists() else set()
        if not names - _NOTHING_LOST.union(_FILES + _FOLDERS if "env.json" in names else ()):
            return
        if not replace:
            raise UsageError(
                f"{self.path} is not empty; go on with --resume, start over with --overwrite, or choose another -o"
            )
        if "env.json" not in names and not self.complete():
            raise UsageError(f"{self.path} holds files but no run, so it is left alone; choose another -o")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory against a second run; the lock goes with the process, however it ends.

        A block that writes nothing leaves nothing: neither the lock nor the folders that were made for it.
        """
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, FileNotFoundError, NotADirectoryError) as error:  # below a link to nothing, or a file
            raise UsageError(f"cannot make {self.path} ({error.strerror}); choose another --output") from error
        lock = self.path / ".lock"
        with lock.open("a") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = os.path.samestat(os.fstat(handle.fileno()), lock.stat())  # not one that its run just took away
            except (BlockingIOError, PermissionError, FileNotFoundError):  # some NFS refuse what another holds
                held = False
            except OSError as error:
                if made:  # and so nobody else's
                    _unlock(lock, made)
                raise SupraError(
                    f"cannot lock {self.path} against a second run ({error.strerror}): its file system takes no locks; "
                    "mount it so that it does (Lustre and NFS: with flock), or choose another --output"
                ) from error
            if not held:
                raise UsageError(f"another run is writing to {self.path}; wait for it or choose another --output")
            try:
                yield
            finally:
                _unlock(lock, made)

    @property
    def tokenizer(self) -> Path:
        """The folder of what belongs beside every checkpoint's weights."""
        return self.path / "tokenizer"

    def step_path(self, step: int) -> Path:
        return self.path / f"step-{step:06d}"

    def complete(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return [path for path in self._checkpoints() if (path / MARKER).exists()]

    def _checkpoints(self) -> list[Path]:
        """Complete or not, links to moved ones among them, oldest first."""
        folders = (path for path in self.path.glob("step-*") if path.is_dir())
        found = [path for path in folders if path.name.removeprefix("step-").isdecimal()]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))

    @contextmanager
    def starting(self) -> Iterator[RunDirectory]:
        """A run directory to begin in; what is in it takes the place of the run that is here when the block ends well,
        and goes when it does not.

        Killed before that end, the old run is whole; killed after it, what is left of either is one that starts anew.
        """
        self.sweep()
        beside = RunDirectory(self.path / _STARTING)
        try:
            beside.path.mkdir()
            yield beside
            sync_tree(beside.path)
            self.clear()
            # First env.json, by which `check_free` knows whose the rest is.
            for name in sorted(os.listdir(beside.path), key=lambda name: name != "env.json"):
                (beside.path / name).rename(self.path / name)
            sync(self.path)
        finally:
            shutil.rmtree(beside.path, ignore_errors=True)

    @contextmanager
    def writing(self, step: int, world: World = ALONE) -> Iterator[Path]:
        """A folder that all ranks fill; it becomes `step-N`, marked complete and durable, when the block ends well on
        each of them, and goes when it does not. What the block writes below it, it syncs itself.
        """
        beside, target = self.path / f".writing-{step:06d}", self.step_path(step)
        try:
            if world.leads:
                self.sweep()
                beside.mkdir()
            world.barrier()
            yield beside
            world.barrier()
            if world.leads:
                sync_tree(beside)
                (beside / MARKER).touch()
                sync(beside)
                if os.path.lexists(target):
                    _remove(target)
                beside.rename(target)
                sync(self.path)
            world.barrier()
        finally:
            if world.leads:
                shutil.rmtree(beside, ignore_errors=True)

    def honour_stop(self, world: World, again: bool) -> None:
        """Raise Stopped where torchrun starts processes `again` that were asked to stop; a launch anew goes on."""
        asked = self.path / STOPPED
        if again and world.shared(asked.exists()):
            raise Stopped(f"{self.path} was asked to stop, so that it is not started again; launch it anew to go on")
        if world.leads:
            asked.unlink(missing_ok=True)

    def is_of(self, launch: str | None) -> bool:
        """Whether the run that is here was begun, or gone on with, by the launch."""
        with suppress(SupraError, OSError):
            return read_json(self.path / "env.json").get("launch") == launch
        return False

    def clear(self) -> None:
        """Remove what a run writes, checkpoints first, the newest last, and nothing else; env.json stays, whose run it
        was, and `non-finite`, why it ended.
        """
        links = [self.path / name for name in ("last", "best")]
        for folder in self._checkpoints():
            for link in links:
                if link.resolve() == folder.resolve():
                    link.unlink()
            _remove(folder)
        for link in links:
            link.unlink(missing_ok=True)
        if (self.path / "converted").is_symlink():
            (self.path / "converted").unlink()
        for name in ("eval", *_FOLDERS):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in ("metrics.jsonl", "recipe.toml"):
            (self.path / name).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what a killed start, save or removal of a checkpoint has left."""
        for pattern in (_STARTING, ".writing-*", ".*.[0-9]*.tmp", ".*.[0-9]*.old"):
            for left in self.path.glob(pattern):
                if left.is_dir():
                    shutil.rmtree(left)
        for left in self._checkpoints():
            if not (left / MARKER).exists():
                _remove(left)

    def link(self, name: str, target: Path) -> None:
        """Point `name` at a checkpoint, atomically."""
        beside = self.path / f".{name}.link"
        beside.unlink(missing_ok=True)
        beside.symlink_to(target.name)
        beside.replace(self.path / name)

    def prune(self, keep_last: int) -> None:
        """Remove old checkpoints: never what `last` or `best` points at, even if a damaged one has a higher number."""
        spared = {(self.path / name).resolve() for name in ("last", "best")}
        for path in self.complete()[:-keep_last]:
            if path.resolve() not in spared:
                _remove(path)

    def trim_metrics(self, step: int) -> None:
        """Drop the lines of steps after `step`, which will be run again, and those that a kill or a crash spoilt."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and record.get("step", 0) <= step:
                kept.append(line + "\n")
        write(path, "".join(kept))

    def log(self, record: dict[str, Any]) -> None:
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(dumps(record) + "\n")


def _unlock(lock: Path, made: list[Path]) -> None:
    lock.unlink(missing_ok=True)
    with suppress(OSError):  # one that is not empty is there to stay
        for folder in made:
            folder.rmdir()


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint, which is at no time one that is marked complete and is not; of one elsewhere the link."""
    if checkpoint.is_symlink():
        checkpoint.unlink()
        return
    (checkpoint / MARKER).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)
