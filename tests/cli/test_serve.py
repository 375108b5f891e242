"""`supra serve`, asked by OpenAI's own client over loopback."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from openai import DefaultHttpxClient, OpenAI
from tiny import save_base
from transformers import AutoTokenizer
from transformers.cli.serving.model_manager import ModelManager

from supra_cli.core import checkpoint

TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
CHAT = [{"role": "user", "content": "def read"}]
LENGTH = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A converted model, softmax in its second layer, with a chat template."""
    text = "def read(self, size=-1):\n    return self.buffer[:size]\n" * 50
    models = tmp_path_factory.mktemp("models")
    base = save_base(models / "base", [text], num_hidden_layers=3)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(base)
    return checkpoint.convert(base, models / "student", mixer="supra", options={}, keep="1", seed=0)


@contextmanager
def serving(*arguments: object) -> Iterator[tuple[subprocess.Popen, str]]:
    """`supra serve` on a free port, as soon as it listens, and its address."""
    command = [sys.executable, "-m", "supra_cli", "serve", *map(str, arguments), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if match := re.search(r"running on (http://\S+)", line):
                yield process, match[1]
                return
        pytest.fail(f"no server: {''.join(lines)}")
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@contextmanager
def asking(address: str) -> Iterator[OpenAI]:
    with DefaultHttpxClient(trust_env=False) as http:
        yield OpenAI(base_url=f"{address}/v1", api_key="none", http_client=http, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def client(folder) -> Iterator[OpenAI]:
    with serving(folder) as (_, address), asking(address) as client:
        yield client


def greedy(folder: Path) -> Callable[..., str]:
    """What the model in a directory says after a text, loaded in this process."""
    tokenizer, model = checkpoint.load_tokenizer(folder), checkpoint.load(folder)

    def complete(text: str, **call: bool) -> str:
        ids = tokenizer(text, return_tensors="pt", **call).input_ids
        settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": LENGTH, "do_sample": False}
        return tokenizer.decode(model.generate(ids, **settings)[0, ids.shape[1] :], skip_special_tokens=True)

    return complete


@pytest.fixture(scope="module")
def complete(folder) -> Callable[..., str]:
    return greedy(folder)


def whole(text: str) -> str:
    """Without a last character that the length has cut, which is not streamed."""
    return text.rstrip("\ufffd")


@pytest.mark.skipif(not hasattr(ModelManager, "list_models"), reason="older transformers list the hub's cache instead")
def test_the_model_is_listed_under_its_directory(client, folder):
    assert [model.id for model in client.models.list()] == [str(folder)]


def test_a_completion_is_what_the_model_says(client, folder, complete):
    answer = client.completions.create(model=str(folder), prompt="def read", max_tokens=LENGTH, temperature=0)
    assert answer.choices[0].text == complete("def read") != ""
    assert answer.usage.completion_tokens <= LENGTH


def test_a_completion_is_streamed(client, folder, complete):
    call = {"prompt": "def read", "max_tokens": LENGTH, "temperature": 0, "stream": True}
    pieces = [chunk.choices[0].text for chunk in client.completions.create(model=str(folder), **call)]
    assert whole("".join(pieces)) == whole(complete("def read"))
    assert sum(map(bool, pieces)) > 1


def test_a_chat_goes_by_the_template_streamed_or_not(client, folder, complete):
    call = {"model": str(folder), "messages": CHAT, "max_tokens": LENGTH, "temperature": 0}
    answer = client.chat.completions.create(**call).choices[0].message
    assert answer.role == "assistant"
    assert answer.content == complete("def read\n", add_special_tokens=False) != ""
    pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**call, stream=True)]
    assert whole("".join(pieces)) == whole(answer.content)
    assert sum(map(bool, pieces)) > 1


def test_a_response_is_given_whole_or_streamed(client, folder, complete):
    call = {"model": str(folder), "input": CHAT[-1]["content"], "max_output_tokens": LENGTH, "temperature": 0}
    text = client.responses.create(**call, stream=False).output_text
    assert whole(text) == whole(complete("def read\n", add_special_tokens=False)) != ""
    events = list(client.responses.create(**call, stream=True))
    pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert whole("".join(pieces)) == whole(text)


def test_requests_at_the_same_time_do_not_meet(client, folder, complete):
    prompts = ["def read", "return self", "buffer[:size", "    "]

    def ask(prompt: str) -> str:
        answer = client.completions.create(model=str(folder), prompt=prompt, max_tokens=LENGTH, temperature=0)
        return answer.choices[0].text

    with ThreadPoolExecutor(len(prompts)) as threads:
        assert list(threads.map(ask, prompts)) == [complete(prompt) for prompt in prompts]


def test_a_plain_model_is_served_too_until_an_interrupt_ends_it_as_any_verb(base):
    with serving(base) as (process, address):
        with asking(address) as client:
            answer = client.completions.create(model=str(base), prompt="def read", max_tokens=LENGTH, temperature=0)
        assert answer.choices[0].text == greedy(base)("def read")
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "Traceback" not in rest
        assert "internal error" not in rest


def test_a_model_without_a_template_is_served_for_completions_and_says_so(supra, base, monkeypatch):
    monkeypatch.setattr("transformers.cli.serve.Serve.__init__", lambda self, *_, **__: None)
    result = supra("serve", base, "--port", 0)
    assert result.code == 130  # a server ends by an interrupt alone
    assert "no chat template" in result.err


def test_a_bad_directory_is_refused_before_anything_is_served(supra, base, tmp_path):
    supra("convert", base, "-o", "student", "--quiet")
    (tmp_path / "student" / "model-mixers.safetensors").unlink()
    refused = supra("generate", "student", "-p", "x")
    result = supra("serve", "student", "--port", 0)
    assert (result.code, result.error) == (refused.code, refused.error)
    assert "model-mixers.safetensors" in result.error
    assert supra("serve", "nowhere/at/all").code == 3


def test_a_config_that_names_no_class_is_refused(supra, base, tmp_path):
    shutil.copytree(base, tmp_path / "nameless")
    config = json.loads((base / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "nameless" / "config.json").write_text(json.dumps(config))
    result = supra("serve", "nameless", "--port", 0)
    assert result.code == 2
    assert "'architectures'" in result.error


def test_what_the_server_cannot_read_is_refused(supra, base, tmp_path):
    """Every other verb reads over the mark, and this one over that of supra.json."""
    supra("convert", base, "-o", "student", "--quiet")
    for name in ("supra.json", "config.json"):
        (tmp_path / "student" / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / "student" / name).read_bytes())
    assert supra("generate", "student", "-p", "x", "--max-new-tokens", 1).code == 0
    result = supra("serve", "student", "--port", 0)
    assert result.code == 2
    assert "student/config.json begins with a byte-order mark" in result.error


def test_a_port_in_use_is_refused_before_the_model_is_loaded(supra, base):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = supra("serve", base, "--port", port)
    assert result.code == 1
    assert result.error == (
        f"error: cannot listen at 127.0.0.1, port {port}: address already in use; choose another --port or --host"
    )
    assert "Loading" not in result.err


def test_a_host_that_is_none_is_refused(supra, base):
    result = supra("serve", base, "--host", "no such host", "--port", 0)
    assert result.code == 2
    assert "no such host" in result.error


def test_the_extra_is_named_where_it_is_missing(supra, base, monkeypatch):
    monkeypatch.setattr("supra_cli.core.serve.is_serve_available", lambda: False)
    result = supra("serve", base)
    assert result.code == 2
    assert "pip install '.[serving]'" in result.error
