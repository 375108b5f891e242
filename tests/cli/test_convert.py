"""`supra convert`, `inspect` and `plan` on a tiny model and on the bundled configurations."""

from __future__ import annotations

import json
import os
import shutil
import time
import tomllib

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from supra_cli.core import hub

RECIPE = """
base = "mistral-7b"
[mixer]
name = "supra"
[data]
seq_len = 512
sources = [{ path = "python-stdlib" }]
[[stages]]
kind = "finetune"
tokens = 2_000_000
batch_tokens = 8192
micro_batch_tokens = 512
"""


def test_a_converted_model_has_the_base_s_tensors_and_new_ones(supra, base, tmp_path):
    result = supra("convert", base)
    assert result.code == 0
    assert result.out.strip() == "runs/base-supra"
    converted = {}
    for shard in (tmp_path / "runs" / "base-supra").glob("*.safetensors"):
        converted |= load_file(shard)
    original = load_file(base / "model.safetensors")
    assert all(converted[name].equal(tensor) for name, tensor in original.items())
    assert all(".mixer." in name for name in set(converted) - set(original))


def test_the_seed_decides_the_new_parameters(supra, base, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert supra("convert", base, "-o", name, "--seed", seed).code == 0
    first, again, other = (load_file(tmp_path / name / "model-mixers.safetensors") for name in "abc")
    assert all(first[name].equal(again[name]) for name in first)
    assert not all(first[name].equal(other[name]) for name in first)


def test_an_occupied_output_is_exit_2_until_overwrite(supra, base):
    assert supra("convert", base, "-o", "out").code == 0
    refused = supra("convert", base, "-o", "out")
    assert refused.code == 2
    assert "--overwrite" in refused.error
    assert supra("convert", base, "-o", "out", "--overwrite").code == 0


def test_a_dry_run_writes_nothing(supra, base, tmp_path):
    result = supra("convert", base, "--dry-run")
    assert result.code == 0
    assert "new parameters" in result.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("alias", "millions"), [("llama-7b", 537.0), ("mistral-7b", 570.6)])
def test_a_dry_run_of_an_alias_needs_no_network(supra, alias, millions):
    result = supra("convert", alias, "--dry-run", "--json")
    assert result.code == 0
    plan = json.loads(result.out)
    assert round(plan["new_parameters"] / 1e6, 1) == millions
    assert plan["state_bytes"] == 64 * 2**20
    assert plan["source"]["repo"] in ("meta-llama/Llama-2-7b-hf", "mistralai/Mistral-7B-v0.1")


def test_the_aliases_are_listed_with_what_they_stand_for(supra):
    lines = supra("convert", "--list").out.splitlines()
    assert len(lines) == 1 + len(hub.BUNDLED) + len(hub.ALIASES)
    llama = next(line for line in lines if line.startswith("llama-7b "))
    assert llama.split() == ["llama-7b", "meta-llama/Llama-2-7b-hf", "6.738B", "12.6", "GiB", "yes"]
    listed = json.loads(supra("convert", "--list", "--json").out)["aliases"]
    assert [one["alias"] for one in listed] == [line.split()[0] for line in lines[1:]]
    assert {one["repo"] for one in listed if one["alias"] == "llama-7b"} == {"meta-llama/Llama-2-7b-hf"}
    assert next(one for one in listed if one["alias"] == "tiny")["parameters"] == 1_804_320


def test_the_aliases_are_listed_beside_folders_of_their_names(supra, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wanted = supra("convert", "--list").out
    (tmp_path / "llama-7b").mkdir()
    assert supra("convert", "tiny", "-o", "tiny").code == 0
    assert supra("convert", "--list").out == wanted


def test_convert_asks_which_model(supra):
    result = supra("convert")
    assert result.code == 2
    assert "takes a MODEL" in result.error
    assert "--list" in result.error


def test_command_offline_is_exit_3_and_one_sentence(supra, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    result = supra("convert", "llama-7b")
    assert result.code == 3
    assert result.error.startswith("error: meta-llama/Llama-2-7b-hf is not on this machine")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("lama-7b",), 3, "did you mean 'llama-7b'"),
        (("--mixer", "supr"), 2, "did you mean 'supra'"),
        (("--keep", "every:0"), 2, "keep is 'every:0'"),
        (("--keep", "9"), 2, "layer numbers from 0 to 3"),
        (("--set", "mixer.gian=head"), 2, "did you mean 'gain'"),
        (("--set", "gain=head"), 2, "--set takes mixer.key=value"),
        (("--set", "mixer.gain=loud"), 2, "'loud'"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_written(supra, base, tmp_path, arguments, code, words):
    result = supra("convert", *(arguments if len(arguments) == 1 else (base, *arguments)))
    assert result.code == code
    assert words in result.error
    assert list(tmp_path.iterdir()) == []


def test_a_converted_model_is_not_converted_again(supra, base):
    supra("convert", base, "-o", "out")
    result = supra("convert", "out")
    assert result.code == 2
    assert "converted already" in result.error


def test_a_directory_that_is_no_model_is_exit_3(supra, tmp_path):
    (tmp_path / "empty").mkdir()
    assert supra("convert", "empty").code == 3


def test_a_plan_needs_a_config_alone_and_looks_at_all_that_is_there(supra, base, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_bytes((base / "config.json").read_bytes())
    assert supra("convert", "m", "--dry-run").code == 0
    (tmp_path / "m" / "model.safetensors").write_bytes(b"")
    assert supra("convert", "m", "--dry-run").code == 1


def test_options_and_kept_layers_are_in_the_model(supra, base):
    arguments = ("--set", "mixer.gain=head", "--keep", "every:2", "-o", "out", "--json")
    written = json.loads(supra("convert", base, *arguments).out)
    assert written["layers"] == ["supra", "softmax", "supra", "softmax"]
    seen = json.loads(supra("inspect", "out", "--json").out)
    assert seen["options"]["gain"] == "head"
    assert seen["new_parameters"] == written["new_parameters"]


def test_inspect_shows_where_a_model_comes_from_and_verifies_it(supra, base):
    supra("convert", base, "-o", "out")
    result = supra("inspect", "out", "--verify")
    assert result.code == 0
    assert str(base) in result.out
    assert "every weight file is what was saved" in result.out


def test_inspect_tells_nothing_of_a_record_that_is_of_other_weights(supra, base, tmp_path):
    supra("convert", base, "-o", "out", "--keep", "all")
    assert json.loads(supra("inspect", "out", "--json").out)["provenance"]["base"] == str(base)
    model = AutoModelForCausalLM.from_pretrained("out")
    model.lm_head.weight.data.add_(1)
    model.save_pretrained("out")
    seen = supra("inspect", "out", "--json")
    assert json.loads(seen.out)["provenance"] == {}
    assert "supra.json is of another model than the one beside it" in seen.err
    assert supra("inspect", "out", "--verify").code == 1


def test_inspect_works_on_a_plain_model(supra, base):
    seen = json.loads(supra("inspect", base, "--json").out)
    assert seen["mixer"] is None
    assert seen["new_parameters"] == 0
    assert seen["state_bytes"] == 0


def test_inspect_names_a_damaged_shard(supra, base, tmp_path):
    supra("convert", base, "-o", "out")
    assert supra("inspect", "out", "--verify").code == 0
    shard = tmp_path / "out" / "model-mixers.safetensors"
    data, saved = shard.read_bytes(), shard.stat()
    shard.write_bytes(data[:-8])
    cut = supra("inspect", "out")
    assert cut.code == 1
    assert "model-mixers.safetensors" in cut.error
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(shard, ns=(saved.st_atime_ns, saved.st_mtime_ns))  # as by a failing disk
    assert supra("inspect", "out").code == 0
    changed = supra("inspect", "out", "--verify")
    assert changed.code == 1
    assert "model-mixers.safetensors" in changed.error


def test_plan_counts_a_7b_recipe_without_its_weights(supra, tmp_path):
    (tmp_path / "r.toml").write_text(RECIPE)
    result = supra("plan", "--recipe", "r.toml", "--json")
    assert result.code == 0
    plan = json.loads(result.out)
    assert plan["steps"] == -(-2_000_000 // 8192)
    assert plan["tokens"] == plan["steps"] * 8192
    memory = plan["stages"][0]["memory"]
    assert memory["total"] == sum(value for part, value in memory.items() if part not in ("total", "together"))
    assert plan["gpu_hours"]["H100 SXM"] > 0


def test_a_70b_model_is_planned_from_its_config_alone(supra, tmp_path):
    shape = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 32000}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8, "bos_token_id": 1, "eos_token_id": 2}
    (tmp_path / "llama-70b").mkdir()
    described = {"model_type": "llama", "dtype": "bfloat16", **shape, **heads}
    (tmp_path / "llama-70b" / "config.json").write_text(json.dumps(described))
    (tmp_path / "r.toml").write_text(RECIPE.replace("mistral-7b", "llama-70b"))
    start = time.process_time()
    result = supra("plan", "--recipe", "r.toml", "--json")
    converted = supra("convert", "llama-70b", "--dry-run", "--json")
    assert time.process_time() - start < 30  # 5 when tried
    assert result.code == converted.code == 0
    model = json.loads(converted.out)
    of_base = 2 * 32000 * 8192 + 8192 + 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192)
    assert model["parameters"] - model["new_parameters"] == of_base == 68_976_648_192
    memory = json.loads(result.out)["stages"][0]["memory"]
    assert memory["weights"] == 4 * model["parameters"]
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".safetensors"]


def test_plan_shows_a_table_for_people(supra, tmp_path):
    (tmp_path / "r.toml").write_text(RECIPE.replace("mistral-7b", "pythia-160m"))
    result = supra("plan", "-r", "r.toml", "--set", "stages.0.tokens=16384")
    assert result.code == 0
    for word in ("new parameters", "finetune", "activations", "H100 SXM"):
        assert word in result.out


def test_plan_for_a_cpu_names_no_gpu(supra, tmp_path):
    (tmp_path / "r.toml").write_text(RECIPE.replace("mistral-7b", "pythia-160m"))
    result = supra("plan", "-r", "r.toml", "--device", "cpu")
    assert result.code == 0
    assert "activations" in result.out
    assert "H100 SXM" not in result.out
    result = supra("plan", "-r", "r.toml", "--device", "cdua")
    assert result.code == 2
    assert "did you mean 'cuda'" in result.err


def test_plan_refuses_a_recipe_that_is_none(supra, tmp_path):
    assert supra("plan", "-r", "nowhere.toml").code == 2
    (tmp_path / "r.toml").write_text(RECIPE.replace("seq_len", "seqlen"))
    result = supra("plan", "-r", "r.toml")
    assert result.code == 2
    assert "seq_len" in result.err
    assert tomllib.loads(RECIPE)


def test_a_base_without_a_tokenizer_is_converted_with_a_sentence(supra, base, tmp_path):
    shutil.copytree(base, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    converted = supra("convert", "bare", "-o", "student")
    assert converted.code == 0
    assert "bare has no tokenizer, without which student cannot be trained, scored or asked for text" in converted.err
    assert "no tokenizer" not in supra("convert", base, "-o", "whole").err


def test_the_neediest_layers_of_a_student_are_softmax_again(supra, base, tmp_path):
    (tmp_path / "text.txt").write_text("def read(self):\n    return self.size\n" * 400)
    assert supra("convert", base, "-o", "student").code == 0
    given = ("--text", "text.txt", "--device", "cpu", "--json")
    tried = json.loads(supra("convert", "student", "--keep", "auto:1", "-o", "hybrid", "--dry-run", *given).out)
    assert not (tmp_path / "hybrid").exists()
    found = json.loads(supra("convert", "student", "--keep", "auto:1", "-o", "hybrid", *given).out)
    assert found == tried
    assert found["softmax"] == [int(max(found["divergences"], key=found["divergences"].get))]
    assert "1 softmax" in supra("inspect", "hybrid").out
    named = json.loads(supra("convert", "student", "--keep", "auto:1", "--dry-run", *given).out)
    assert named["path"].endswith("student-auto1")
    for model, keep, said in ((base, "auto:1", "no layer has been ranked"), ("hybrid", "auto:1", "softmax layers")):
        refused = supra("convert", model, "--keep", keep, "-o", "x")
        assert (refused.code, said in refused.error) == (2, True)
    for model, options in (
        ("student", ("--keep", "auto:1", "--mixer", "supra")),
        ("student", ("--keep", "auto:1", "--set", "mixer.gain=head")),
        ("student", ("--keep", "auto:1", "--seed", "0")),
        (base, ("--text", "text.txt")),
        (base, ("--keep", "1", "--device", "cpu")),
    ):
        refused = supra("convert", model, *options, "-o", "x")
        assert (refused.code, f"{options[-2]} has no effect" in refused.error) == (2, True)
