"""No rank ever holds the model: not while it loads its part, and not while it saves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tomli_w

from supra_cli.core import corpus
from tests.parallel import holding
from tests.parallel.launching import finish, start
from tests.tiny import save_base

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SHAPE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 10, "head_dim": 128}
MIB = 2**20


def test_a_rank_holds_its_part_of_the_model_and_no_more(tmp_path: Path) -> None:
    text = "".join(document.text for document in corpus.documents("validation"))[:20_000]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    save_base(tmp_path / "base", [text], **SHAPE)
    recipe = {
        "base": str(tmp_path / "base"),
        "data": {"seq_len": 64, "sources": [{"path": str(tmp_path / "text.txt")}]},
        "checkpoint": {"every_steps": 2},
        "stages": [{"kind": "finetune", "tokens": 256, "batch_tokens": 128}],
    }
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(recipe), encoding="utf-8")
    script = [holding.__file__, str(tmp_path / "recipe.toml"), str(tmp_path / "run")]
    ended = finish(start(2, script, cache=tmp_path / "cache"))
    assert ended.returncode == 0, ended.stderr
    ranks = [json.loads((tmp_path / f"run-{rank}.json").read_text()) for rank in range(2)]
    model = sum(rank["own"] for rank in ranks)
    assert model > 130 * MIB
    for rank in ranks:
        assert rank["own"] < 0.51 * model
        # What is read of a mapped file counts too: a tensor at a time, of at most 3 MiB here.
        assert rank["load"] < rank["own"] + 16 * MIB
        assert rank["save"] < rank["kept"] + 16 * MIB
        assert rank["save"] < rank["step"]
