"""Where text comes from: what Python carries, local files, datasets on the hub. A source yields documents as text."""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet

from supra_cli.core import corpus
from supra_cli.core.errors import NotFoundError, SupraError, first_line, near_miss
from supra_cli.core.recipe import Data, Source

STDLIB = "python-stdlib"

_COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
_FORMATS = {".jsonl": "records", ".json": "records", ".ndjson": "records", ".parquet": "table"}
_LOCAL_SUFFIXES = {*_COMPRESSED, *_FORMATS, ".txt", ".md", ".py", ".csv"}
_PIECE_CHARACTERS = 1 << 20


@dataclass
class Count:
    """Records seen in one reading of a source, and those that had to be left out, by reason."""

    records: int = 0
    skipped: int = 0
    reason: str = ""

    def skip(self, reason: str) -> None:
        self.skipped += 1
        self.reason = self.reason or reason


def is_on_hub(source: Source) -> bool:
    """Whether a source can only be a hub dataset: `name` or `org/name`, that is neither built in nor a file here."""
    named = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source.path) is not None
    local = Path(source.path).suffix in _LOCAL_SUFFIXES or bool(_pattern_matches(source.path))
    return named and not local and source.path != STDLIB


def texts(source: Source, split: str, skip_share: float) -> Iterator[str]:
    """The documents of a local source. SupraError when more than `skip_share` of its records have no usable text."""
    count = Count()
    if source.path == STDLIB:
        yield from (document.text for document in corpus.documents(_stdlib_split(source.split or split)))
        return
    for path in files(source.path):
        for text in _read(path, source.text, count):
            count.records += 1
            if fault := _fault(text):
                count.skip(f"record {count.records} {fault}")
            else:
                yield text
    if count.records == 0:
        raise SupraError(f"no text in {source.path}: it holds no record; expected text, JSON lines or parquet")
    if count.skipped > skip_share * count.records:
        raise SupraError(
            f"{count.skipped} of {count.records} records of {source.path} have no usable text "
            f"(the first: {count.reason}); allowed is a share of {skip_share}, see data.skip_share"
        )


def all_texts(data: Data) -> Iterator[str]:
    """Every document of the local training sources, to train a tokenizer on."""
    for source in data.sources:
        if source.repeat == "no":
            yield from texts(source, "train", data.skip_share)


def files(path: str) -> list[Path]:
    """The files that a path, folder or glob names, in name order. NotFoundError when there are none."""
    found = _pattern_matches(path)
    if not found:
        raise NotFoundError(
            f"no data at '{path}': expected a file, a folder, a glob, '{STDLIB}' or a dataset on the hub"
            + (near_miss(path, [STDLIB]) if "/" not in path and "." not in path else "")
        )
    return found


def fingerprint(source: Source, split: str) -> str:
    """SHA-256 over the content of a local source, file names included."""
    digest = hashlib.sha256()
    if source.path == STDLIB:
        for name, text in corpus.documents(_stdlib_split(source.split or split)):
            digest.update(f"{name}\0{text}\0".encode())
        return digest.hexdigest()
    for path in files(source.path):
        digest.update(path.name.encode() + b"\0")
        with _open(path) as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _stdlib_split(split: str) -> corpus.Split:
    if split not in ("train", "validation"):
        raise NotFoundError(f"'{STDLIB}' has no split '{split}'{near_miss(split, ['train', 'validation'])}")
    return split


def _pattern_matches(path: str) -> list[Path]:
    here = Path(path)
    if here.is_file():
        return [here]
    if here.is_dir():
        return sorted(file for file in here.rglob("*") if file.is_file() and not file.name.startswith("."))
    return sorted(Path(match) for match in glob.glob(path, recursive=True) if Path(match).is_file())


def _open(path: Path):
    try:
        return path.open("rb")
    except OSError as error:
        raise SupraError(f"cannot read {path}: {error.strerror or error}") from None


def _read(path: Path, field: str, count: Count) -> Iterator[str]:
    suffixes = path.suffixes
    compression = _COMPRESSED.get(suffixes[-1]) if suffixes else None
    inner = suffixes[-2] if compression and len(suffixes) > 1 else suffixes[-1] if suffixes else ""
    try:
        if _FORMATS.get(inner) == "table":
            yield from _read_table(path, field)
            return
        with pyarrow.input_stream(str(path), compression=compression) as stream:
            yield from _read_records(stream, path, field, count) if inner in _FORMATS else _read_text(stream, path)
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise SupraError(f"cannot read {path}: {first_line(error)}") from None


def _fault(text: str) -> str:
    """Why a record's text cannot be used; empty if it can."""
    try:
        return "" if text.encode() else "is empty"
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        return "is no Unicode text"


def _read_table(path: Path, field: str) -> Iterator[str]:
    table = pyarrow.parquet.ParquetFile(path)
    if field not in table.schema_arrow.names:
        raise SupraError(f"{path} has no column '{field}'{near_miss(field, table.schema_arrow.names)}")
    for batch in table.iter_batches(columns=[field]):
        for value in batch.column(0).to_pylist():
            if value is not None and not isinstance(value, str):
                raise SupraError(f"column '{field}' of {path} holds {type(value).__name__}, expected text")
            yield value or ""


def _read_records(stream, path: Path, field: str, count: Count) -> Iterator[str]:
    for number, line in enumerate(_lines(stream), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            count.skip(f"line {number} of {path} is not JSON")
            count.records += 1
            continue
        if not isinstance(record, dict) or field not in record:
            known = record if isinstance(record, dict) else ()
            raise SupraError(f"line {number} of {path} has no field '{field}'{near_miss(field, known)}")
        text = record[field]
        if text is not None and not isinstance(text, str):
            raise SupraError(f"field '{field}' in line {number} of {path} is {type(text).__name__}, expected text")
        yield text or ""


def _read_text(stream, path: Path) -> Iterator[str]:
    """A text file is one document; one too long for memory comes in pieces of about a million characters."""
    piece: list[str] = []
    length = 0
    for number, line in enumerate(_lines(stream), start=1):
        if b"\0" in line:
            raise SupraError(f"{path} looks binary (a zero byte in line {number}); expected text in UTF-8")
        try:
            text = line.decode()
        except UnicodeDecodeError:
            raise SupraError(
                f"line {number} of {path} is not UTF-8; convert the file, for example with iconv"
            ) from None
        piece.append(text)
        length += len(text)
        if length >= _PIECE_CHARACTERS:
            yield "".join(piece)
            piece, length = [], 0
    if length:
        yield "".join(piece)


def _lines(stream) -> Iterator[bytes]:
    rest = b""
    while block := stream.read(1 << 20):
        *lines, rest = (rest + block).splitlines(keepends=True)
        if rest.endswith((b"\n", b"\r")):
            lines, rest = [*lines, rest], b""
        yield from lines
    if rest:
        yield rest
