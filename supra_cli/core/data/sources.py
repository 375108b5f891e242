"""Where text comes from: what Python carries, local files, datasets on the hub. A source yields documents as text."""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from supra_cli.core import corpus
from supra_cli.core.data import readers
from supra_cli.core.errors import NotFoundError, SupraError, UsageError, near_miss
from supra_cli.core.recipe import Data, Source
from supra_cli.core.recipe.paths import COMPRESSED, FORMATS, STDLIB, looks_local

_SPLITS = {  # the words by which `datasets` knows a split in the name of a file or folder
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}
# About the data, though with a data file's suffix.
_ABOUT = {"readme", "license", "licence", "copying", "notice", "dataset_info", "dataset_infos", "dataset_dict"}


class Files(NamedTuple):
    """The files of a local source in name order, and sentences on what is there and left out, or read unasked."""

    paths: list[Path]
    remarks: list[str]


def is_on_hub(source: Source) -> bool:
    """Whether a source can only be a hub dataset: `name` or `org/name`, that is neither built in nor a file here."""
    named = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source.path) is not None
    return named and source.path != STDLIB and not looks_local(source.path) and not Path(source.path).exists()


def texts(source: Source, split: str, skip_share: float, count: readers.Count | None = None) -> Iterator[str]:
    """The documents of a local source, `count` counting them. SupraError when more than `skip_share` of its records
    have no usable text.
    """
    count = readers.Count() if count is None else count
    if source.path == STDLIB:
        for document in corpus.documents(_stdlib_split(source.split or split)):
            count.records += 1
            yield document.text
        return
    paths = files(source, split).paths
    if source.text != "text" and all(readers.form(path)[0] == "text" for path in paths):
        raise UsageError(f"{source.path} is plain text and has no field '{source.text}'; leave `text` out")
    for path in paths:
        for text in readers.read(path, source.text, count):
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
    """Every document of the local training sources, to train a tokenizer on; once where several draw from it."""
    for source in {(source.path, source.text, source.split): source for source in data.sources}.values():
        if is_on_hub(source):
            raise UsageError(f"a [tokenizer] is trained on text of this machine, and {source.path} is not on it")
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
        path, paths, remarks = _fixed_folder(source.path), _matches(source.path), []
    if not paths:
        raise NotFoundError(
            f"no data at '{source.path}': expected a file, a folder, a glob, '{STDLIB}' or a dataset on the hub"
            + (near_miss(source.path, [STDLIB]) if "/" not in source.path and "." not in source.path else "")
        )
    if unreadable := next((file for file in paths if _fault(str(file))), None):
        raise SupraError(f"the name of the file {str(unreadable)!r} is not UTF-8; rename it")
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
    """A sentence for each held-out source that is also trained on; what is not on this machine is passed over."""
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
        with readers.opened(path) as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _items(source: Source, split: str) -> set[Any]:
    """What a source draws from, such that two sources share text if they share an item."""
    if source.path == STDLIB or is_on_hub(source):
        return {(source.path, source.name, source.revision, source.split or split)}
    if not Path(source.path).exists() and not _matches(source.path):
        return set()
    return {path.resolve() for path in files(source, split).paths}


def _stdlib_split(split: str) -> corpus.Split:
    if split not in ("train", "validation"):
        raise NotFoundError(f"'{STDLIB}' has no split '{split}'{near_miss(split, ['train', 'validation'])}")
    return split


def _data_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The data files below a folder, and a sentence on the rest. NotFoundError where there is none."""
    present = sorted(path for path in _below(folder) if path.is_file())
    if not present:
        raise NotFoundError(
            f"no data at '{folder}': the folder holds no file; put {', '.join(FORMATS)} files there or name others"
        )
    paths = [path for path in present if _is_data(path.relative_to(folder))]
    rest = [path.relative_to(folder) for path in present if path not in set(paths)]
    if any(path.suffix == ".arrow" and not str(path).startswith(".") for path in rest):
        raise SupraError(f"{folder} holds .arrow files, as `save_to_disk` of datasets writes them; use `to_parquet`")
    shown = next((path for path in rest if not str(path).startswith(".")), rest[0] if rest else None)
    if rest and not paths:
        raise NotFoundError(
            f"no data in {folder}: of a folder {', '.join(FORMATS)} files are read (also {', '.join(COMPRESSED)}), "
            f"none of which is among the {len(rest)} in it, such as {shown}; name other files by a glob"
        )
    left = f"{folder}: {len(paths)} data files; {len(rest)} others are left out, such as {shown}"
    return paths, [left] if rest else []


def _matches(pattern: str) -> list[Path]:
    """The files that a glob names, each once: glob itself repeats them where it has two `**`."""
    return sorted({path for match in glob.glob(pattern, recursive=True) if (path := Path(match)).is_file()})


def _below(folder: Path) -> Iterator[Path]:
    """The files below a folder, in the folders behind links too: each folder once, as links may lead in circles, and by
    its own name where it lies here.
    """
    roots, seen = [folder], set()
    for root in roots:  # which grow on the way
        for path, folders, names in os.walk(root):
            if (place := os.path.realpath(path)) in seen:
                folders.clear()
                continue
            seen.add(place)
            roots += sorted(Path(path, name) for name in folders if Path(path, name).is_symlink())
            yield from (Path(path, name) for name in names)


def _fixed_folder(pattern: str) -> Path:
    """The folder below which a glob varies. What `glob.escape` has put into brackets does not."""
    escaped = r"\[([*?[])\]"
    parts = Path(pattern).parent.parts
    fixed = itertools.takewhile(lambda part: not re.search("[*?[]", re.sub(escaped, "", part)), parts)
    return Path(*(re.sub(escaped, r"\1", part) for part in fixed))


def _is_data(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and readers.form(path)[1] in FORMATS and path.name.partition(".")[0].lower() not in _ABOUT


def _split_name(path: Path) -> str | None:
    """The split that a relative path is named for, its last word deciding."""
    words = re.findall("[a-z]+", path.as_posix().lower())
    named = [split for word in words for split, spellings in _SPLITS.items() if word in spellings]
    return named[-1] if named else None


def _fault(text: str) -> str:
    """Why a record's text cannot be used; empty if it can."""
    try:
        return "" if text.encode() else "is empty"
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        return "is no Unicode text"
