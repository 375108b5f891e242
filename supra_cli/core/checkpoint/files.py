"""Files that are whole or not there: atomic directories, links instead of copies, hashes, JSON."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from supra_cli.core.errors import SupraError, UsageError, first_line
from supra_cli.core.files import cache_folder, read_json, sha256, sync, sync_tree, write

_LARGE = 64 * 2**20
"""Bytes of a file that takes a while to hash."""
_HEADER = 100_000_000
"""Bytes of a safetensors header, at most: what says more is damaged."""
_FOLDERS = {"training", "eval", ".cache", "__pycache__"}
"""Of a model's directory: what a run, an evaluation, a download and the code of an export have put there."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


@contextmanager
def atomic_directory(path: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary directory beside `path` that takes its place if the block ends well, and vanishes if it does not,
    with the folders that were made for it. What a killed process of this machine has left there goes first.

    Where `path` is a link, what it names is written, there. One that is occupied, before the block or after it, is a
    UsageError, see `check_free`; a full disk, a missing permission or a file that the block cannot read is a
    SupraError.
    """
    path = Path(path).resolve()
    _sweep(path)
    check_free(path, overwrite)
    made = [folder for folder in path.parents if not folder.exists()]
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{platform.node()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        sync_tree(temporary)
        check_free(path, overwrite)
        _replace(temporary, path)
    except OSError as error:
        if (read := _read_failure(error, path, temporary)) is not None:
            raise SupraError(f"cannot read {read} ({error.strerror}), so {path} was not written; restore it") from error
        raise SupraError(unwritten(path, error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):  # one that is not empty is there to stay
            for folder in made:
                folder.rmdir()


def unwritten(path: Path, error: OSError) -> str:
    """What to say of a file or directory that could not be written; room helps only where writing is allowed."""
    forbidden = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
    return f"cannot write {path} ({first_line(error)}); {'' if forbidden else 'make room or '}choose another output"


def _sweep(path: Path) -> None:
    """Remove what processes that are no more have left beside `path`, but put back what one had moved out of the way
    and not replaced yet. Of other machines' processes it cannot be known.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.{glob.escape(platform.node())}.*"):
        number = left.name.removeprefix(f".{path.name}.").partition(".")[0]
        if left.suffix not in (".tmp", ".old") or not number.isdecimal() or _lives(int(number)):
            continue
        if left.suffix == ".old" and not path.exists():
            left.rename(path)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        return True
    return True


def _read_failure(error: OSError, path: Path, temporary: Path) -> Path | None:
    """The file elsewhere that could not be read; None when it is writing that failed.

    A copy that finds the disk full names the file that it copies, too.
    """
    if error.filename is None or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        return None
    named = Path(os.fsdecode(error.filename)).absolute()
    ours = named == path or named.is_relative_to(temporary) or temporary.is_relative_to(named)
    return None if ours else named


def check_free(path: Path, overwrite: bool) -> None:
    """Raise a UsageError unless a directory can be written to `path`: nothing is there, or with `overwrite` a model.

    Whatever else lies there is not ours to delete: a model is known by its config.json, and has no folders but these.
    """
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file, expected a directory to write; choose another --output")
    with suppress(OSError):  # a working directory that was removed since
        if path.is_dir() and Path.cwd().is_relative_to(path.resolve()):
            raise UsageError(
                f"{path} is, or holds, the working directory, which would be replaced; choose another --output"
            )
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not overwrite:
        raise UsageError(f"{path} is not empty; choose another --output, or replace it with --overwrite")
    if not _is_described(path / "config.json"):
        raise UsageError(f"{path} holds files but no model, so it is not overwritten; choose another --output")
    if strange := sorted(entry.name for entry in path.iterdir() if entry.is_dir() and entry.name not in _FOLDERS):
        raise UsageError(
            f"{path} holds {strange[0]}, which is no part of a model, so it is not overwritten; choose another --output"
        )


def _is_described(config: Path) -> bool:
    with suppress(OSError, SupraError):
        described = read_json(config)
        return isinstance(described, dict) and isinstance(described.get("model_type"), str)
    return False


def _replace(temporary: Path, path: Path) -> None:
    old = path.with_name(f".{path.name}.{os.getpid()}.{platform.node()}.old")
    if path.exists():
        path.rename(old)
    try:
        temporary.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def link(source: Path, target: Path) -> None:
    """A hard link to the file that `source` finally names, or a copy where none can be made."""
    source = source.resolve(strict=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def header_sha256(path: Path) -> str:
    """The hash of what a safetensors file says of its tensors: the header and the 8 bytes of its length."""
    with open(path, "rb") as file:
        length = file.read(8)
        return hashlib.sha256(length + file.read(min(int.from_bytes(length, "little"), _HEADER))).hexdigest()


def named_by_hash(path: Path) -> str | None:
    """The hash that is the name of a large file in the hub's cache; None for any other file."""
    blob = path.resolve()
    return blob.name if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name) else None


def sha256_once(path: Path) -> str:
    """As `sha256`, without reading a large file twice."""
    if (known := known_sha256(path)) is not None:
        return known
    kept = _kept(path)  # before the file is read: one that changes meanwhile is another
    found = sha256(path)
    if path.stat().st_size >= _LARGE:
        _keep(found, kept)
    return found


def sha256_again(path: Path) -> tuple[str, str | None]:
    """(the hash of a file, read now; what it was known to be before, None if it was not). It is kept."""
    known, kept = known_sha256(path), _kept(path)
    found = sha256(path)
    if known is None:
        _keep(found, kept)
    return found, known


def known_sha256(path: Path) -> str | None:
    """The hash of a file without reading it: the hub's cache keeps it under its hash as a name, and of any other that
    was hashed the hash is kept by device, inode, size and time of change. None where neither is so.
    """
    if named := named_by_hash(path):
        return named
    with suppress(OSError, ValueError):
        if _SHA256.fullmatch(found := _kept(path).read_text(encoding="ascii")):
            return found
    return None


def _kept(path: Path) -> Path:
    """Where the hash of a file is kept for as long as the file is not touched."""
    state = path.stat()
    place = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
    return cache_folder() / "hashes" / "-".join(map(str, place))


def _keep(found: str, kept: Path) -> None:
    with suppress(OSError):  # a cache that cannot be written costs time alone
        kept.parent.mkdir(parents=True, exist_ok=True)
        write(kept, found)


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise SupraError(f"cannot write {path} ({first_line(error)}); make room") from error
