"""`supra generate`: stdout is the completion alone."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer


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


def test_a_prompt_is_put_into_the_chat_template_once(supra, base, tmp_path):
    shutil.copytree(base, tmp_path / "tuned")
    tokenizer = AutoTokenizer.from_pretrained(base)

    def written(template: str | dict) -> tuple[str, ...]:
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / "tuned")
        return "generate", tmp_path / "tuned", "--max-new-tokens", 8, "--json"

    given = written("{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %} [answer]")
    document = json.loads(supra(*given, "--apply-chat-template", "-p", "def", "-p", "for").out)
    texts = [f"{tokenizer.bos_token}[user] {said} [answer]" for said in ("def", "for")]
    assert [completion["prompt"] for completion in document["completions"]] == texts
    by_hand = json.loads(supra(*given, "-p", texts[0], "-p", texts[1]).out)
    for key in ("completions", "prompt_tokens"):
        assert document[key] == by_hand[key]
    given = (*given, "--apply-chat-template", "-p", "def")
    for template, said in (
        ("{{ raise_exception('no users here') }}", "no users here"),
        ("{{ messages[0].content + 1 }}", "the chat template of"),
        ("{{ 1 / 0 }}", "division by zero"),
    ):
        written(template)
        result = supra(*given)
        assert (result.code, said in result.error) == (1, True), result.err
    written({"tools": "{{ messages }}"})
    (tmp_path / "tuned" / "chat_template.jinja").unlink()
    result = supra(*given)
    assert (result.code, "no default specified" in result.error) == (1, True), result.err
    result = supra("generate", base, "--apply-chat-template", "-p", "def")
    assert (result.code, "has no chat template" in result.error) == (2, True)


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
        ((), "--prompt-file, or -p - for what comes on stdin"),
        (("-p", "-", "--prompt-file", "-"), "- is given 2 times"),
        (("--prompt-file", "."), "--prompt-file . is a directory"),
        (("-p", "x", "--repetition-penalty", "0"), "--repetition-penalty is 0"),
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


def piped(monkeypatch, data):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))


def completions(supra, base, *arguments):
    return json.loads(supra("generate", base, *arguments, "--max-new-tokens", 4, "--json").out)["completions"]


def test_prompts_come_from_the_command_line_stdin_and_files_in_this_order(supra, base, monkeypatch, tmp_path):
    (tmp_path / "a.txt").write_bytes("return caf\u00e9\n".encode())
    piped(monkeypatch, b"def read(\n")
    given = ("return caf\u00e9", "self", "def read(")
    mixed = completions(supra, base, "--prompt-file", tmp_path / "a.txt", "-p", "self", "-p", "-")
    assert [one["prompt"] for one in mixed] == [given[1], given[2], given[0]]
    for one in mixed:
        assert completions(supra, base, "-p", one["prompt"]) == [one]


@pytest.mark.parametrize(
    ("data", "prompt"),
    [
        (b"\xef\xbb\xbfdef", "def"),
        (b"def\r\nself\r\n", "def\r\nself"),
        (b"def\n\n", "def\n"),
        (b"\n def ", "\n def "),
        (b"def\r", "def\r"),
    ],
    ids=["byte-order mark", "CRLF", "two line ends", "spaces", "CR"],
)
@pytest.mark.parametrize("stdin", [True, False], ids=["stdin", "file"])
def test_a_prompt_loses_its_mark_and_its_last_line_end_and_nothing_else(
    supra, base, monkeypatch, tmp_path, data, prompt, stdin
):
    piped(monkeypatch, data)
    (tmp_path / "p.txt").write_bytes(data)
    arguments = ("-p", "-") if stdin else ("--prompt-file", tmp_path / "p.txt")
    assert completions(supra, base, *arguments)[0]["prompt"] == prompt


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"\n", "is empty"),
        ("def".encode("utf-16"), "is not UTF-8 from byte 0 on"),
        ("caf\u00e9".encode("latin-1"), "is not UTF-8 from byte 3 on"),
        (b"\x7fELF\0\0", "looks binary"),
    ],
)
@pytest.mark.parametrize("stdin", [True, False], ids=["stdin", "file"])
def test_what_is_no_prompt_is_exit_2_and_named(supra, base, monkeypatch, tmp_path, data, words, stdin):
    piped(monkeypatch, data)
    (tmp_path / "p.txt").write_bytes(data)
    result = supra("generate", base, *(("-p", "-") if stdin else ("--prompt-file", "p.txt")))
    assert result.code == 2
    assert result.error.startswith(f"error: {'stdin' if stdin else 'p.txt'} {words}")


def test_stdin_that_is_closed_is_exit_2(supra, base, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    result = supra("generate", base, "-p", "-")
    assert result.code == 2
    assert "stdin is closed" in result.error


@pytest.mark.parametrize("path", ["absent.txt", "a.txt/b.txt"])
def test_a_prompt_file_that_is_not_there_is_exit_3(supra, base, tmp_path, path):
    (tmp_path / "a.txt").touch()
    result = supra("generate", base, "--prompt-file", path)
    assert result.code == 3
    assert f"--prompt-file {path} is not there" in result.error


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every file")
def test_a_prompt_file_that_may_not_be_read_is_exit_1(supra, base, tmp_path):
    (tmp_path / "a.txt").touch(mode=0o000)
    result = supra("generate", base, "--prompt-file", "a.txt")
    assert result.code == 1
    assert "a.txt cannot be read: Permission denied" in result.error


def test_a_token_that_the_model_does_not_have_is_a_sentence_that_names_both(supra, base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "base")
    words = AutoTokenizer.from_pretrained(folder)
    words.add_tokens([AddedToken("<image>", special=True)], special_tokens=True)
    words.save_pretrained(folder)
    assert supra("generate", folder, "-p", "def", "--max-new-tokens", 1).code == 0
    result = supra("generate", folder, "-p", "def <image>", "--max-new-tokens", 1)
    assert result.code == 1
    assert result.error.count(str(folder)) == 2
    assert "'<image>'" in result.error


def test_the_model_s_own_settings_that_are_not_followed_are_told(supra, base, tmp_path):
    assert "generation_config" not in supra("generate", base, "-p", "def", "--max-new-tokens", 1).err
    folder = shutil.copytree(base, tmp_path / "base")
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_sample": True, "temperature": 0.6}))
    result = supra("generate", folder, "-p", "def", "--max-new-tokens", 1)
    assert "not used of the model's generation_config.json: do_sample True, temperature 0.6;" in result.err
