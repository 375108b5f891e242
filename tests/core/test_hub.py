"""A name resolves to a directory, an alias or a hub id, in that order; all else is an error with its exit code."""

from __future__ import annotations

import json
import os
import socket

import pytest

from supra_cli.core import connection, hub
from supra_cli.core.errors import NotAuthorisedError, NotFoundError, SupraError, UsageError


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def directory(path, files=("config.json", "model.safetensors")):
    path.mkdir(parents=True)
    for name in files:
        (path / name).write_text("{}")
    return path


def test_a_directory_comes_before_an_alias_and_an_alias_before_the_hub(here):
    assert hub.resolve("llama-7b").kind == "alias"
    assert hub.resolve("mistralai/Mistral-7B-v0.1").kind == "hub"
    directory(here / "llama-7b")
    directory(here / "mistralai" / "Mistral-7B-v0.1")
    assert hub.resolve("llama-7b").kind == "directory"
    assert hub.resolve("mistralai/Mistral-7B-v0.1").kind == "directory"


def test_the_mission_s_llama_is_llama_2():
    assert hub.resolve("llama-7b").repo == "meta-llama/Llama-2-7b-hf"


def test_a_run_directory_stands_for_its_last_model(here):
    last = directory(here / "runs" / "one" / "last")
    assert hub.resolve("runs/one").path.resolve() == last


def test_a_revision_pins_a_hub_model():
    source = hub.resolve("org/name@0123abc")
    assert (source.repo, source.revision) == ("org/name", "0123abc")


@pytest.mark.parametrize(
    "name",
    [
        "lama-7b",
        "./nowhere",
        "/nowhere/at/all",
        "runs/one/last",
        "",
        "org/name/more",
        "~nobody-at-all/x",
        "~nobody-at-all",
    ],
)
def test_what_is_none_of_them_is_not_found(here, name):
    with pytest.raises(NotFoundError):
        hub.fetch(hub.resolve(name))


def test_no_name_at_all_is_not_the_working_directory(here):
    directory(here / "model")
    os.chdir(here / "model")
    assert hub.resolve(".").kind == "directory"
    with pytest.raises(NotFoundError, match="the name of the model is empty"):
        hub.resolve("")


def test_a_revision_pins_an_alias():
    source = hub.resolve("llama-7b@0123abc")
    assert (source.repo, source.revision) == (hub.ALIASES["llama-7b"], "0123abc")
    assert not hub.is_bundled(source)
    with pytest.raises(NotFoundError):
        hub.resolve("tiny@0123abc")


@pytest.mark.parametrize(
    "address", ["http://localhost:abc", "huggingface.co", "http://", "https://[", "ftp://a.b", "http://a:99999"]
)
def test_an_address_of_the_hub_that_is_none_is_a_sentence(address, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", address)
    with pytest.raises(UsageError, match=r"HF_ENDPOINT is .* expected an address"):
        hub.resolve("org/name")


def test_a_misspelt_alias_gets_a_hint():
    with pytest.raises(NotFoundError, match="did you mean 'llama-7b'"):
        hub.resolve("lama-7b")


def test_a_file_is_not_a_model(here):
    (here / "model.gguf").write_text("")
    with pytest.raises(NotFoundError, match="a model is a directory"):
        hub.resolve("model.gguf")


def test_a_directory_without_a_config_or_weights_is_not_a_model(here):
    with pytest.raises(NotFoundError, match=r"no config\.json"):
        hub.fetch(hub.resolve(str(directory(here / "empty", files=()))))
    with pytest.raises(NotFoundError, match="no safetensors"):
        hub.fetch(hub.resolve(str(directory(here / "pickled", files=("config.json", "pytorch_model.bin")))))


def test_a_missing_shard_is_named(here):
    model = directory(here / "model", files=("config.json", "model-1.safetensors"))
    index = {"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SupraError, match=r"model-2\.safetensors is missing") as caught:
        hub.fetch(hub.resolve("model"))
    assert caught.value.exit_code == 1


def test_a_name_is_opened_as_it_is_resolved_and_fetched(here):
    model = directory(here / "runs" / "one" / "last")
    assert hub.open("runs/one").resolve() == model
    assert hub.open("tiny") == hub.BUNDLED["tiny"]
    with pytest.raises(NotFoundError, match="did you mean 'tiny'"):
        hub.open("tiny2")


def test_offline_is_one_sentence_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(NotFoundError, match="HF_HUB_OFFLINE is set") as caught:
        hub.fetch(hub.resolve("some-org/some-model"))
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


def test_a_closed_network_counts_as_offline(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)

    def refuse(address, timeout):
        assert timeout <= 5
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", refuse)
    assert connection.reach() == "cannot be reached"


@pytest.mark.parametrize(
    ("raised", "expected", "words"),
    [
        ("GatedRepoError", NotAuthorisedError, "gated"),
        ("RepositoryNotFoundError", NotFoundError, "neither a directory here nor a model on the hub"),
        ("RevisionNotFoundError", NotFoundError, "no revision"),
        ("LocalEntryNotFoundError", NotFoundError, "not on this machine"),
    ],
)
def test_the_hub_s_errors_become_ours(monkeypatch, raised, expected, words):
    import huggingface_hub
    from huggingface_hub import errors

    cls = getattr(errors, raised)

    def fail(*args, **kwargs):
        raise cls.__new__(cls)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(expected, match=words):
        hub.fetch(hub.Source("hub", "org/name@rev", repo="org/name", revision="rev"))


def test_a_full_disk_while_downloading_is_not_called_a_missing_model(monkeypatch):
    import huggingface_hub

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(OSError, match="No space left"):
        hub.fetch(hub.Source("hub", "org/name", repo="org/name"))


def test_a_commit_is_read_off_the_cache_s_folder(tmp_path):
    assert hub.commit_of(tmp_path / "models--org--name" / "snapshots" / "abc123") == "abc123"
    assert hub.commit_of(tmp_path) is None


def test_the_newest_finished_output_is_found(here):
    with pytest.raises(NotFoundError, match="no MODEL given"):
        hub.newest_output()
    old, new = directory(here / "runs" / "converted"), directory(here / "runs" / "demo" / "uptrained" / "last")
    directory(here / "runs" / "half" / "converted")
    (here / "runs" / "half" / "recipe.toml").write_text("")
    directory(here / "runs" / ".writing.tmp")
    for age, path in ((100, old), (50, new)):
        moment = os.stat(here).st_mtime - age
        os.utime(path / "config.json", (moment, moment))
    assert (here / hub.newest_output()) == new


# As published on the models' pages; Hugging Face counts Qwen3-0.6B's tied head a second time (751,632,384).
PUBLISHED = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama3.1-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
    "mistral-7b": 7_241_732_096,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "tinyllama-1.1b": 1_100_048_384,
}


@pytest.mark.parametrize("alias", PUBLISHED)
def test_a_bundled_configuration_has_the_published_number_of_parameters(alias):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        config = AutoConfig.from_pretrained(hub.config_folder(hub.resolve(alias)))
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[alias]


def test_every_hub_alias_is_checked_against_its_published_size():
    assert {hub.ALIASES[alias] for alias in PUBLISHED} == set(hub.ALIASES.values())
