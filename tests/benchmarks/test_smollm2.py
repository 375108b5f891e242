"""What is known of a student is of the student that is asked for."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import smollm2


@pytest.fixture
def run(monkeypatch, tmp_path):
    """The script with so many seconds, nothing trained or measured: what it asked for, and the results it wrote."""
    done = []

    def main(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["smollm2", *arguments])
        assert smollm2.main() == 0

    def child(*command: str) -> None:
        done.append(command[-2:])
        main(*command[2:])

    def asked(seconds: int) -> tuple[list[tuple[str, str]], dict]:
        done.clear()
        output = tmp_path / "results.json"
        main("--seconds", str(seconds), "--jobs", "1", "--work", str(tmp_path / "work"), "--output", str(output))
        return list(done), json.loads(output.read_text())

    monkeypatch.setattr(smollm2, "find_spec", lambda name: True)
    monkeypatch.setattr(smollm2, "teacher", lambda folder, gguf: None)
    monkeypatch.setattr(smollm2, "supra", lambda *arguments: None)
    monkeypatch.setattr(smollm2, "train", lambda base, name, seconds, folder: {"seconds": seconds})
    for kind in ("text", "needle", "decoding"):
        monkeypatch.setattr(smollm2, kind, lambda path: {"of": str(path)})
    monkeypatch.setattr(smollm2, "complaint", child)
    return asked


def test_results_of_other_settings_are_not_taken_for_those_that_are_asked(run, monkeypatch):
    assert {name for name, _ in run(60)[0]} == {"teacher", "window", *smollm2.STUDENTS}
    assert run(60)[0] == []
    done, written = run(90)
    assert {name for name, _ in done} == {*smollm2.STUDENTS}
    assert all(written["models"][name]["training"] == {"seconds": 90} for name in smollm2.STUDENTS)
    changed = smollm2.STUDENTS["supra"] | {"mixer": {"name": "supra", "gain": "head"}}
    monkeypatch.setitem(smollm2.STUDENTS, "supra", changed)
    assert run(90)[0] == [("supra", kind) for kind in ("training", "text", "decoding", "needle")]
    monkeypatch.setattr(smollm2, "WINDOW", ["--mixer", "window"])
    assert run(90)[0] == [("window", kind) for kind in ("text", "decoding", "needle")]
