"""No number in a table of the pages is typed by hand."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks import tables


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_a_page_says_what_the_results_say(page) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("<!-- table: ") == text.count("<!-- end -->") == len(tables._BLOCK.findall(text))
    assert tables.render(text) == text, "run `python benchmarks/tables.py`"


def test_the_readme_has_its_tables() -> None:
    names = [name for _, name, _ in tables._BLOCK.findall(tables.README.read_text(encoding="utf-8"))]
    assert names == ["demo", "ablation-short", "smollm2", "operator", "bases"]


def test_the_commands_of_the_pages_are_those_that_wrote_the_results() -> None:
    page = (tables.ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    lines = re.findall(r"^    (python .*?)( --output (benchmarks/results/\S+))$", page, re.MULTILINE)
    assert len(lines) == 10
    for command, output, file in lines:
        assert json.loads((tables.ROOT / file).read_text())["command"].removesuffix(output) == command
