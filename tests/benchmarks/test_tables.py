"""No number in README.md is typed by hand."""

from __future__ import annotations

from benchmarks import tables


def test_the_readme_says_what_the_results_say() -> None:
    text = tables.README.read_text(encoding="utf-8")
    assert text.count("<!-- table: ") == text.count("<!-- end -->") == 2
    assert tables.render(text) == text, "run `python benchmarks/tables.py`"
