"""Weights from the hub into its cache, each file going on where an earlier attempt was cut off.

huggingface_hub, as of 1.31 and 2.4, takes up a broken connection again within one call alone: it writes to a file of a
random name, lest two processes share one, and deletes it when the call fails, by Xet as by HTTP. Ten gigabytes of a
shard would begin anew. Here the part that has arrived stays beside the cache's blobs under a name of ours; what is
whole and has the hub's hash becomes the blob, which huggingface_hub then finds and links.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from supra_cli.core import connection
from supra_cli.core.errors import SupraError
from supra_cli.core.files import sha256

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _File:
    """One file of a commit, as the hub describes it."""

    name: str
    url: str
    etag: str
    """SHA-256 of a large file, git's hash of a small one; the blob's name in the cache."""
    size: int


def complete(repo: str, snapshot: Path, names: Iterable[str]) -> None:
    """Download the files `names` that the hub cache's directory `.../snapshots/<commit>` lacks.

    Raises huggingface_hub's errors, RemoteEntryNotFoundError for a file that the commit has not; SupraError for a disk
    without the room and for a file that is not what the hub said. What has arrived stays for the next call.
    """
    from huggingface_hub import hf_hub_download

    files = [_describe(repo, snapshot.name, name) for name in names if not (snapshot / name).exists()]
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    _check_room(repo, blobs, files)
    for number, file in enumerate(files, 1):
        _download(file, blobs, f"{number} of {len(files)}")
        with connection.answers():
            hf_hub_download(repo, file.name, revision=snapshot.name)  # finds the blob and links it


def _describe(repo: str, commit: str, name: str) -> _File:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import FileMetadataError

    url = hf_hub_url(repo, name, revision=commit)
    with connection.answers():
        found = get_hf_file_metadata(url, retry_on_errors=True)
    if found.etag is None or found.size is None:
        raise FileMetadataError(f"{url} is served without an ETag or a size")
    return _File(name, url, found.etag, found.size)


def _check_room(repo: str, blobs: Path, files: list[_File]) -> None:
    """SupraError if what has yet to arrive does not fit on the cache's disk."""
    wanted = {file.etag: file.size for file in files if not (blobs / file.etag).exists()}
    needed = sum(wanted.values()) - sum(_size(_partial(blobs, etag)) for etag in wanted)
    free = shutil.disk_usage(blobs).free
    if needed > free:
        raise SupraError(
            f"{repo} needs {needed / 2**30:,.1f} GiB more in {blobs.parent.parent}, where {free / 2**30:,.1f} GiB are "
            "free; make room, or set HF_HOME to a larger disk"
        )


def _download(file: _File, blobs: Path, which: str) -> None:
    """Put `file` into `blobs`, beginning with what is there of it."""
    from huggingface_hub import constants
    from huggingface_hub.utils import WeakFileLock

    blob, partial = blobs / file.etag, _partial(blobs, file.etag)
    if file.size > constants.MAX_HTTP_DOWNLOAD_SIZE:  # which the hub hands out by Xet alone
        return
    lock = blobs.parent.parent / ".locks" / blobs.parent.name / f"{file.etag}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():
            return
        if _size(partial) > file.size:
            partial.unlink()
        begun = f", going on at {_size(partial) / 2**20:,.1f}" if _size(partial) else ""
        log.info("downloading %s (%s, %s MiB%s)", file.name, which, f"{file.size / 2**20:,.1f}", begun)
        try:
            _append(file, partial)
        finally:
            if partial.exists() and not _size(partial):
                partial.unlink()
        # Everything that names a model by its weights trusts the hash that is the blob's name.
        if file.etag != (sha256(partial) if len(file.etag) == 64 else _git_hash(partial)):
            partial.unlink()
            raise SupraError(f"{file.name} did not arrive as the hub describes it; download it again")
        partial.replace(blob)


def _append(file: _File, partial: Path) -> None:
    """Add to `partial` what it lacks of `file`; a connection that breaks is made again while each brings something."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    while True:
        begun = _size(partial)
        try:
            with partial.open("ab") as stream, connection.answers():
                http_get(
                    file.url,
                    stream,
                    resume_size=begun,
                    headers=build_hf_headers(),
                    expected_size=file.size,
                    displayed_filename=file.name,
                )
            return
        except (HTTPError, OSError) as error:
            # An OSError without a number is huggingface_hub's word for an answer that ended early.
            refused = isinstance(error, HfHubHTTPError) or (isinstance(error, OSError) and error.errno is not None)
            if refused or _size(partial) <= begun:
                raise


def _partial(blobs: Path, etag: str) -> Path:
    return blobs / f"{etag}.supra.incomplete"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _git_hash(path: Path) -> str:
    """By which the hub calls a file that is not large."""
    found = hashlib.sha1(f"blob {_size(path)}\0".encode())
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            found.update(piece)
    return found.hexdigest()
