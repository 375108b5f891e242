"""Where text comes from: what Python carries, local files, datasets on the hub. A source yields documents as text."""

from __future__ import annotations

import codecs
import csv
import glob
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.csv
import pyarrow.parquet

from supra_cli.core import corpus
from supra_cli.core.errors import NotFoundError, SupraError, UsageError, first_line, near_miss
from supra_cli.core.recipe import Data, Source
from supra_cli.core.recipe.paths import COMPRESSED, FORMATS, STDLIB, looks_local

_SPLITS = {  # the words by which `datasets` knows a split in the name of a file or folder
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}
# About the data, though with a data file's suffix.
_ABOUT = {"readme", "license", "licence", "copying", "notice", "dataset_info", "dataset_infos", "dataset_dict"}
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


class Files(NamedTuple):
    """The files of a local source in name order, and sentences on what is there and left out, or read unasked."""

    paths: list[Path]
    remarks: list[str]


def is_on_hub(source: Source) -> bool:
    """Whether a source can only be a hub dataset: `name` or `org/name`, that is neither built in nor a file here."""
    named = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source.path) is not None
    return named and source.path != STDLIB and not looks_local(source.path) and not Path(source.path).exists()


def texts(source: Source, split: str, skip_share: float, count: Count | None = None) -> Iterator[str]:
    """The documents of a local source, `count` counting them. SupraError when more than `skip_share` of its records
    have no usable text.
    """
    count = Count() if count is None else count
    if source.path == STDLIB:
        for document in corpus.documents(_stdlib_split(source.split or split)):
            count.records += 1
            yield document.text
        return
    paths = files(source, split).paths
    if source.text != "text" and all(_format(path)[0] == "text" for path in paths):
        raise UsageError(f"{source.path} is plain text and has no field '{source.text}'; leave `text` out")
    for path in paths:
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


def files(source: Source, split: str) -> Files:
    """The files that a source's path, folder or glob names.

    Of a folder they are the data files outside hidden folders; and if all of them are named for splits, by their names
    or their sub-folders', those of the source's split, or of `split` where it says none. Of a folder or glob with a
    `split`, they are those named for it. NotFoundError when there are none, UsageError for a split of one file.
    """
    path = Path(source.path)
    if path.is_file():
        if source.split is not None:
            raise UsageError(f"{path} is one file, which has no split '{source.split}'; leave split out")
        return Files([path], [])
    if path.is_dir():
        paths, remarks = _data_files(path)
    else:
        path = Path(re.split(r"[*?[]", source.path)[0] + "_").parent  # what no file's name is part of
        paths = sorted(Path(match) for match in glob.glob(source.path, recursive=True) if Path(match).is_file())
        remarks = []
    if not paths:
        raise NotFoundError(
            f"no data at '{source.path}': expected a file, a folder, a glob, '{STDLIB}' or a dataset on the hub"
            + (near_miss(source.path, [STDLIB]) if "/" not in source.path and "." not in source.path else "")
        )
    names = [_split_name(file.relative_to(path)) for file in paths]
    known = sorted({name for name in names if name})
    if source.split is None and (None in names or not Path(source.path).is_dir()):
        if known and Path(source.path).is_dir() and known != ["train"]:
            remarks.append(
                f"{path}: files named for a split ({', '.join(known)}) and others are read; set split to choose"
            )
        return Files(paths, remarks)
    wanted = source.split or split
    chosen = [file for file, name in zip(paths, names, strict=True) if name == (_split_name(Path(wanted)) or wanted)]
    if not chosen:
        what = f"its files are named for {', '.join(known)}" if known else "none of its files is named for a split"
        raise NotFoundError(
            f"{source.path} has no split '{wanted}': {what}, in their own or a sub-folder's name; "
            "name one of them as split, or other files as path"
        )
    if len(chosen) < len(paths):
        remarks.append(f"{path}: split '{wanted}' is {len(chosen)} of its {len(paths)} files")
    return Files(chosen, remarks)


def overlap(data: Data) -> list[str]:
    """A sentence for each held-out source that is also trained on."""
    trained = {item for source in data.sources for item in _items(source, "train")}
    return [
        f"{source.path} is both held out and trained on, so the held-out loss does not show what was learned; "
        "name other text, or a split, as data.validation"
        for source in data.validation
        if not trained.isdisjoint(_items(source, "validation"))
    ]


def fingerprint(source: Source, split: str) -> str:
    """SHA-256 over the content of a local source, file names included."""
    digest = hashlib.sha256()
    if source.path == STDLIB:
        for name, text in corpus.documents(_stdlib_split(source.split or split)):
            digest.update(f"{name}\0{text}\0".encode())
        return digest.hexdigest()
    for path in files(source, split).paths:
        digest.update(path.name.encode() + b"\0")
        with _open(path) as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _items(source: Source, split: str) -> set[Any]:
    """What a source draws from, such that two sources share text if they share an item."""
    if source.path == STDLIB or is_on_hub(source):
        return {(source.path, source.name, source.revision, source.split or split)}
    return {path.resolve() for path in files(source, split).paths}


def _stdlib_split(split: str) -> corpus.Split:
    if split not in ("train", "validation"):
        raise NotFoundError(f"'{STDLIB}' has no split '{split}'{near_miss(split, ['train', 'validation'])}")
    return split


def _data_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The data files below a folder, and a sentence on the rest. NotFoundError when there is a rest alone."""
    present = sorted(path for path in folder.rglob("*") if path.is_file())
    paths = [path for path in present if _is_data(path.relative_to(folder))]
    rest = [path.relative_to(folder) for path in present if path not in set(paths)]
    if any(path.suffix == ".arrow" and not str(path).startswith(".") for path in rest):
        raise SupraError(f"{folder} holds .arrow files, as `save_to_disk` of datasets writes them; use `to_parquet`")
    shown = next((path for path in rest if not str(path).startswith(".")), rest[0] if rest else None)
    if rest and not paths:
        raise NotFoundError(
            f"no data in {folder}: of a folder {', '.join(FORMATS)} files are read (also {', '.join(COMPRESSED)}), and "
            f"it holds {len(rest)} others, such as {shown}; name such files by a glob"
        )
    left = f"{folder}: {len(paths)} data files; {len(rest)} others are left out, such as {shown}"
    return paths, [left] if rest else []


def _is_data(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and _format(path)[1] in FORMATS and path.name.partition(".")[0].lower() not in _ABOUT


def _split_name(path: Path) -> str | None:
    """The split that a relative path is named for, its last word deciding."""
    words = re.findall("[a-z]+", path.as_posix().lower())
    named = [split for word in words for split, spellings in _SPLITS.items() if word in spellings]
    return named[-1] if named else None


def _format(path: Path) -> tuple[str, str, str | None]:
    """(what is in a file by its name, the suffix that says so, its compression)"""
    *_, before, last = ["", "", *path.suffixes]
    compression = COMPRESSED.get(last.lower())
    suffix = (before if compression else last).lower()
    return FORMATS.get(suffix, "text"), suffix, compression


def _open(path: Path):
    try:
        return path.open("rb")
    except OSError as error:
        raise SupraError(f"cannot read {path}: {error.strerror or error}") from None


def _read(path: Path, field: str, count: Count) -> Iterator[str]:
    kind, suffix, compression = _format(path)
    try:
        with _open(path) as stream:
            _refuse(path, stream.read(_BLOCK), "parquet" if kind == "parquet" else compression, kind)
        if kind == "parquet":
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
        if compression and not isinstance(error, FileNotFoundError):
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


def _fault(text: str) -> str:
    """Why a record's text cannot be used; empty if it can."""
    try:
        return "" if text.encode() else "is empty"
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        return "is no Unicode text"


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    table = pyarrow.parquet.ParquetFile(path)
    if field not in table.schema_arrow.names:
        raise SupraError(f"{path} has no column '{field}'{near_miss(field, table.schema_arrow.names)}")
    kind = table.schema_arrow.field(field).type
    plain = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if str(plain) not in ("string", "large_string", "string_view"):
        raise SupraError(f"column '{field}' of {path} is {kind}, expected text; name a column of strings as `text`")
    for batch in table.iter_batches(columns=[field]):
        for value in batch.column(0).to_pylist():
            yield value or ""


def _read_table(stream, path: Path, field: str, head: bytes, delimiter: str) -> Iterator[str]:
    names = next(csv.reader(head.decode("utf-8-sig", "replace").splitlines(), delimiter=delimiter), [])
    if field not in names:
        raise SupraError(f"{path} has no column '{field}' in its first line{near_miss(field, names)}")
    reader = pyarrow.csv.open_csv(
        stream,
        read_options=pyarrow.csv.ReadOptions(block_size=16 * _BLOCK),  # a record has to fit into it
        parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(include_columns=[field], column_types={field: pyarrow.string()}),
    )
    for batch in reader:
        yield from batch.column(0).to_pylist()


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
    """The lines of a stream, each with its end, and without the byte-order mark that Windows editors put first."""
    rest = b""
    block = stream.read(_BLOCK).removeprefix(codecs.BOM_UTF8)
    while block:
        *lines, rest = (rest + block).splitlines(keepends=True)
        if rest.endswith((b"\n", b"\r")):
            lines, rest = [*lines, rest], b""
        yield from lines
        block = stream.read(_BLOCK)
    if rest:
        yield rest
