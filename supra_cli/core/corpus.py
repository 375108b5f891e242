"""The text that every Python carries: the standard library's sources and the help topics of `pydoc_data`.

It is what the bundled teacher was pretrained on, what the demo uptrains on and what the offline evaluation tasks ask
about, so nothing has to be downloaded. The split into training and held-out documents is a rule, not a list: it holds
for every Python version.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

Split = Literal["train", "validation"]

# Tests are left out because many distributions leave them out; the rest is not the library's own text.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3"}
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")


class Document(NamedTuple):
    name: str
    text: str


def split_of(name: str) -> Split:
    """`validation` for the 1/16 of all names whose SHA-256 begins with a zero nibble."""
    return "validation" if hashlib.sha256(name.encode()).hexdigest()[0] == "0" else "train"


def documents(split: Split | None = None) -> Iterator[Document]:
    """The documents in name order: one a module (`asyncio.events`), one a help topic (`pydoc_data.topics:if`)."""
    for name, path in sorted(_modules()):
        if split is None or split == split_of(name):
            yield Document(name, path.read_text(encoding="utf-8", errors="replace"))
    for name, text in sorted(_topics()):
        if split is None or split == split_of(name):
            yield Document(name, text)


def _modules() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED_FOLDERS.isdisjoint(parts) and not any(part.startswith(_SKIPPED_PREFIXES) for part in parts):
            name = ".".join(parts).removesuffix(".__init__")
            if name != "pydoc_data.topics":
                yield name, path


def _topics() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    for topic, text in topics.items():
        yield f"pydoc_data.topics:{topic}", text.strip() + "\n"
