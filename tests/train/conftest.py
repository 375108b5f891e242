"""A base small enough to be uptrained in a second, and a recipe that goes through all three stages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from supra_cli.core import corpus
from supra_cli.core.data import tokenizer as bpe

torch.set_num_threads(1)

TEXT = "".join(document.text for document in corpus.documents("validation"))[:60_000]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with grouped queries and a 300-token vocabulary, as transformers saves it."""
    folder = tmp_path_factory.mktemp("base")
    words = bpe.train([TEXT], 300)
    words.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,  # its matrices are large enough for 8-bit moments
        tie_word_embeddings=True,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUPRA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def raw_recipe(base: Path, text_file: Path) -> dict[str, Any]:
    """Three stages of four steps of two rows, in micro-batches of one."""
    stage = {"tokens": 256, "batch_tokens": 64, "micro_batch_tokens": 32, "lr": 1e-3, "warmup_steps": 2}
    return {
        "base": str(base),
        "mixer": {"name": "supra"},
        "data": {
            "seq_len": 32,
            "sources": [{"path": str(text_file), "weight": 2.0}, {"path": str(text_file), "repeat": "text"}],
            "validation": [{"path": str(text_file)}],
            "validation_tokens": 256,
        },
        "checkpoint": {"every_steps": 3, "keep_last": 2},
        "validate_every_steps": 4,
        "stages": [{"kind": kind, **stage} for kind in ("transfer", "distill", "finetune")],
    }


@pytest.fixture
def recipe_file(tmp_path: Path, raw_recipe: dict[str, Any]) -> Callable[..., Path]:
    """Writes the recipe, with top-level keys replaced, and returns its path."""

    def write(**replaced: Any) -> Path:
        path = tmp_path / "recipe.toml"
        path.write_text(tomli_w.dumps(raw_recipe | replaced), encoding="utf-8")
        return path

    return write
