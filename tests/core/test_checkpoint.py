"""A model directory: what convert and save write, and what load refuses."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig

from supra_cli.core import accounting, checkpoint, hub
from supra_cli.core.checkpoint import conversion, files, slices, writing
from supra_cli.core.errors import NotFoundError, SupraError, UsageError
from supra_cli.core.mixers.supra import Supra

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MIXER = {"mixer": "supra", "options": {}, "keep": "none", "seed": 0}
IDS = torch.arange(3, 20)[None]


def plain(path: Path, shard_size: str = "5GB", dtype: torch.dtype = torch.float32, **changes) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**(SHAPE | changes)), dtype=dtype)
    model.save_pretrained(path, max_shard_size=shard_size)
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "README.md").write_text("not a companion")
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where hashes are kept."""
    monkeypatch.setenv("SUPRA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def base(tmp_path):
    return plain(tmp_path / "base")


@pytest.fixture
def converted(base, tmp_path):
    return checkpoint.convert(base, tmp_path / "converted", **MIXER)


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


# -- convert


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"], ids=["one shard", "several shards"])
def test_the_bases_shards_are_kept_byte_for_byte(tmp_path, shard_size):
    base = plain(tmp_path / "base", shard_size)
    before = contents(base)
    output = checkpoint.convert(base, tmp_path / "out", **MIXER)
    assert contents(base) == before
    shards = [name for name in before if name.endswith(".safetensors")]
    for name in shards:
        kept = output / ("model-base.safetensors" if name == "model.safetensors" else name)
        assert kept.read_bytes() == before[name]
        assert kept.samefile(base / name)
    index = json.loads((output / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index.values()) == {file.name for file in output.glob("*.safetensors")}
    assert len(set(index.values())) == len(shards) + 1


@pytest.mark.parametrize("name", ["model-mixers.safetensors", "model-base-00002.safetensors", "tokenizer.safetensors"])
def test_shards_under_names_that_supra_writes_itself_are_never_written_through(tmp_path, name):
    base = plain(tmp_path / "base", "20KB")
    index = base / "model.safetensors.index.json"
    described = json.loads(index.read_text())
    first = min(described["weight_map"].values())
    (base / first).rename(base / name)
    described["weight_map"] = {t: name if file == first else file for t, file in described["weight_map"].items()}
    index.write_text(json.dumps(described))
    before = contents(base)
    converted = checkpoint.convert(base, tmp_path / "out", **MIXER)
    model, original = checkpoint.load(converted), checkpoint.load(base)
    checkpoint.save(model, tmp_path / "saved", source=converted, provenance={}, unchanged=converted)
    assert contents(base) == before
    for state in (model.state_dict(), checkpoint.load(tmp_path / "saved").state_dict()):
        assert all(torch.equal(state[name], tensor) for name, tensor in original.state_dict().items())
    checkpoint.verify(tmp_path / "saved")
    shards = {file.stat().st_ino for file in base.glob("*.safetensors")}
    assert shards < {file.stat().st_ino for file in (tmp_path / "saved").glob("*.safetensors")}


def test_where_no_hard_link_can_be_made_the_shards_are_copied(base, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    output = checkpoint.convert(base, tmp_path / "out", **MIXER)
    assert (output / "model-base.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    assert not (output / "model-base.safetensors").samefile(base / "model.safetensors")


def test_a_base_of_symbolic_links_becomes_a_directory_of_files(base, tmp_path):
    """As the hub's cache is: snapshots hold relative links into blobs."""
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots"
    shutil.move(base, blobs)
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("..") / "blobs" / file.name)
    output = checkpoint.convert(snapshot, tmp_path / "out", **MIXER)
    assert not [file for file in output.iterdir() if file.is_symlink()]
    shutil.rmtree(tmp_path / "hub")
    assert checkpoint.load(output)(IDS).logits.isfinite().all()


def test_the_converted_model_has_the_bases_values_and_the_companions(base, converted, device):
    model, original = checkpoint.load(converted, device=device), AutoModelForCausalLM.from_pretrained(base)
    state = model.state_dict()
    assert {tensor.device.type for tensor in (*state.values(), *model.buffers())} == {device}
    for name, tensor in original.state_dict().items():
        assert torch.equal(state[name].cpu(), tensor)
    assert (converted / "chat_template.jinja").is_file()
    assert not (converted / "README.md").exists()
    assert not (converted / "tokenizer_config.json").exists()


def test_new_parameters_follow_the_seed_and_not_what_else_is_swapped(base, tmp_path):
    def mixers(name, **changes):
        output = checkpoint.convert(base, tmp_path / name, **(MIXER | changes))
        return {k: v for k, v in checkpoint.load(output).state_dict().items() if ".mixer." in k}

    everything, again, other = mixers("a"), mixers("b"), mixers("c", seed=1)
    hybrid = mixers("d", keep="first:1")
    assert all(torch.equal(everything[name], again[name]) for name in everything)
    assert not any(torch.equal(everything[name], other[name]) for name in everything)
    assert 0 < len(hybrid) < len(everything)
    assert all(torch.equal(everything[name], hybrid[name]) for name in hybrid)


def test_converting_leaves_the_callers_random_state_alone(base, tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    checkpoint.convert(base, tmp_path / "out", **MIXER)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("threads", [1, 4])
def test_each_layer_is_drawn_as_by_itself_in_however_many_threads(base, tmp_path, monkeypatch, threads):
    """By what takes a generator and by what takes none."""
    original = Supra.reset_parameters

    def drawn(self):
        original(self)
        self.E.bias.data += torch.randn_like(self.E.bias)
        torch.nn.init.trunc_normal_(self.E.weight[:1].data)

    monkeypatch.setattr(Supra, "reset_parameters", drawn)
    monkeypatch.setattr(conversion, "THREADS", threads)
    model = checkpoint.load(checkpoint.convert(base, tmp_path / "out", **(MIXER | {"seed": 3})))
    for number, (_, layer) in enumerate(model.swapped_layers()):
        torch.manual_seed((3 << 16) + number)
        alone = Supra(layer.mixer.spec, layer.mixer.options)
        torch.manual_seed((3 << 16) + number)
        alone.reset_parameters()
        for ours, wanted in zip(layer.mixer.parameters(), alone.parameters(), strict=True):
            assert torch.equal(ours, wanted)


def test_new_parameters_are_written_in_shards_of_bounded_size(base, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "MIXER_SHARD_BYTES", 6_000)
    output = checkpoint.convert(base, tmp_path / "out", **MIXER)
    assert len(list(output.glob("model-mixers-*.safetensors"))) > 1
    assert checkpoint.load(output)(IDS).logits.isfinite().all()


def test_a_value_that_a_mixer_has_from_where_it_is_made_is_kept(base, converted, tmp_path, monkeypatch):
    original = Supra.__init__

    def made(self, *given):
        original(self, *given)
        self.own = torch.nn.Parameter(torch.full((3,), 5.0))

    monkeypatch.setattr(Supra, "__init__", made)
    checkpoint.convert(base, tmp_path / "out", **MIXER)
    known, new = (
        safetensors.torch.load_file(path / "model-mixers.safetensors") for path in (converted, tmp_path / "out")
    )
    assert new.keys() - known.keys() == {f"model.layers.{layer}.self_attn.mixer.own" for layer in range(3)}
    assert all(new[name].equal(known[name] if name in known else torch.full((3,), 5.0)) for name in new)


def test_new_parameters_have_the_bases_dtype(tmp_path):
    base = plain(tmp_path / "base", dtype=torch.bfloat16)
    model = checkpoint.load(checkpoint.convert(base, tmp_path / "out", **MIXER))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"], ids=["one shard", "several shards"])
def test_where_a_config_names_no_dtype_it_is_that_of_the_weights(tmp_path, shard_size):
    base = plain(tmp_path / "base", shard_size, torch.bfloat16)
    described = json.loads((base / "config.json").read_text())
    del described["dtype"]
    (base / "config.json").write_text(json.dumps(described))
    assert AutoModelForCausalLM.from_pretrained(base, dtype="auto").dtype == torch.bfloat16
    output = checkpoint.convert(base, tmp_path / "out", **MIXER)
    assert {entry.dtype for entry in checkpoint.tensors(output).values()} == {"BF16"}
    for model in (base, output):
        assert checkpoint.load(model).dtype == torch.bfloat16
        assert accounting.measure(checkpoint.outline(hub.resolve(str(model)))).dtype == "bfloat16"


def test_a_conversion_that_keeps_everything_is_the_plain_base(base, tmp_path):
    output = checkpoint.convert(base, tmp_path / "out", **(MIXER | {"keep": "all"}))
    assert json.loads((output / "config.json").read_text())["model_type"] == "llama"
    assert (output / "model.safetensors").samefile(base / "model.safetensors")
    expected = AutoModelForCausalLM.from_pretrained(base)(IDS).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(output)(IDS).logits, expected)


def test_a_converted_model_is_not_converted_again(converted, tmp_path):
    with pytest.raises(UsageError, match="already"):
        checkpoint.convert(converted, tmp_path / "twice", **MIXER)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied(tmp_path, tied, device):
    base = plain(tmp_path / "base", tie_word_embeddings=tied)
    model = checkpoint.load(checkpoint.convert(base, tmp_path / "out", **MIXER), device=device)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    checkpoint.save(model, tmp_path / "saved", source=base, provenance={})
    again = checkpoint.load(tmp_path / "saved", device=device)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert torch.equal(again(IDS.to(device)).logits, model(IDS.to(device)).logits)


def test_a_head_that_is_stored_beside_what_it_is_tied_to_must_be_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(slices, "_PIECE_BYTES", 1000)  # of several rows, of which the last differ
    base = plain(tmp_path / "base", tie_word_embeddings=True)
    embedding = "model.embed_tokens.weight"
    rewrite(base / "model.safetensors", lambda tensors: tensors.update({"lm_head.weight": tensors[embedding].clone()}))
    model = checkpoint.converted(base, **MIXER)
    output = checkpoint.convert(base, tmp_path / "out", **MIXER)
    assert torch.equal(checkpoint.load(output)(IDS).logits, model(IDS).logits)
    for directory, file in ((base, "model.safetensors"), (output, "model-base.safetensors")):
        rewrite(directory / file, lambda tensors: tensors["lm_head.weight"][-1, -1].add_(1))
        for read in (checkpoint.load, checkpoint.examine):
            with pytest.raises(SupraError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight .* differ; set"):
                read(directory)


@pytest.mark.parametrize("output", [".", "..", "../inside"])
def test_an_output_that_is_or_holds_the_working_directory_is_refused(base, tmp_path, monkeypatch, output):
    (inside := tmp_path / "outside" / "inside").mkdir(parents=True)
    monkeypatch.chdir(inside)
    with pytest.raises(UsageError, match="the working directory"):
        checkpoint.convert(base, output, **MIXER)
    assert [*(tmp_path / "outside").rglob("*")] == [inside]
    checkpoint.convert(base, "converted", **MIXER)


def test_an_output_that_is_not_empty_is_refused_and_kept(base, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious").write_text("kept")
    for overwrite, told in ((False, "is not empty"), (True, "no model")):
        with pytest.raises(UsageError, match=told):
            checkpoint.convert(base, output, overwrite=overwrite, **MIXER)
    assert contents(output) == {"precious": b"kept"}


@pytest.mark.parametrize(
    ("held", "told"),
    [
        ({"config.json": "{}", "src/work.py": ""}, "no model"),
        ({"config.json": '{"model_type": 3}'}, "no model"),
        ({"config.json": "[1]"}, "no model"),
        ({"config.json": '{"model_type": "llama"}', "src/work.py": ""}, "holds src, which is no part of a model"),
        ({"config.json": '{"model_type": "llama"}', ".git/HEAD": ""}, r"holds \.git, which is no part of a model"),
    ],
)
def test_a_folder_with_folders_that_no_model_has_is_not_overwritten(base, tmp_path, held, told):
    for name, text in held.items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text(text)
    with pytest.raises(UsageError, match=told):
        checkpoint.convert(base, tmp_path / "out", overwrite=True, **MIXER)
    assert {str(f.relative_to(tmp_path / "out")) for f in (tmp_path / "out").rglob("*") if f.is_file()} == {*held}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokens", "abc"),
        ("base", 7),
        ("recipe", "= ="),
        ("recipe", [1]),
        ("versions", 3),
        ("format", "1"),
        ("files", []),
    ],
)
def test_a_record_of_another_kind_is_one_sentence_that_names_it(converted, key, value):
    record = json.loads((converted / "supra.json").read_text())
    (converted / "supra.json").write_text(json.dumps(record | {key: value}))
    with pytest.raises(SupraError, match=r"supra\.json is not what supra writes"):
        checkpoint.read_provenance(converted)


def test_a_model_can_be_overwritten_by_another_but_not_by_what_is_made_from_it(base, converted, tmp_path):
    before = contents(base)
    for output in (base, base / ".."):
        (base / ".." / "config.json").touch()
        with pytest.raises(UsageError, match="would be lost"):
            checkpoint.convert(base, output, overwrite=True, **MIXER)
    assert contents(base) == before
    checkpoint.convert(base, converted, overwrite=True, **(MIXER | {"keep": "all"}))
    assert not checkpoint.load(converted).supra.any


# -- save


def test_an_unswapped_model_is_saved_as_the_plain_base(base, tmp_path):
    checkpoint.save(checkpoint.load(base), tmp_path / "out", source=base, provenance={})
    original, again = (AutoModelForCausalLM.from_pretrained(path) for path in (base, tmp_path / "out"))
    assert type(again) is type(original)
    assert torch.equal(again(IDS).logits, original(IDS).logits)


def test_when_only_mixers_changed_the_bases_shards_are_linked(converted, tmp_path):
    model = checkpoint.load(converted)
    for name, parameter in model.named_parameters():
        parameter.data.add_(1 if ".mixer." in name else 0)
    checkpoint.save(model, tmp_path / "out", source=converted, provenance={}, unchanged=converted)
    assert (tmp_path / "out" / "model-base.safetensors").samefile(converted / "model-base.safetensors")
    again = checkpoint.load(tmp_path / "out")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    checkpoint.verify(tmp_path / "out")


def test_a_base_that_is_linked_is_not_put_together_first(converted, tmp_path, monkeypatch):
    """As it is on disk, it can be a copy of all of a model's weights."""
    monkeypatch.setattr(writing, "revert_weight_conversion", lambda *_: pytest.fail("not needed"))
    model = checkpoint.load(converted)
    checkpoint.save(model, tmp_path / "out", source=converted, provenance={}, unchanged=converted)


def test_a_shard_that_holds_a_mixer_too_is_not_linked(converted, tmp_path):
    model = checkpoint.load(converted)
    model.save_pretrained(tmp_path / "merged")
    for name, parameter in model.named_parameters():
        parameter.data.add_(1 if ".mixer." in name else 0)
    checkpoint.save(model, tmp_path / "out", source=converted, provenance={}, unchanged=tmp_path / "merged")
    assert torch.equal(checkpoint.load(tmp_path / "out")(IDS).logits, model(IDS).logits)
    checkpoint.verify(tmp_path / "out")


def test_saving_never_writes_through_a_hard_link(converted, base, tmp_path):
    before = contents(base)
    model = checkpoint.load(converted)
    for parameter in model.parameters():
        parameter.data.mul_(2)
    checkpoint.save(model, converted, source=converted, provenance={}, overwrite=True)
    assert contents(base) == before


def test_a_file_that_is_there_is_not_written_through(base, tmp_path):
    before = contents(base)
    (tmp_path / "model.safetensors").hardlink_to(base / "model.safetensors")
    with pytest.raises(SupraError, match=r"cannot write .*model\.safetensors"):
        slices.write_shards({"a": torch.zeros(3)}, tmp_path, "model")
    assert contents(base) == before


def test_a_model_can_be_saved_in_another_dtype(converted, tmp_path):
    model = checkpoint.load(converted)
    checkpoint.save(model, tmp_path / "out", source=converted, provenance={}, dtype=torch.bfloat16)
    assert model.dtype == model.config.dtype == torch.float32
    again = checkpoint.load(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    assert torch.equal(again.lm_head.weight, model.lm_head.weight.bfloat16())


def test_provenance_names_versions_parent_and_hashes(converted, base, tmp_path):
    recorded = checkpoint.read_provenance(converted)
    assert recorded["base"] == str(base)
    assert set(recorded["files"]) == {"model-base.safetensors", "model-mixers.safetensors"}
    model = checkpoint.load(converted)
    checkpoint.save(model, tmp_path / "child", source=converted, provenance={"tokens": 5, "recipe": "seed = 1"})
    child = checkpoint.read_provenance(tmp_path / "child")
    assert (child["tokens"], child["recipe"]) == (5, "seed = 1")
    assert child["parent"] == checkpoint.identity(converted)
    assert {"supra", "torch", "transformers"} <= set(child["versions"])
    assert checkpoint.read_provenance(base) == {}


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_what_was_there(converted, tmp_path, monkeypatch, failure):
    model, output = checkpoint.load(converted), tmp_path / "out"
    checkpoint.save(model, output, source=converted, provenance={"tokens": 1})
    before = contents(output)

    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(slices, "_write", fail)
    with pytest.raises(SupraError if isinstance(failure, OSError) else KeyboardInterrupt):
        checkpoint.save(model, output, source=converted, provenance={"tokens": 2}, overwrite=True)
    assert contents(output) == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


# -- load


def rewrite(file: Path, change) -> None:
    """Replace a shard by one whose tensors `change` has altered, without writing through the link to the base."""
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    file.unlink()
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})


def damage(name: str, directory: Path) -> None:
    """One way for a model directory to be broken."""
    shard = directory / "model-mixers.safetensors"
    data = shard.read_bytes()
    first = "model.layers.0.self_attn.mixer.E.weight"
    changes = {
        "missing tensor": lambda tensors: tensors.pop(first),
        "extra tensor": lambda tensors: tensors.update(surplus=torch.zeros(1)),
        "misshapen tensor": lambda tensors: tensors.update({first: torch.zeros(3, 3)}),
        "renamed tensor": lambda tensors: tensors.update({"module." + first: tensors.pop(first)}),
    }
    if name in changes:
        rewrite(shard, changes[name])
        return
    match name:
        case "truncated shard":
            shard.write_bytes(data[:-10])
        case "longer shard":
            shard.write_bytes(data + b"\0" * 10)
        case "empty shard":
            shard.write_bytes(b"")
        case "header of garbage":
            shard.write_bytes(data[:8] + b"\xff" * (len(data) - 8))
        case "header length too large":
            shard.write_bytes(struct.pack("<Q", 2**40) + data[8:])
        case "missing shard":
            shard.unlink()
        case "index of garbage":
            (directory / "model.safetensors.index.json").write_text("{")
        case "index without a map":
            (directory / "model.safetensors.index.json").write_text("[]")
        case "index without metadata":
            index = json.loads((directory / "model.safetensors.index.json").read_text())
            (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index["weight_map"]}))
        case "index to numbers":
            (directory / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')
        case "config of garbage":
            (directory / "config.json").write_text("{")
        case "config without a base":
            (directory / "config.json").write_text('{"model_type": "supra"}')


DAMAGES = {
    "missing tensor": "mixer.E.weight",
    "extra tensor": "surplus",
    "misshapen tensor": r"mixer\.E\.weight.*\[3, 3\], expected \[32, 32\]",
    "renamed tensor": "mixer.E.weight",
    "truncated shard": "model-mixers.safetensors is damaged",
    "longer shard": "model-mixers.safetensors is damaged",
    "empty shard": "model-mixers.safetensors is empty",
    "header of garbage": "model-mixers.safetensors is damaged",
    "header length too large": "model-mixers.safetensors is damaged",
    "missing shard": "model-mixers.safetensors is missing",
    "index of garbage": "index.json is not JSON",
    "index without a map": "no weight_map",
    "index to numbers": "no weight_map",
    "index without metadata": 'no object "metadata"',
    "config of garbage": "config.json is not JSON",
    "config without a base": "no key 'supra'",
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_model_is_an_error_that_names_the_damage(converted, name):
    damage(name, converted)
    with pytest.raises(SupraError, match=DAMAGES[name]) as caught:
        checkpoint.load(converted)
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing tensor", "extra tensor", "misshapen tensor", "renamed tensor"])
def test_transformers_loading_is_as_strict(converted, name):
    damage(name, converted)
    with pytest.raises((SupraError, RuntimeError)):
        AutoModelForCausalLM.from_pretrained(converted)


@pytest.mark.parametrize("text", ["[]", '{"files": [1]}', '{"files": {"model-base.safetensors": 1}}'])
def test_provenance_that_supra_did_not_write_is_named(converted, text):
    (converted / "supra.json").write_text(text)
    with pytest.raises(SupraError, match=r"supra\.json is not what supra writes"):
        checkpoint.read_provenance(converted)


def test_a_tokenizer_without_content_is_named(converted):
    (converted / "tokenizer.json").write_text("{}")
    with pytest.raises(SupraError, match=r"the tokenizer in .* cannot be read"):
        checkpoint.load_tokenizer(converted)


@pytest.mark.parametrize("shard", ["model-base.safetensors", "model-mixers.safetensors"])
def test_a_flipped_bit_of_what_was_saved_is_found_by_verify(converted, tmp_path, shard):
    saved = checkpoint.save(checkpoint.load(converted), tmp_path / "saved", source=converted, provenance={})
    assert checkpoint.verify(saved) == []
    flip(saved / shard)
    with pytest.raises(SupraError, match=rf"{shard} is not what was saved, its hash"):
        checkpoint.verify(saved)


# -- What supra.json speaks of


def save_over(model: Path) -> None:
    """Other weights of the same shapes over a model, as a training script of the user's saves them at its end."""
    trained = AutoModelForCausalLM.from_pretrained(model)
    for parameter in trained.parameters():
        parameter.data.add_(1)
    trained.save_pretrained(model)


def test_two_saves_in_one_directory_are_refused_by_name(converted):
    save_over(converted)
    for read in (checkpoint.load, checkpoint.verify, checkpoint.identity, checkpoint.read_provenance):
        with pytest.raises(SupraError, match=r"holds two models, model\.safetensors and the 2 files") as caught:
            read(converted)
        assert caught.value.exit_code == 1


def test_shards_saved_over_a_model_are_loaded_and_its_old_files_are_not(converted):
    expected = checkpoint.load(converted)(IDS).logits
    trained = AutoModelForCausalLM.from_pretrained(converted)
    trained.model.norm.weight.data.mul_(2)
    trained.save_pretrained(converted, max_shard_size="20KB")
    assert (converted / "model-base.safetensors").exists()
    torch.testing.assert_close(checkpoint.load(converted)(IDS).logits, 2 * expected)
    assert checkpoint.read_provenance(converted) == {}
    with pytest.raises(SupraError, match=r"of which supra\.json has no record"):
        checkpoint.verify(converted)


def test_a_weight_file_without_a_record_is_vouched_for_by_nobody(converted, caplog):
    save_over(converted)
    (converted / "model.safetensors.index.json").unlink()
    assert checkpoint.load(converted)(IDS).logits.isfinite().all()
    with pytest.raises(SupraError, match=r"model\.safetensors would be loaded, of which supra\.json has no record"):
        checkpoint.verify(converted)
    assert checkpoint.read_provenance(converted) == {}
    assert "of another model than the one beside it" in caplog.text


def test_weights_of_the_same_name_and_size_are_told_from_those_of_the_record(base, tmp_path):
    output = checkpoint.save(checkpoint.load(base), tmp_path / "out", source=base, provenance={})
    before = checkpoint.identity(output)
    checkpoint.verify(output)
    size = (output / "model.safetensors").stat().st_size
    save_over(output)
    assert (output / "model.safetensors").stat().st_size == size
    assert checkpoint.identity(output) != before
    assert not checkpoint.holds(output, before)
    assert checkpoint.read_provenance(output) == {}
    with pytest.raises(SupraError, match=r"model\.safetensors is not what was saved"):
        checkpoint.verify(output)
    checkpoint.verify(checkpoint.convert(output, tmp_path / "again", **MIXER))


def test_a_config_of_another_model_is_told_from_that_of_the_record(converted):
    file = converted / "config.json"
    described = json.loads(file.read_text())
    file.write_text(json.dumps(described | {"eos_token_id": 7, "transformers_version": "9"}))
    checkpoint.verify(converted)
    assert checkpoint.read_provenance(converted)["tokens"] == 0
    file.write_text(json.dumps(described | {"rope_parameters": {"rope_type": "default", "rope_theta": 9.0}}))
    with pytest.raises(SupraError, match=r"config\.json describes another model"):
        checkpoint.verify(converted)
    assert checkpoint.read_provenance(converted) == {}


def test_the_identity_of_weights_is_that_of_every_copy_and_of_nothing_else(converted, base, tmp_path):
    identity = checkpoint.identity(converted)
    shutil.copytree(converted, tmp_path / "copy", copy_function=shutil.copyfile)
    assert checkpoint.identity(tmp_path / "copy") == identity
    assert checkpoint.read_provenance(tmp_path / "copy") == checkpoint.read_provenance(converted)
    (tmp_path / "copy" / "supra.json").unlink()
    assert checkpoint.identity(tmp_path / "copy") == identity
    (tmp_path / "copy" / "consolidated.safetensors").write_bytes(b"junk")
    assert checkpoint.identity(tmp_path / "copy") == identity
    rewrite(tmp_path / "copy" / "model-mixers.safetensors", lambda tensors: next(iter(tensors.values())).add_(1))
    assert checkpoint.identity(tmp_path / "copy") != identity
    assert checkpoint.identity(base) != identity
    other = checkpoint.convert(base, tmp_path / "other", **(MIXER | {"seed": 1}))
    assert checkpoint.identity(other) != identity


def test_files_as_old_as_recorded_are_not_hashed_again(converted, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_LARGE", 0)
    identity, model = checkpoint.identity(converted), checkpoint.load(converted)
    hashed = hashings(monkeypatch)
    assert checkpoint.identity(converted) == identity
    assert checkpoint.read_provenance(converted)["files"]
    assert hashed == []
    checkpoint.save(model, tmp_path / "child", source=converted, provenance={}, unchanged=converted)
    assert hashed == ["model-mixers.safetensors"]
    known = checkpoint.read_provenance(tmp_path / "child")["files"]["model-base.safetensors"]
    assert known["sha256"] == files.sha256(converted / "model-base.safetensors")
    hashed.clear()
    shard = converted / "model-mixers.safetensors"
    os.utime(shard, ns=(1, 1))
    assert checkpoint.identity(converted) == identity
    assert hashed == ["model-mixers.safetensors"]


def hashings(monkeypatch) -> list[str]:
    """The names of files that are read to be hashed from here on."""
    seen, original = [], hashlib.file_digest
    monkeypatch.setattr(
        hashlib, "file_digest", lambda file, kind: seen.append(Path(file.name).name) or original(file, kind)
    )
    return seen


def test_what_the_hub_s_cache_names_by_its_hash_is_not_hashed(base, tmp_path, monkeypatch):
    known = files.sha256(base / "model.safetensors")
    (tmp_path / "blobs").mkdir()
    (base / "model.safetensors").rename(tmp_path / "blobs" / known)
    (base / "model.safetensors").symlink_to(tmp_path / "blobs" / known)
    hashed = hashings(monkeypatch)
    converted = checkpoint.convert(base, tmp_path / "converted", **MIXER)
    assert hashed == []
    recorded = json.loads((converted / "supra.json").read_text())
    assert recorded["files"]["model-base.safetensors"]["sha256"] == known
    checkpoint.verify(converted)


def test_converting_reads_the_headers_of_the_base_and_not_its_numbers(base, tmp_path, monkeypatch):
    hashed = hashings(monkeypatch)
    converted = checkpoint.convert(base, tmp_path / "converted", **MIXER)
    assert hashed == []
    recorded = json.loads((converted / "supra.json").read_text())
    shard = (base / "model.safetensors").read_bytes()
    assert recorded["files"]["model-base.safetensors"] == {
        "bytes": len(shard),
        "header": hashlib.sha256(shard[: 8 + struct.unpack("<Q", shard[:8])[0]]).hexdigest(),
        "mtime_ns": (base / "model.safetensors").stat().st_mtime_ns,
    }
    assert recorded["files"]["model-mixers.safetensors"].keys() == {"bytes", "header", "mtime_ns"}
    assert recorded["parent"] is None


@pytest.mark.parametrize("shard", ["model-base.safetensors", "model-mixers.safetensors"])
def test_the_first_verification_keeps_the_hashes_of_linked_and_drawn_files_and_the_next_compares_them(converted, shard):
    assert checkpoint.verify(converted) == ["model-base.safetensors", "model-mixers.safetensors"]
    assert checkpoint.verify(converted) == []
    flip(converted / shard)
    with pytest.raises(SupraError, match=rf"{shard} has changed since it was hashed last"):
        checkpoint.verify(converted)


def flip(file: Path) -> None:
    """Change the last bit of a file as a failing disk does: its size and time of change stay."""
    data, state = bytearray(file.read_bytes()), file.stat()
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


def test_a_linked_file_of_another_size_is_found_by_verify(converted):
    shard = converted / "model-base.safetensors"
    shard.write_bytes(shard.read_bytes() + b"\0")
    with pytest.raises(SupraError, match=r"model-base\.safetensors is not what was saved, its size"):
        checkpoint.verify(converted)


def test_a_copy_of_a_converted_model_is_known_by_size_and_header(converted, tmp_path):
    shutil.copytree(converted, tmp_path / "copy", copy_function=shutil.copyfile)
    assert checkpoint.read_provenance(tmp_path / "copy")["tokens"] == 0
    assert checkpoint.verify(tmp_path / "copy") == ["model-base.safetensors", "model-mixers.safetensors"]


def test_a_record_of_an_older_version_has_hashes_of_whole_files_alone(converted):
    file = converted / "supra.json"
    recorded = json.loads(file.read_text())
    recorded["files"] = {
        name: {"bytes": known["bytes"], "sha256": files.sha256(converted / name)}
        for name, known in recorded["files"].items()
    }
    file.write_text(json.dumps(recorded))
    assert checkpoint.load(converted)(IDS).logits.isfinite().all()
    assert checkpoint.read_provenance(converted) == recorded
    assert checkpoint.verify(converted) == []
    flip(converted / "model-base.safetensors")
    with pytest.raises(SupraError, match=r"model-base\.safetensors is not what was saved, its hash"):
        checkpoint.verify(converted)


@pytest.mark.parametrize("shard", ["model-base.safetensors", "model-mixers.safetensors"])
def test_tensors_that_changed_places_are_found_by_the_recorded_header(converted, shard):
    header, numbers = split(converted / shard)
    first, second = [name for name in header if name.endswith(("q_proj.weight", "E.weight"))][:2]
    assert header[first]["shape"] == header[second]["shape"]
    places = "data_offsets"
    header[first][places], header[second][places] = header[second][places], header[first][places]
    text = json.dumps(header).encode()
    (converted / shard).unlink()
    (converted / shard).write_bytes(struct.pack("<Q", len(text)) + text + numbers)
    for read in (checkpoint.load, checkpoint.examine):
        with pytest.raises(SupraError, match=f"{shard} is not what was saved, its header differs"):
            read(converted)
    (converted / "supra.json").unlink()
    checkpoint.load(converted)


def split(file: Path) -> tuple[dict, bytes]:
    """(header, numbers) of a shard."""
    data = file.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:end]), data[end:]


def test_a_tensor_in_two_files_is_refused(converted):
    rewrite(
        converted / "model-mixers.safetensors", lambda tensors: tensors.update({"model.norm.weight": torch.ones(32)})
    )
    with pytest.raises(SupraError, match=r"'model.norm.weight' is in model-base.safetensors and in model-mixers"):
        checkpoint.load(converted)


def test_a_large_file_is_hashed_once_until_it_changes(base, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_LARGE", 0)
    hashed, identity = hashings(monkeypatch), checkpoint.identity(base)
    assert checkpoint.identity(base) == identity
    assert hashed == ["model.safetensors"]
    rewrite(base / "model.safetensors", lambda tensors: next(iter(tensors.values())).add_(1))
    assert checkpoint.identity(base) != identity
    assert hashed == ["model.safetensors"] * 2
    monkeypatch.setenv("SUPRA_CACHE", str(base / "config.json"))  # where nothing can be kept
    assert checkpoint.identity(base) == checkpoint.identity(base)
    assert hashed == ["model.safetensors"] * 4


def test_a_part_of_the_base_that_is_called_mixer_is_the_base_s(converted, tmp_path):
    """As Mamba, Zamba and NemotronH call theirs."""
    model = checkpoint.load(converted)
    model.model.layers[0].mlp.mixer = torch.nn.Linear(3, 3)
    checkpoint.save(model, tmp_path / "out", source=converted, provenance={})
    placed = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert placed["model.layers.0.mlp.mixer.weight"] == "model-base.safetensors"
    assert placed["model.layers.0.self_attn.mixer.E.weight"] == "model-mixers.safetensors"


@pytest.mark.parametrize("files", [(), ("config.json",)], ids=["empty", "no weights"])
def test_a_directory_that_is_no_model_is_not_found(base, tmp_path, files):
    (tmp_path / "bare").mkdir()
    for file in files:
        shutil.copy(base / file, tmp_path / "bare")
    with pytest.raises(NotFoundError):
        checkpoint.load(tmp_path / "bare")


def test_pickled_weights_are_never_read(base, tmp_path):
    torch.save(safetensors.torch.load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.raises(NotFoundError, match="no safetensors weights but pickled"):
        checkpoint.load(base)


def test_a_base_of_an_unknown_architecture_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UsageError, match="unknown base architecture 'bert'"):
        checkpoint.read_config(tmp_path)


def test_computed_tensors_of_old_checkpoints_are_no_surplus(base):
    rewrite(
        base / "model.safetensors",
        lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}),
    )
    assert checkpoint.load(base)(IDS).logits.isfinite().all()


def test_constants_of_old_checkpoints_of_gpt2_are_no_surplus(tmp_path):
    """With and without a head, by us and by transformers."""
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    old = {
        f"transformer.h.{layer}.attn.{name}": value
        for layer in range(2)
        for name, value in {"bias": torch.ones(1, 1, 8, 8).bool(), "masked_bias": torch.tensor(-1e4)}.items()
    }
    rewrite(tmp_path / "base" / "model.safetensors", lambda tensors: tensors.update(old))
    converted = checkpoint.convert(tmp_path / "base", tmp_path / "out", **MIXER)
    model = checkpoint.load(converted)
    hidden = AutoModel.from_pretrained(converted)(IDS).last_hidden_state
    assert torch.equal(model.lm_head(hidden), model(IDS).logits)


def test_a_model_loads_in_the_dtype_asked_for_with_its_rotary_table_in_fp32(converted, device):
    model = checkpoint.load(converted, device=device, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert not model.training
    frequencies = 10_000 ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq.cpu().double(), frequencies, rtol=1e-6, atol=0)


def test_tensors_that_transformers_renames_keep_their_names_on_disk(tmp_path):
    """GPT-NeoX's head is `embed_out` in files and `lm_head` in memory."""
    config = GPTNeoXConfig(**{k: v for k, v in SHAPE.items() if k != "num_key_value_heads"})
    original = AutoModelForCausalLM.from_config(config)
    original.save_pretrained(tmp_path / "base")
    checkpoint.convert(tmp_path / "base", tmp_path / "out", **MIXER)
    model = checkpoint.load(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, original.lm_head.weight)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out").lm_head.weight, original.lm_head.weight)
    checkpoint.save(model, tmp_path / "saved", source=tmp_path / "out", provenance={})
    names = checkpoint.tensors(tmp_path / "saved").keys()
    assert names == checkpoint.tensors(tmp_path / "out").keys()
    assert "embed_out.weight" in names
    assert "gpt_neox.layers.0.attention.mixer.E.weight" in names


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 0},
        {"hidden_size": "wide"},
        {"vocab_size": -1},
        {"num_hidden_layers": 2},
        {"num_hidden_layers": 10**9},
        {"dtype": 7},
        {"head_dim": 2**40},
        {"supra": 3},
        {"supra": {"base": "llama"}},
        {"supra": {"base": "llama", "mixer": [], "options": {}, "layers": ["supra"] * 3}},
        {"supra": {"base": "llama", "mixer": "supra", "options": 1, "layers": ["supra"] * 3}},
        {"supra": {"base": "llama", "mixer": "supra", "options": {}, "layers": ["supra"]}},
        {"supra": {"base": "llama", "mixer": "supra", "options": {}, "layers": ["supra", "supra", "mamba"]}},
    ],
    ids=str,
)
def test_a_config_that_makes_no_sense_is_one_sentence(converted, change):
    file = converted / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(SupraError) as caught:
        checkpoint.load(converted)
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)
