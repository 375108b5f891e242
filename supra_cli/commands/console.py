"""What the verbs print with: results on stdout as text or one JSON document, everything else on stderr.

Tables have rules and colours on a terminal (`NO_COLOR` is respected) and are plain aligned columns in a pipe.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from supra_cli.core.errors import UsageError
from supra_cli.core.files import dumps


def note(message: str) -> None:
    """One line on stderr for the person watching; nothing under `--quiet`."""
    if not is_quiet():
        print(message, file=sys.stderr)


def is_quiet() -> bool:
    """Whether `--quiet` was given."""
    return not logging.getLogger("supra_cli").isEnabledFor(logging.INFO)


def result(text: str) -> None:
    """The result, on stdout."""
    print(text)


def raw(text: str) -> None:
    """A part of the result, on stdout at once and without a line's end."""
    sys.stdout.write(text)
    sys.stdout.flush()


def document(value: Any) -> None:
    """The result as one JSON document on stdout; paths and other objects as their text, no NaN."""
    print(dumps(value, indent=2, ensure_ascii=not _is_utf8(sys.stdout)))


def make_room(output: Path) -> None:
    """Make the folder of a file that --output names; UsageError if it cannot be written, now and not after hours."""
    try:
        if output.is_dir():
            raise UsageError(f"--output {output} is a folder, expected a file to write")
        place = output
        if not output.exists():
            place = (output.resolve() if output.is_symlink() else output).parent
            place.mkdir(parents=True, exist_ok=True)
        if not os.access(place, os.W_OK):
            raise UsageError(f"--output {output} cannot be written: permission denied; choose another place")
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}"
        raise UsageError(f"--output {output} cannot be written ({reason}); choose another place") from error


def table(rows: Iterable[Sequence[object]], header: Sequence[str] | None = None, title: str | None = None) -> None:
    """Rows on stdout, the first column to the left and numbers to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    columns = len(header or cells[0])
    right = [all(_is_number(row[column]) for row in cells) and bool(cells) for column in range(columns)]
    if sys.stdout.isatty():
        _rich_table(cells, header, title, right)
    else:
        _plain_table(cells, header, title, right)


def number(value: float) -> str:
    """A count with thousands separators up to a million, then three significant digits with M, B or T: 537.0M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}" if abs(value) / size < 100 else f"{value / size:.1f}{unit}"
    return f"{value:,.0f}"


def size(count: float) -> str:
    """Bytes in binary units: 32.0 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def duration(seconds: float) -> str:
    """48 s, 12 min, 3.4 h or 12.3 days."""
    for unit, length, limit in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 48 * 3600)):
        if seconds < limit:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds / 86400:.3g} days"


def _plain_table(cells: list[list[str]], header: Sequence[str] | None, title: str | None, right: list[bool]) -> None:
    lines = [list(header)] if header else []
    lines += cells
    widths = [max(len(line[column]) for line in lines) for column in range(len(right))]
    if title:
        print(title)
    for line in lines:
        aligned = [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ]
        print("  ".join(aligned).rstrip())


def _rich_table(cells: list[list[str]], header: Sequence[str] | None, title: str | None, right: list[bool]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=header is not None, pad_edge=False)
    for column, to_right in enumerate(right):
        grid.add_column(header[column] if header else "", justify="right" if to_right else "left")
    for row in cells:
        grid.add_row(*(Text(cell) for cell in row))
    Console().print(grid)


def _is_number(cell: str) -> bool:
    return not cell or cell in ("–", "-") or cell.lstrip("+-−≈")[:1].isdigit()


def _is_utf8(stream: Any) -> bool:
    return (getattr(stream, "encoding", None) or "").lower().replace("-", "") == "utf8"
