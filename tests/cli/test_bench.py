"""`supra bench`: figures as a table and as one JSON document, a wrong value as one sentence."""

from __future__ import annotations

import json

import pytest

from supra_cli.__main__ import main


@pytest.mark.parametrize(
    "given", [("operator", "--tokens", "65"), ("decode", "--position", "3"), ("train", "--shape", "1x9")]
)
def test_the_document_has_figures_beside_the_machines_rates(given, capfd, tmp_path):
    path = tmp_path / "deep" / "found.json"
    assert main(["bench", *given, "--device", "cpu", "--rounds", "1", "--json", "--quiet", "-o", str(path)]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["benchmark"] == given[0]
    assert all(row["roofline_ms"] > 0 and row["matrix_gflops"] > 0 for row in found["rows"])
    assert json.loads(path.read_text())["rows"] == found["rows"]


def test_a_compiled_step_is_timed_where_it_is_asked_for(capfd, monkeypatch):
    seen = []
    monkeypatch.setattr("torch.compile", lambda step, options: seen.append(step) or step)
    given = ("--position", "3", "--compile", "--device", "cpu", "--rounds", "1", "--json", "--quiet")
    assert main(["bench", "decode", *given]) == 0
    found = json.loads(capfd.readouterr().out)
    assert [row["model"] for row in found["rows"]] == ["softmax", "supra"]
    assert found["compiled"] is True
    assert len(seen) == 2


def test_a_converted_model_keeps_its_own_mixer_and_layers(capfd, tmp_path):
    student = str(tmp_path / "student")
    options = ["--mixer", "lolcats", "--set", "mixer.window=[8, 8, 4, 4, 8, 8]"]
    assert main(["convert", "tiny", *options, "--keep", "every:2", "--output", student, "--quiet"]) == 0
    capfd.readouterr()
    given = ("--position", "3", "--layers", "4", "--device", "cpu", "--rounds", "1", "--json", "--quiet")
    assert main(["bench", "decode", student, *given]) == 0
    softmax, student = json.loads(capfd.readouterr().out)["rows"]
    assert (softmax["model"], student["model"], student["layers"]) == ("softmax", "lolcats", 4)
    assert 0 < softmax["cache_bytes"] < student["cache_bytes"]


def test_the_table_names_the_machine(capfd):
    assert main(["bench", "operator", "--tokens", "9", "--device", "cpu", "--rounds", "1", "--quiet"]) == 0
    out = capfd.readouterr().out
    assert "matrix_gflops" in out
    assert "1 rounds" in out


@pytest.mark.parametrize("verb", ["operator", "decode", "train"])
def test_a_file_that_cannot_be_written_is_told_before_anything_is_timed(verb, capfd, monkeypatch, tmp_path):
    monkeypatch.setattr(f"supra_cli.core.bench.{verb}", lambda *_: pytest.fail("timed"))
    assert main(["bench", verb, "--device", "cpu", "-o", str(tmp_path)]) == 2
    assert "is a folder, expected a file to write" in capfd.readouterr().err


def test_where_the_figures_were_written_is_told(capfd, monkeypatch, tmp_path):
    found = {"rows": [{"ms": 1.0}], "hardware": {"gpus": [], "cpu": "a CPU"}, "clock": "a clock", "rounds": 1}
    monkeypatch.setattr("supra_cli.core.bench.operator", lambda *_: found)
    assert main(["bench", "operator", "--device", "cpu", "-o", str(tmp_path / "found.json")]) == 0
    assert f"written to {tmp_path / 'found.json'}" in capfd.readouterr().err


@pytest.mark.parametrize("verb", ["operator", "decode", "train"])
def test_the_help_names_what_is_timed_by_default(verb, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["bench", verb, "--help"]) == 0
    shown = capfd.readouterr().out
    for default in {
        "operator": ("2048, 8192, 32768",),
        "decode": ("100, 16000; on a GPU 32768", "1; on a GPU 16"),
        "train": ("8x512, 1x4096", "softmax, supra, t2r"),
    }[verb]:
        assert f"[default: ({default})]" in shown


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("train", "--shape", "8by5"), "'8by5', expected batch and tokens like 8x512"),
        (("operator", "--device", "gpu"), "unknown device 'gpu'"),
    ],
)
def test_a_wrong_value_is_a_usage_error(given, said, capfd):
    assert main(["bench", *given]) == 2
    assert said in capfd.readouterr().err
