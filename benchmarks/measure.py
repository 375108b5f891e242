"""What the scripts here share: the machine's description, printing and writing of a result, common options."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from supra_cli.core.bench.timing import machine, tables, target

__all__ = ["machine", "options", "report", "target"]


def options(description: str, rounds: int) -> argparse.ArgumentParser:
    """A parser with the options of every timing: --device, --json, --output, --rounds."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    parser.add_argument("--rounds", type=int, default=rounds, help="interleaved rounds")
    return parser


def report(result: dict, path: Path | None, as_json: bool) -> None:
    """Write the result where asked; print it as JSON or as tables of its rows and of its targets."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    if as_json:
        json.dump(result, sys.stdout, indent=1)
        print()
        return
    for header, cells in tables(result):
        widths = [max(len(x) for x in column) for column in zip(header, *cells, strict=True)]
        for line in (header, ["-" * width for width in widths], *cells):
            print("  ".join(x.rjust(width) for x, width in zip(line, widths, strict=True)))
        print()
