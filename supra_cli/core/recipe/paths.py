"""What the names in a recipe stand for: local files of the formats below, what is built in, or the hub."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Any

STDLIB = "python-stdlib"

COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
FORMATS = {
    ".txt": "text",
    ".jsonl": "records",
    ".ndjson": "records",
    ".json": "records",
    ".parquet": "parquet",
    ".csv": "table",
    ".tsv": "table",
}
"""The data files that a folder is searched for, with or without a suffix of `COMPRESSED`."""

_OTHER_TEXT = (".md", ".py")


def looks_local(name: str) -> bool:
    """Whether a name can only be a path: it begins like one, is a glob or has a data file's suffix."""
    is_pattern = any(mark in name for mark in "*?[")
    suffixes = {*COMPRESSED, *FORMATS, *_OTHER_TEXT}
    return name.startswith((".", "/", "~")) or is_pattern or Path(name).suffix in suffixes


def anchor(raw: dict[str, Any], folder: Path) -> None:
    """Make the local paths of a recipe's tables absolute: names that look local, or that exist in `folder`."""
    data = raw.get("data")
    groups = [data.get("sources"), data.get("validation")] if isinstance(data, dict) else []
    named = [(table, "path") for group in groups if isinstance(group, list) for table in group]
    named += [(table, "teacher") for table in stages] if isinstance(stages := raw.get("stages"), list) else []
    for table, key in [(raw, "base"), *named]:
        name = table.get(key) if isinstance(table, dict) else None
        if isinstance(name, str) and name and "\0" not in name:
            local = os.path.expanduser(name)
            path = folder / local
            if key == "path" and not _exists(path):  # then it is read as a glob, of which the folder is no part
                path = Path(glob.escape(str(folder)), local)
            table[key] = str(path) if looks_local(name) or _exists(path) else name


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name longer than the file system takes
        return False
