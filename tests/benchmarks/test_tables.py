"""No number in a table of the pages is typed by hand."""

from __future__ import annotations

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
