"""The laws on each minor version of transformers between the bounds of pyproject.toml, into docs/compatibility.md.

    python tests/versions.py [VERSION ...]

Each version, the newest patch of its minor or the lower bound itself, is put with what it needs into a folder of its
own, which stands before the environment's packages; torch stays the environment's.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from datetime import date
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- versions -->\n", "<!-- end -->\n"


def versions() -> list[str]:
    """The lower bound, and the newest patch of every minor after it, below the upper bound."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    bounds = next(found for line in declared if (found := Requirement(line)).name == "transformers").specifier
    pip = [sys.executable, "-m", "pip", "index", "versions", "transformers"]
    listed = subprocess.run(pip, capture_output=True, text=True, check=True).stdout
    known = sorted(Version(text) for text in re.search(r"Available versions: (.*)", listed)[1].split(", "))
    allowed = [version for version in known if version in bounds]
    newest = {version.minor: version for version in allowed}
    return [str(version) for version in sorted({allowed[0], *newest.values()})]


def try_laws(version: str) -> str:
    """Install `version`, run the laws on it; what pytest says last."""
    folder = ROOT / ".versions" / version
    if not folder.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", folder, f"transformers=={version}"]
        subprocess.run(pip, check=True)
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    found = subprocess.run(
        [sys.executable, "-c", "import transformers; print(transformers.__version__)"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.strip() == version, found.stdout
    command = [sys.executable, "-m", "pytest", "-q", "--numprocesses", "auto", "-p", "no:cacheprovider", "tests/laws"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout[-3000:], flush=True)
    summary = [line for line in done.stdout.splitlines() if re.search(r"\d+ (passed|failed|error)", line)]
    if not summary:
        return "did not run"
    return ", ".join(re.findall(r"\d+ (?:passed|failed|errors?|skipped)", summary[-1]))


def main() -> None:
    import torch

    rows = {}
    for version in sys.argv[1:] or versions():
        rows[version] = f"| {version} | {torch.__version__} | {try_laws(version)} | {date.today()} |"
        page = PAGE.read_text(encoding="utf-8")
        before, _, rest = page.partition(BEGIN)
        table, _, after = rest.partition(END)
        kept = {line.split("|")[1].strip(): line for line in table.splitlines() if re.match(r"\| \d", line)}
        lines = [line for _, line in sorted((kept | rows).items(), key=lambda item: Version(item[0]))]
        head = "| transformers | torch | tests/laws | on |\n| --- | --- | --- | --- |\n"
        PAGE.write_text(before + BEGIN + head + "\n".join(lines) + "\n" + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
