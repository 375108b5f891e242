"""Tokenise a source once: a flat file of token ids and the offsets at which documents end, kept in a cache.

The cache key is a hash of the tokenizer, of the settings and of the text itself, so a changed file or tokenizer is
never served stale tokens.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from supra_cli.core.data import sources
from supra_cli.core.data.readers import Count
from supra_cli.core.data.tokenizer import token_ids
from supra_cli.core.errors import SupraError
from supra_cli.core.files import cache_folder, write_json
from supra_cli.core.recipe import Source

_log = logging.getLogger(__name__)

_FORMAT = 2  # in every digest: raise it whenever the same text comes to other tokens than before
_TEXTS_AT_ONCE = 256


class Tokens(NamedTuple):
    """`ids[ends[i-1]:ends[i]]` is document i with its begin and end tokens; `digest` names text and tokenizer."""

    ids: np.ndarray
    ends: np.ndarray
    digest: str


def tokenised(source: Source, tokenizer, split: str, skip_share: float) -> Tokens:
    """The tokens of a local source, from the cache or into it. SupraError when there is no token at all."""
    if source.path != sources.STDLIB:
        for remark in sources.files(source, split).remarks:
            _log.info(remark)
    settings = {
        "format": _FORMAT,
        "tokenizer": tokenizer_digest(tokenizer),
        "text": sources.fingerprint(source, split),
        "field": source.text,
        "skip_share": skip_share,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    folder = cache_folder() / "tokens" / digest[:32]
    stored = _read(folder)
    if stored is None:
        count = Count()
        texts = sources.texts(source, split, skip_share, count)
        _write(folder, encode(texts, tokenizer), len(tokenizer), count)
        stored = _read(folder)
    if stored is None:
        raise SupraError(f"no text in {source.path}: not one token came out of it")
    ids, ends, count = stored
    if count.skipped:
        share = f"{count.skipped:,} of {count.records:,} records"
        _log.warning(f"{source.path}: {share} were skipped for having no usable text (the first: {count.reason})")
    return Tokens(ids, ends, digest)


def encode(texts: Iterable[str], tokenizer) -> Iterable[list[int]]:
    """Each text opened as the tokenizer opens it (with the base's own begin token, if any), closed by the end token."""
    texts = iter(texts)
    while batch := list(itertools.islice(texts, _TEXTS_AT_ONCE)):
        yield from token_ids(tokenizer, batch, close=True)


def tokenizer_digest(tokenizer) -> str:
    """Of what decides the tokens of a text; the same before the first text is encoded as after it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()  # as whoever encodes without either does, to this very tokenizer
        backend.no_padding()
    state = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    split = "\0split" if tokenizer.split_special_tokens else ""  # of which the backend's state says nothing
    return hashlib.sha256(f"{state}\0{tokenizer.eos_token_id}{split}".encode()).hexdigest()


def _read(folder: Path) -> tuple[np.ndarray, np.ndarray, Count] | None:
    """(ids, ends, what was skipped) of a cache folder; None where it is absent, damaged or without a token."""
    try:
        ids, ends = np.load(folder / "ids.npy", mmap_mode="r"), np.load(folder / "ends.npy")
        count = Count(**json.loads((folder / "count.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, EOFError, TypeError):
        return None
    return (ids, ends, count) if len(ends) and len(ids) == ends[-1] > 0 else None


def _write(folder: Path, documents: Iterable[list[int]], vocabulary: int, count: Count) -> None:
    """Write beside and rename into place: a cache folder is whole or absent."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    kind = np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.uint32)
    beside = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder.parent))
    try:
        ends = [0]
        with (beside / "ids.bin").open("wb") as stream:
            for ids in documents:
                stream.write(np.asarray(ids, dtype=kind).tobytes())
                ends.append(ends[-1] + len(ids))
        _as_npy(beside / "ids.bin", beside / "ids.npy", kind, ends[-1])
        np.save(beside / "ends.npy", np.asarray(ends[1:], dtype=np.int64))
        write_json(beside / "count.json", asdict(count))  # complete only now that the documents have been read
        if _read(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)
        try:
            beside.rename(folder)
        except OSError:  # another process was faster
            if _read(folder) is None:
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _as_npy(raw: Path, target: Path, kind: np.dtype, length: int) -> None:
    """Put the .npy header in front of a raw stream, without holding the stream in memory."""
    with target.open("wb") as out, raw.open("rb") as stream:
        header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(out, header)
        shutil.copyfileobj(stream, out, 1 << 20)
    raw.unlink()
