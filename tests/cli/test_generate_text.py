"""`supra generate`: stdout is the completion alone."""

from __future__ import annotations

import json
import re

import pytest


@pytest.fixture
def converted(supra, base, tmp_path):
    assert supra("convert", base, "-o", tmp_path / "runs" / "student").code == 0
    return tmp_path / "runs" / "student"


def test_stdout_is_the_completion_and_stderr_the_figures(supra, converted):
    plain = supra("generate", converted, "-p", "def read", "--max-new-tokens", 12)
    assert plain.code == 0
    document = json.loads(supra("generate", converted, "-p", "def read", "--max-new-tokens", 12, "--json").out)
    assert plain.out == document["completions"][0]["text"] + "\n"
    assert "tokens/s" in plain.err
    assert "state and cache" in plain.err


def test_streamed_and_whole_are_the_same_and_quiet_is_quiet(supra, base):
    arguments = ("generate", base, "-p", "def read", "--max-new-tokens", 12, "--temperature", "0.9", "--seed", 7)
    streamed, whole = supra(*arguments), supra(*arguments, "--no-stream", "--quiet")
    assert streamed.out == whole.out
    assert whole.err == ""


def test_the_newest_output_is_the_default_and_is_named(supra, converted):
    result = supra("generate", "-p", "def", "--max-new-tokens", 2)
    assert result.code == 0
    assert "runs/student" in result.err


def test_several_prompts_are_a_batch(supra, base):
    arguments = ("--max-new-tokens", 8, "--json")
    both = json.loads(supra("generate", base, "-p", "def read", "-p", "return", *arguments).out)["completions"]
    for prompt, completion in zip(("def read", "return"), both, strict=True):
        alone = json.loads(supra("generate", base, "-p", prompt, *arguments).out)["completions"]
        assert alone == [completion]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "-p"),
        (("-p", b"caf\xe9".decode(errors="surrogateescape")), "is not UTF-8"),
        (("-p", "x", "--top-p", "2"), "--top-p is 2.0"),
        (("-p", "x", "--temperature", "1e-42"), "--temperature is 1e-42"),
        (("-p", "x", "--max-new-tokens", "0"), "--max-new-tokens is 0"),
        (("-p", "x", "--num-beams", "2", "--temperature", "1"), "--num-beams"),
        (("-p", "x", "--device", "tpu"), "unknown device 'tpu'"),
        (("-p", "x", "--dtype", "float7"), "unknown dtype 'float7'"),
    ],
)
def test_wrong_flags_are_exit_2(supra, base, arguments, words):
    result = supra("generate", base, *arguments)
    assert result.code == 2
    assert words in result.error
    assert result.out == ""


def test_no_model_at_all_is_exit_3(supra):
    result = supra("generate", "-p", "x")
    assert result.code == 3
    assert "supra convert" in result.error


def test_a_device_that_is_not_there_is_exit_5(supra, base):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert supra("generate", base, "-p", "x", "--device", "cuda").code == 5


def test_compiling_is_told_beside_the_figures(supra, base, monkeypatch):
    """The step itself as it is: what compiling makes of it is tests/core/test_generate.py's."""
    monkeypatch.setattr("torch.compile", lambda step, options: step)
    compiled = supra("generate", base, "-p", "def", "--max-new-tokens", 4, "--compile")
    assert re.search(r"; compiled in \d+ s; 3 decoded", compiled.err)
    document = json.loads(supra("generate", base, "-p", "def", "--max-new-tokens", 4, "--compile", "--json").out)
    assert document["compile_seconds"] > 0
    assert document["completions"][0]["text"] + "\n" == compiled.out


def test_beams_are_not_compiled(supra, base):
    refused = supra("generate", base, "-p", "def", "--num-beams", 2, "--compile")
    assert refused.code == 2
    assert "--num-beams" in refused.error
