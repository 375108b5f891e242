"""A tiny plain model on disk, and `supra` run as the console script runs it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from supra_cli.__main__ import main


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one sentence of an error."""
        return next(line for line in self.err.splitlines() if line.startswith("error: "))


@pytest.fixture
def supra(capsys, monkeypatch, tmp_path):
    """`supra("convert", "base")` in an empty directory."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Result:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A plain Llama of four layers with a tokenizer, as transformers saves it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from supra_cli.core.data import tokenizer as bpe

    path = tmp_path_factory.mktemp("models") / "base"
    tokenizer = bpe.train(["def read(self, size=-1):\n    return self.buffer[:size]\n" * 50], 300)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
