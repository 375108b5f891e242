from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from supra_cli.core import checkpoint, report
from supra_cli.core.errors import NotFoundError, SupraError
from supra_cli.core.evaluate.store import Store


def note(folder: Path, task: str, results: dict, model: Path, questions: str = "all") -> None:
    Store(folder).note(task, f"sha256:{checkpoint.identity(model)}", {"metrics": results, "questions": questions})


def weights(model: Path, text: str) -> Path:
    model.mkdir(parents=True)
    (model / "model.safetensors").write_text(text)
    return model


@pytest.fixture
def run(tmp_path: Path) -> Path:
    last, converted = weights(tmp_path / "last", "after"), weights(tmp_path / "converted", "before")
    (tmp_path / "last" / "supra.json").write_text(json.dumps({"tokens": 500, "seconds": 7.5}))
    note(tmp_path / "eval", "cloze", {"acc": {"student": 0.5, "teacher": 0.6, "recovery": 0.7}}, last)
    note(tmp_path / "eval", "ppl", {"nats_per_token": {"student": 1.0, "teacher": 0.0, "recovery": None}}, last)
    note(converted / "eval", "cloze", {"acc": {"student": 0.25, "teacher": 0.6, "recovery": 0.0}}, converted)
    return tmp_path


def test_before_and_after_stand_beside_the_teacher(run: Path) -> None:
    found = report.read(run)
    cloze, perplexity, nats = found.lines
    assert (cloze.teacher, cloze.before, cloze.after, cloze.recovery) == (0.6, 0.25, 0.5, 0.7)
    assert (nats.teacher, nats.before, nats.after, nats.recovery) == (0.0, None, 1.0, None)
    assert (perplexity.teacher, perplexity.before, perplexity.after) == (1.0, None, math.e)
    assert (found.tokens, found.seconds) == (500, 7.5)


def test_another_step_scored_later_is_not_taken_for_the_last(run: Path) -> None:
    step = weights(run / "step-000001", "early")
    note(run / "eval", "cloze", {"acc": {"student": 0.1, "teacher": 0.6, "recovery": 0.1}}, step)
    note(run / "eval", "early_only", {"acc": {"student": 0.1, "teacher": 0.6, "recovery": 0.1}}, step)
    assert [(line.task, line.after) for line in report.read(run).lines if line.metric == "acc"] == [("cloze", 0.5)]
    (run / "last" / "model.safetensors").write_text("trained on")
    with pytest.raises(NotFoundError, match=r"last was not scored yet; run `supra eval .*last`"):
        report.read(run)


def test_figures_of_other_questions_do_not_stand_in_one_row(run: Path) -> None:
    converted = run / "converted"
    scores = {"acc": {"student": 0.2, "teacher": 0.6, "recovery": 0.0}}
    note(converted / "eval", "cloze", scores, converted, questions="the first 4")
    found = report.read(run)
    assert (found.lines[0].before, found.lines[0].after) == (None, 0.5)
    assert found.notes[0].startswith("cloze:")


def interval(value: float) -> dict:
    return {"value": value, "low": value, "high": value, "n": 4}


@pytest.mark.parametrize("tokens", [0, 64])
def test_all_that_was_scored_is_shown(run: Path, tokens: int) -> None:
    """Measures, letters, metrics without a recovery; before training by a baseline, where the run began untrained."""
    last, converted = run / "last", run / "converted"
    began = {"tokens": 500, "seconds": 7.5, "tokens_before": tokens}
    (last / "supra.json").write_text(json.dumps(began))
    baseline = {"before training": {"score": 0.1, "stderr": 0.2}}
    beside = {"student": interval(0.5), "teacher": interval(0.1), "before training": interval(0.9)}
    niah = {"512": {"student": 0.5, "stderr": 0.1, "teacher": None, "recovery": None, "baselines": baseline}}
    weights = f"sha256:{checkpoint.identity(last)}"
    kept = Store(run / "eval")
    kept.note("niah", weights, {"metrics": niah, "letters": {"A": beside}, "questions": "q", "samples": 8})
    kept.note("repeats", weights, {"figures": {"gap 0": beside}, "questions": "q"})
    note(converted / "eval", "repeats", {}, converted, questions="others")
    found = report.read(run)
    (line,) = (line for line in found.lines if line.task == "niah")
    assert (line.after, line.after_stderr, line.questions) == (0.5, 0.1, 8)
    assert (line.before, line.before_stderr) == ((None, None) if tokens else (0.1, 0.2))
    before = {"before training" if tokens else "before": interval(0.9)}
    figures = {"teacher": interval(0.1), "after": interval(0.5), **before}
    assert (found.measures, found.letters) == ({"repeats": {"gap 0": figures}}, {"niah": {"A": figures}})
    assert [text.partition(":")[0] for text in found.notes] == (["repeats"] if tokens else [])


def test_what_was_before_the_model_that_a_run_began_with_is_not_before_the_run(run: Path, tmp_path: Path) -> None:
    """Though that model, to which `converted` is a link, is gone."""
    last, converted = run / "last", run / "converted"
    (last / "supra.json").write_text(json.dumps({"tokens": 500, "seconds": 7.5, "tokens_before": 64}))
    converted.rename(tmp_path / "moved")
    converted.symlink_to(tmp_path / "gone")
    row = {"student": 0.5, "baselines": {"before training": {"score": 0.1, "stderr": 0.2}}}
    note(run / "eval", "cloze", {"acc": row}, last)
    assert report.read(run).lines[0].before is None


def test_a_run_without_a_model_or_without_scores_is_a_sentence(run: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="supra uptrain"):
        report.read(tmp_path / "nothing")
    for path in (run / "eval").iterdir():
        path.unlink()
    with pytest.raises(NotFoundError, match="supra eval"):
        report.read(run)


def test_a_record_that_is_of_another_model_is_a_sentence(run: Path) -> None:
    (run / "last" / "supra.json").write_text(json.dumps({"files": {}, "config": "another"}))
    with pytest.raises(SupraError, match=r"last/supra\.json does not tell .* restore that file"):
        report.read(run)
