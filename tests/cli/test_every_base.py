"""From a base's own directory to a student that writes: every registered base, by the command line."""

from __future__ import annotations

import json

import pytest
import tomli_w
from tiny import save_base

from supra_cli.core.archs import archs

TEXT = "def read(self, size=-1):\n    return self.buffer[:size]\n" * 100


@pytest.mark.parametrize("kind", list(archs))
def test_a_base_is_planned_converted_uptrained_and_writes(kind, supra, tmp_path):
    base = save_base(tmp_path / "base", [TEXT], kind)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    stage = {"tokens": 128, "batch_tokens": 64, "lr": 1e-3}
    recipe = {
        "base": str(base),
        "keep": "1",
        "data": {"seq_len": 32, "sources": [{"path": "text.txt"}]},
        "stages": [{"kind": stages, **stage} for stages in ("transfer", "distill", "finetune")],
    }
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(recipe), encoding="utf-8")
    for verb in (
        ("plan", "-r", "recipe.toml"),
        ("convert", base, "-o", "student", "--keep", "1"),
        ("inspect", "student"),
        ("uptrain", "-r", "recipe.toml", "--model", "student", "-o", "run", "--device", "cpu"),
        ("generate", "run", "-p", "def read", "-p", "d", "--max-new-tokens", "4"),
    ):
        result = supra(*verb)
        assert result.code == 0, result.err
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 6


def test_a_mistral_with_types_of_layers_is_converted_as_what_transformers_reads(supra, tmp_path):
    base = save_base(tmp_path / "base", [TEXT], "mistral")
    described = json.loads((base / "config.json").read_text())
    described["layer_types"] = ["full_attention", "sliding_attention", "full_attention"]
    (base / "config.json").write_text(json.dumps(described))
    assert supra("convert", base, "-o", "student", "--keep", "sliding").code == 0
    swap = json.loads((tmp_path / "student" / "config.json").read_text())["supra"]
    assert (swap["base"], swap["layers"]) == ("ministral", ["supra", "softmax", "supra"])


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_learned_positions_have_an_end(kind, supra, tmp_path):
    base = save_base(tmp_path / "base", [TEXT], kind, max_position_embeddings=24)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    result = supra("generate", base, "-p", "def", "--max-new-tokens", "40")
    assert (result.code, "24 positions" in result.error) == (2, True)
    recipe = {
        "base": str(base),
        "data": {"seq_len": 32, "sources": [{"path": "text.txt"}]},
        "stages": [{"kind": "finetune", "tokens": 128, "batch_tokens": 64, "lr": 1e-3}],
    }
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(recipe), encoding="utf-8")
    result = supra("uptrain", "-r", "recipe.toml", "-o", "run")
    assert (result.code, "the base has 24 positions; lower data.seq_len" in result.error) == (2, True)
    assert not (tmp_path / "run").exists()
