from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from supra_cli.core import report
from supra_cli.core.errors import NotFoundError


def note(folder: Path, task: str, results: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{task}.json").write_text(json.dumps({"task": task, "results": {"metrics": results}, "records": {}}))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / "supra.json").write_text(json.dumps({"tokens": 500, "seconds": 7.5}))
    note(tmp_path / "eval", "cloze", {"acc": {"student": 0.5, "teacher": 0.6, "recovery": 0.7}})
    note(tmp_path / "eval", "ppl", {"nats_per_token": {"student": 1.0, "teacher": 0.0, "recovery": None}})
    note(tmp_path / "converted" / "eval", "cloze", {"acc": {"student": 0.25, "teacher": 0.6, "recovery": 0.0}})
    return tmp_path


def test_before_and_after_stand_beside_the_teacher(run: Path) -> None:
    found = report.read(run)
    cloze, perplexity, nats = found.lines
    assert (cloze.teacher, cloze.before, cloze.after, cloze.recovery) == (0.6, 0.25, 0.5, 0.7)
    assert (nats.teacher, nats.before, nats.after, nats.recovery) == (0.0, None, 1.0, None)
    assert (perplexity.teacher, perplexity.before, perplexity.after) == (1.0, None, math.e)
    assert (found.tokens, found.seconds) == (500, 7.5)


def test_a_run_without_a_model_or_without_scores_is_a_sentence(run: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="supra uptrain"):
        report.read(tmp_path / "nothing")
    for path in (run / "eval").iterdir():
        path.unlink()
    with pytest.raises(NotFoundError, match="supra eval"):
        report.read(run)
