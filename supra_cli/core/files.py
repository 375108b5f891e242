"""What every writer of files needs: JSON as the standard defines it, and bytes that survive a power cut. No torch."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from supra_cli.core.errors import SupraError, first_line

_POINTER = b"version https://git-lfs.github.com/spec/"


def cache_folder() -> Path:
    """`$SUPRA_CACHE`, or `supra` in the user's cache folder."""
    root = os.environ.get("SUPRA_CACHE")
    return Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "supra"


def finite(value: Any) -> Any:
    """`value` with None for every float that JSON does not have: NaN and the infinities."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def dumps(value: Any, **options: Any) -> str:
    """`value` as JSON: numbers that JSON does not have are null, other objects their text."""
    return json.dumps(finite(value), allow_nan=False, default=str, **options)


def write_json(path: Path, value: Any) -> None:
    write(path, dumps(value, indent=2, ensure_ascii=False) + "\n")


def write(path: Path, text: str) -> None:
    """Write `text`; the file there is the old one or the new one at any moment, and nothing else stays.

    A link is written where it leads, and in place what cannot be replaced: no file, one of the system's own, such as
    /dev/stdout, one that is mounted by itself, or one in a folder that may not be written.
    """
    if path.exists() and (not path.is_file() or _is_the_systems(path)):
        path.write_text(text, encoding="utf-8")
        return
    path = path.resolve()
    beside = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}")
    try:
        try:
            beside.write_text(text, encoding="utf-8")
            if path.exists():
                shutil.copymode(path, beside)
            sync(beside)  # where a disk of a network is full, this may be the first to say so
            beside.replace(path)
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.EACCES, errno.EPERM) or not path.exists():
                raise
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):
            beside.unlink()


def _is_the_systems(path: Path) -> bool:
    """Whether it stands for what a process has open, which would be lost with the file that is replaced."""
    folder = path.parent.resolve()
    return folder == Path("/dev") or folder.is_relative_to("/proc")


def check_whole(path: Path) -> None:
    """Raise a SupraError for a file without its content: missing, a dead link, empty, a git-lfs pointer."""
    if not path.exists():
        if path.is_symlink():
            raise SupraError(
                f"{path} is a link to {os.readlink(path)}, which is not there; restore or download it again"
            )
        raise SupraError(f"{path} is missing; restore the file")
    with path.open("rb") as file:
        start = file.read(len(_POINTER))
    if not start:
        raise SupraError(f"{path} is empty, as a download that broke off leaves it; restore or download it again")
    if start == _POINTER:
        raise SupraError(
            f"{path} is a git-lfs pointer, not the file that it stands for; run `git lfs pull` in {path.parent}"
        )


def read_json(path: Path) -> Any:
    """SupraError when the file is not JSON. A byte-order mark, as Windows editors write it, is read over."""
    if path.exists() or path.is_symlink():
        check_whole(path)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise SupraError(f"{path} is not JSON ({first_line(error)}); restore the file") from error


def sync(path: Path) -> None:
    """Return when what was written to the file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync` every file below `folder`, then every directory, `folder` last."""
    below = list(folder.rglob("*"))
    for path in [path for path in below if path.is_file()] + [path for path in below if path.is_dir()]:
        sync(path)
    sync(folder)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
