"""What is in a data file: text, records, a table or parquet, compressed or not, and what can be wrong with each."""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.csv
import pyarrow.parquet

from supra_cli.core.errors import SupraError, first_line, near_miss
from supra_cli.core.recipe.paths import COMPRESSED, FORMATS

_PIECE_CHARACTERS = 1 << 20
_BLOCK = 1 << 20
_OWN = {"parquet": b"PAR1", "gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd", "bz2": b"BZh"}
_MAGIC = {  # how a file begins that is something else than its name says
    b"version https://git-lfs": "is a pointer of git-lfs and not the data itself; run `git lfs pull` where it lies",
    b"\xff\xfe": "is UTF-16; convert it, for example with `iconv -f UTF-16 -t UTF-8`",
    b"\xfe\xff": "is UTF-16; convert it, for example with `iconv -f UTF-16 -t UTF-8`",
    _OWN["parquet"]: "is parquet; give it the suffix .parquet",
    _OWN["gzip"]: "is compressed by gzip; give it the suffix .gz",
    _OWN["zstd"]: "is compressed by zstd; give it the suffix .zst",
    _OWN["bz2"]: "is compressed by bzip2; give it the suffix .bz2",
    b"\xfd7zXZ\0": "is compressed by xz, which is not read; use .gz, .zst or .bz2",
    b"PK\3\4": "is a zip archive; unpack it and name its folder",
    b"%PDF-": "is a PDF; extract its text first",
}


@dataclass
class Count:
    """Records seen in one reading of a source, and those that had to be left out, by reason."""

    records: int = 0
    skipped: int = 0
    reason: str = ""

    def skip(self, reason: str) -> None:
        self.skipped += 1
        self.reason = self.reason or reason


def form(path: Path) -> tuple[str, str, str | None]:
    """(what is in a file by its name, the suffix that says so, its compression)"""
    *_, before, last = ["", "", *path.suffixes]
    compression = COMPRESSED.get(last.lower())
    suffix = (before if compression else last).lower()
    return FORMATS.get(suffix, "text"), suffix, compression


def opened(path: Path):
    try:
        return path.open("rb")
    except OSError as error:
        raise SupraError(f"cannot read {path}: {error.strerror or error}") from None


def read(path: Path, field: str, count: Count) -> Iterator[str]:
    """The text of each record in turn, "" where it has none; `count` takes those that are no records at all.

    SupraError for whatever a file can say wrong, by its true cause.
    """
    kind, suffix, compression = form(path)
    try:
        with opened(path) as stream:
            _refuse(path, stream.read(_BLOCK), compression or ("parquet" if kind == "parquet" else None), kind)
        if kind == "parquet":
            if compression:
                raise SupraError(f"{path} is parquet compressed once more; undo that, parquet is compressed by itself")
            yield from _read_parquet(path, field)
            return
        with pyarrow.input_stream(str(path), compression=compression) as stream:
            head = stream.read(_BLOCK)
            _refuse(path, head, None, kind)
        with pyarrow.input_stream(str(path), compression=compression) as stream:
            if kind == "table":
                yield from _read_table(stream, path, field, head, "\t" if suffix == ".tsv" else ",")
            elif kind == "records":
                yield from _read_records(stream, path, field, head, count)
            else:
                yield from _read_text(stream, path)
    except UnicodeDecodeError:  # parquet does not check what it is given as text
        raise SupraError(f"column '{field}' of {path} is not UTF-8; write the file again") from None
    except (OSError, pyarrow.ArrowException) as error:
        if compression and isinstance(error, OSError) and error.errno is None:  # arrow's, not the system's
            cut = "Truncated" in str(error)
            why = "is cut off" if cut else f"does not decompress ({first_line(error)})"
            raise SupraError(f"cannot read {path}: its {compression} stream {why}; fetch the file again") from None
        raise SupraError(f"cannot read {path}: {first_line(error)}") from None


def _refuse(path: Path, head: bytes, container: str | None, kind: str) -> None:
    """SupraError for a file that is not what its name says, by its first bytes (`container`: gzip, ..., parquet)."""
    if container and head.startswith(_OWN[container]):
        return
    what = next((what for magic, what in _MAGIC.items() if head.startswith(magic)), None)
    if head[257:262] == b"ustar":
        what = "is a tar archive; unpack it and name its folder"
    elif kind != "text" and re.match(rb"\s*<(!doctype|html|\?xml)", head, re.IGNORECASE):
        what = "is a web page, as servers send in place of a file that they do not give; fetch the file again"
    elif kind == "records" and re.match(rb"\s*\{\s*[\r\n]", head.removeprefix(codecs.BOM_UTF8)):
        what = "has JSON objects over several lines; expected one a line, or one array of them"
    if what is not None:
        raise SupraError(f"{path} {what}")


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    table = pyarrow.parquet.ParquetFile(path)
    _check_column(path, field, table.schema_arrow.names)
    kind = table.schema_arrow.field(field).type
    plain = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if str(plain) not in ("string", "large_string", "string_view"):
        raise SupraError(f"column '{field}' of {path} is {kind}, expected text; name a column of strings as `text`")
    for batch in table.iter_batches(columns=[field]):
        for value in batch.column(0).to_pylist():
            yield value or ""


def _read_table(stream, path: Path, field: str, head: bytes, delimiter: str) -> Iterator[str]:
    try:
        names = next(csv.reader(head.decode("utf-8-sig", "replace").splitlines(), delimiter=delimiter), [])
    except csv.Error as error:
        raise SupraError(
            f"the first line of {path} does not name columns ({error}); close its quotes, or write the file again"
        ) from None
    _check_column(path, field, names, " in its first line")
    reader = pyarrow.csv.open_csv(
        stream,
        read_options=pyarrow.csv.ReadOptions(block_size=16 * _BLOCK),  # a record has to fit into it
        parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(include_columns=[field], column_types={field: pyarrow.string()}),
    )
    for batch in reader:
        yield from batch.column(0).to_pylist()


def _check_column(path: Path, field: str, names: list[str], where: str = "") -> None:
    if field not in names:
        raise SupraError(f"{path} has no column '{field}'{where}{near_miss(field, names)}")
    if (count := names.count(field)) > 1:
        raise SupraError(f"{path} has {count} columns '{field}'{where}; rename all but one")


def _read_records(stream, path: Path, field: str, head: bytes, count: Count) -> Iterator[str]:
    """A record a line, or all in one array."""
    if re.match(rb"\s*\[\s*\{", head.removeprefix(codecs.BOM_UTF8)):
        try:
            records = json.loads(stream.read())
        except (ValueError, RecursionError) as error:
            raise SupraError(f"{path} begins as a JSON array and is none: {first_line(error)}") from None
        for number, record in enumerate(records, start=1):
            yield _text_of(record, field, f"record {number} of {path}")
        return
    for number, line in enumerate(_lines(stream), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            what = "UTF-8" if isinstance(error, UnicodeDecodeError) else "JSON"
            count.skip(f"line {number} of {path.name} is not {what}")
            count.records += 1
            continue
        yield _text_of(record, field, f"line {number} of {path}")


def _text_of(record: Any, field: str, where: str) -> str:
    if not isinstance(record, dict):
        raise SupraError(f"{where} is a JSON {type(record).__name__}, expected an object with the field '{field}'")
    if field not in record:
        raise SupraError(f"{where} has no field '{field}'{near_miss(field, record)}")
    text = record[field]
    if text is not None and not isinstance(text, str):
        raise SupraError(f"field '{field}' in {where} is {type(text).__name__}, expected text")
    return text or ""


def _read_text(stream, path: Path) -> Iterator[str]:
    """A text file is one document; of one with more than about a million characters, each such piece is."""
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
    """The lines of a stream, each with its end, and without the byte-order mark that Windows editors put first."""
    rest: list[bytes] = []  # of a line whose end is not read yet, in blocks: joined at each, a long one takes forever
    block = stream.read(_BLOCK).removeprefix(codecs.BOM_UTF8)
    while block:
        first, *lines = block.splitlines(keepends=True)
        rest.append(first)
        for line in lines:
            yield b"".join(rest)
            rest = [line]
        if rest[-1].endswith((b"\n", b"\r")):
            yield b"".join(rest)
            rest = []
        block = stream.read(_BLOCK)
    if rest:
        yield b"".join(rest)
