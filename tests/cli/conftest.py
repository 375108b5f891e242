"""A tiny plain model on disk, and `supra` run as the console script runs it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny import save_base

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
    text = "def read(self, size=-1):\n    return self.buffer[:size]\n" * 50
    return save_base(tmp_path_factory.mktemp("models") / "base", [text], num_hidden_layers=4)
