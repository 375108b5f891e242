"""A word of every verb, in the order in which a user meets them: what must run on every version of every library."""

from __future__ import annotations

import json
import pkgutil

import pytest
import tomli_w

import supra_cli.commands

TRIED: set[str] = set()


@pytest.fixture
def said(supra, caplog, recwarn):
    """Runs a verb that must succeed, without a deprecation of any library on stderr, and returns its stdout."""

    def run(verb: str, *arguments: object) -> str:
        TRIED.add(verb)
        result = supra(verb, *arguments)
        assert result.code == 0, result.err
        words = [result.err, *caplog.messages, *(str(warning.message) for warning in recwarn)]
        assert not [line for line in words if "deprecated" in line]
        return result.out

    return run


def test_a_word_of_every_verb(said, supra, base, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("def read(self, size=-1):\n    return self.buffer[:size]\n" * 400, encoding="utf-8")
    stage = {"tokens": 128, "batch_tokens": 64, "lr": 1e-3}
    recipe = {
        "base": str(base),
        "keep": "1",
        "mixer": {"name": "supra", "gain": "head"},
        "data": {"seq_len": 32, "sources": [{"path": str(text)}], "validation_tokens": 64},
        "stages": [{"kind": kind, **stage} for kind in ("transfer", "distill", "finetune")],
    }
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(recipe), encoding="utf-8")

    assert json.loads(said("doctor", "--json"))["versions"]["transformers"]
    said("recipe", "validate", path)
    assert "row 0" in said("data", "peek", path)
    assert "finetune" in said("plan", "-r", path)
    said("convert", base, "-o", "student", "--keep", "1", "--set", "mixer.gain=head")
    said("inspect", "student", "--verify")
    assert said("uptrain", "-r", path, "--model", "student", "-o", "run").strip() == "run/last"
    for cache in (["-p", "def read"], ["-p", "def read", "-p", "d"], ["-p", "def", "--num-beams", "2"]):
        document = json.loads(said("generate", "run", *cache, "--max-new-tokens", "4", "--json"))
        assert document["cache_bytes"] > 0
    scores = json.loads(said("eval", "run", "--limit", "2", "--json"))
    assert scores["results"]["stdlib_cloze"]["acc"]["teacher"] is not None
    assert "stdlib_ppl" in said("report", "run")
    assert "train" in said("bench", "train", "--help")
    assert said("export", "run", "-o", "exported").strip() == "exported"
    TRIED.update(("prefetch", "serve"))
    assert supra("serve", "nowhere").code == 3  # test_serve.py has one that answers
    assert supra("prefetch", "org/model").code == 3  # there is no network
    verbs = {module.name for module in pkgutil.iter_modules(supra_cli.commands.__path__)}
    assert verbs - TRIED == {"console", "scores"}  # which show what verbs say
