"""Every way for a model directory to be none that users meet: a sentence with the cause, in each verb, before work."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from supra_cli.core.archs import archs
from supra_cli.core.checkpoint import slices
from supra_cli.core.mixers import mixers

Fault = Callable[[Path], None]

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 4998662\n"
SENTENCEPIECE = b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02"
INDEX = "model.safetensors.index.json"


def config(**changes) -> Fault:
    """Other values in config.json; `...` takes a key away."""

    def spoil(model: Path) -> None:
        file = model / "config.json"
        described = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({key: value for key, value in described.items() if value is not ...}))

    return spoil


def content(name: str, data: bytes) -> Fault:
    return lambda model: (model / name).write_bytes(data)


def instead_of_weights(*names: str, whole: bool = True) -> Fault:
    """Other files in the place of the weights, or of everything."""

    def spoil(model: Path) -> None:
        for file in model.glob("*.safetensors" if whole else "*"):
            file.unlink()
        for name in names:
            (model / name).parent.mkdir(parents=True, exist_ok=True)
            (model / name).write_bytes(b"{}" if name.endswith("json") else b"x" * 64)

    return spoil


def instead_of_all(*names: str) -> Fault:
    return instead_of_weights(*names, whole=False)


def dead_link(name: str) -> Fault:
    def spoil(model: Path) -> None:
        (model / name).unlink()
        (model / name).symlink_to("../../blobs/0123abc")

    return spoil


def sharded(model: Path) -> None:
    weights = AutoModelForCausalLM.from_pretrained(model)
    (model / "model.safetensors").unlink()
    weights.save_pretrained(model, max_shard_size="60KB")


def without_index(model: Path) -> None:
    sharded(model)
    (model / INDEX).unlink()


def without_a_shard(model: Path) -> None:
    sharded(model)
    (model / "model-00002-of-00004.safetensors").unlink()


def single_and_shards(model: Path) -> None:
    """As a sharded `save_pretrained` over a model in one file leaves them, the file being the stale one."""
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(model, max_shard_size="60KB")
    assert (model / "model.safetensors").exists()


def adapter(model: Path) -> None:
    instead_of_all()(model)
    (model / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    (model / "adapter_model.safetensors").write_bytes(b"x" * 64)


def adapter_beside(model: Path) -> None:
    (model / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')


def tokenizer_model(data: bytes) -> Fault:
    def spoil(model: Path) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (model / name).unlink()
        (model / "tokenizer.model").write_bytes(data)

    return spoil


def tokenizer_of_tomorrow(model: Path) -> None:
    file = model / "tokenizer.json"
    described = json.loads(file.read_text())
    described["model"]["type"] = "BPE2"
    file.write_text(json.dumps(described))


def small_vocabulary(model: Path) -> None:
    shape = AutoConfig.from_pretrained(model)
    shape.vocab_size = 250
    AutoModelForCausalLM.from_config(shape).save_pretrained(model)


def tensors(change: Callable[[dict], object]) -> Fault:
    def spoil(model: Path) -> None:
        weights = safetensors.torch.load_file(model / "model.safetensors")
        change(weights)
        safetensors.torch.save_file(weights, model / "model.safetensors")

    return spoil


def bytes_of(change: Callable[[bytes], bytes], name: str = "model.safetensors") -> Fault:
    return lambda model: (model / name).write_bytes(change((model / name).read_bytes()))


def flipped(at: int) -> Fault:
    return bytes_of(lambda data: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


def two_shards_exchanged(model: Path) -> None:
    sharded(model)
    first, second = (model / f"model-0000{number}-of-00004.safetensors" for number in (1, 2))
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)


Q = "model.layers.0.self_attn.q_proj"
FAULTS: dict[str, tuple[Fault, int, str]] = {
    # Files without their content.
    "git-lfs pointer of weights": (content("model.safetensors", LFS), 1, "git lfs pull"),
    "git-lfs pointer of a tokenizer": (content("tokenizer.json", LFS), 1, "git lfs pull"),
    "git-lfs pointer of a tokenizer's config": (content("tokenizer_config.json", LFS), 1, "git lfs pull"),
    "git-lfs pointer of a config": (content("config.json", LFS), 1, "git lfs pull"),
    "git-lfs pointer of an index": (lambda m: (sharded(m), content(INDEX, LFS)(m)), 1, "git lfs pull"),
    "dead link to weights": (dead_link("model.safetensors"), 1, "is a link to ../../blobs/0123abc"),
    "dead link to an index": (lambda m: (sharded(m), dead_link(INDEX)(m)), 1, "is a link to ../../blobs/0123abc"),
    "dead link to a config": (dead_link("config.json"), 1, "is a link to ../../blobs/0123abc"),
    "dead link to a tokenizer": (dead_link("tokenizer.json"), 1, "is a link to ../../blobs/0123abc"),
    "empty weights": (content("model.safetensors", b""), 1, "model.safetensors is empty"),
    "empty config": (content("config.json", b""), 1, "config.json is empty"),
    "empty tokenizer": (content("tokenizer.json", b""), 1, "tokenizer.json is empty"),
    "download that broke off": (instead_of_weights("model.safetensors.incomplete"), 1, "a download that broke off"),
    "hf download that broke off": (
        instead_of_weights(".cache/huggingface/download/x.incomplete"),
        1,
        "a download that broke off",
    ),
    # Weights that are not where they are looked for, or not of the format.
    "shards without their index": (without_index, 1, f"but not their index, {INDEX}"),
    "index without a shard": (without_a_shard, 1, "model-00002-of-00004.safetensors is missing"),
    "one file and shards": (single_and_shards, 1, "holds two models"),
    "one file of another name": (lambda m: (m / "model.safetensors").rename(m / "weights.safetensors"), 3, "name it"),
    "index to another place": (
        content(INDEX, b'{"weight_map": {"a": "../x.safetensors"}}'),
        1,
        "in its own directory",
    ),
    "pickles": (instead_of_weights("pytorch_model.bin"), 3, "pickled weights (pytorch_model.bin); python -c"),
    "GGUF": (instead_of_all("model.Q4_K_M.gguf"), 3, "gguf_file='model.Q4_K_M.gguf'"),
    "GGUF and a config": (instead_of_weights("model.Q4_K_M.gguf"), 3, "gguf_file='model.Q4_K_M.gguf'"),
    "Mistral's own layout": (instead_of_all("consolidated.safetensors", "params.json"), 3, "layout of mistral-inf"),
    "Mistral's own layout and a config": (instead_of_weights("consolidated.safetensors"), 3, "layout of mistral-inf"),
    "Meta's own layout": (instead_of_all("consolidated.00.pth", "params.json"), 3, "Meta's own layout"),
    "TensorFlow": (instead_of_weights("tf_model.h5"), 3, "weights of TensorFlow"),
    "sharded training state": (instead_of_weights("__0_0.distcp"), 3, "accelerate merge-weights"),
    # Weights that are damaged, or of another model than the config.
    "truncated weights": (bytes_of(lambda data: data[:-10]), 1, "model.safetensors is damaged"),
    "weights with more at their end": (bytes_of(lambda data: data + bytes(10)), 1, "model.safetensors is damaged"),
    "a bit of the header flipped": (flipped(9), 1, "model.safetensors is damaged"),
    "a bit of the header's length flipped": (flipped(7), 1, "model.safetensors is damaged"),
    "truncated shard": (
        lambda m: (sharded(m), bytes_of(lambda data: data[:-10], "model-00002-of-00004.safetensors")(m)),
        1,
        "model-00002-of-00004.safetensors is damaged",
    ),
    "shard of another index": (two_shards_exchanged, 1, "though model.safetensors.index.json places it there"),
    "fewer layers than the weights": (config(num_hidden_layers=3), 1, "has an unexpected tensor"),
    "more layers than the weights": (config(num_hidden_layers=5), 1, "lacks tensor"),
    "wider than the weights": (config(intermediate_size=64), 1, "expected [64, 32]; it belongs to another model"),
    "a head of its own that is to be tied": (
        config(tie_word_embeddings=True),
        1,
        "ties lm_head.weight to model.embed_tokens.weight and the files hold two that differ",
    ),
    "more words than the weights": (config(vocab_size=400), 1, "expected [400, 32]; it belongs to another model"),
    "a tensor that is not there": (
        tensors(lambda w: w.pop(f"{Q}.weight")),
        1,
        f"lacks tensor '{Q}.weight'; it is not a whole model of its config.json",
    ),
    "a tensor too many": (tensors(lambda w: w.update(surplus=torch.zeros(1))), 1, "unexpected tensor 'surplus'"),
    "written by a newer supra": (content("supra.json", b'{"format": 2}'), 1, "a newer supra wrote the model (format 2"),
    # Directories of something else.
    "adapter": (adapter, 3, "a PEFT adapter of org/base"),
    "adapter beside weights": (adapter_beside, 3, "delete adapter_config.json if the weights here are merged"),
    "diffusers pipeline": (instead_of_all("model_index.json", "unet/config.json"), 3, "a diffusers pipeline"),
    "sentence-transformers": (instead_of_all("modules.json", "1_Pooling/config.json"), 3, "sentence-transformers"),
    "model one level down": (instead_of_all("checkpoint-500/config.json"), 3, "m/checkpoint-500 does; name that"),
    # Models that are none of ours, by name.
    "vision": (config(model_type="qwen2_vl"), 2, "a vision-language model"),
    "vision by its parts": (config(model_type="llava", vision_config={}), 2, "a vision-language model"),
    "audio": (config(model_type="qwen2_audio", audio_config={}), 2, "an audio-language model"),
    "encoder-decoder": (config(model_type="t5"), 2, "an encoder-decoder model"),
    "speech": (config(model_type="whisper"), 2, "an encoder-decoder model"),
    "encoder": (config(model_type="bert"), 2, "an encoder, which predicts no next token"),
    "attention sinks": (config(model_type="gpt_oss"), 2, "a model with attention sinks"),
    "latent attention": (config(model_type="deepseek_v3", kv_lora_rank=64), 2, "latent attention (MLA)"),
    "hybrid": (config(model_type="qwen3_next"), 2, "a hybrid, some or all of whose layers are recurrent already"),
    "gates on queries": (config(model_type="qwen3_5"), 2, "a hybrid"),
    "no causal attention": (config(model_type="gemma3_text", use_bidirectional_attention=True), 2, "that see the ones"),
    "no causal attention by the key of all": (
        config(is_causal=False),
        2,
        "is_causal = False, tokens that see the ones",
    ),
    "code of its own": (config(model_type="foo", auto_map={"AutoConfig": "c.FooConfig"}), 2, "code of its own"),
    "code of its own under a known name": (
        config(auto_map={"AutoModelForCausalLM": "modeling_foo.Foo"}),
        2,
        "modeling_foo.Foo (auto_map)",
    ),
    "newer than transformers": (config(model_type="newllm7"), 2, "does not know either"),
    "GPTQ": (config(quantization_config={"quant_method": "gptq", "bits": 4}), 2, "quantised by gptq"),
    "AWQ": (config(quantization_config={"quant_method": "awq", "bits": 4}), 2, "quantised by awq"),
    "bitsandbytes": (config(quantization_config={"quant_method": "bitsandbytes"}), 2, "quantised by bitsandbytes"),
    "compressed": (config(quantization_config={"quant_method": "compressed-tensors"}), 2, "compressed-tensors"),
    "fp8": (config(quantization_config={"quant_method": "fp8"}), 2, "quantised by fp8"),
    "GPTQ that only its tensors tell of": (
        tensors(lambda w: w.update({f"{Q}.qweight": torch.zeros(4, 32, dtype=torch.int32)})),
        2,
        f"tensor '{Q}.qweight' in model.safetensors is quantised (I32)",
    ),
    "fp8 that only its tensors tell of": (
        tensors(lambda w: w.update({f"{Q}.weight": w[f"{Q}.weight"].to(torch.float8_e4m3fn)})),
        2,
        f"tensor '{Q}.weight' in model.safetensors is quantised (F8_E4M3)",
    ),
    # Configs.
    "array": (content("config.json", b"[1]"), 1, "config.json holds a JSON list, expected an object"),
    "UTF-16": (content("config.json", '{"model_type": "llama"}'.encode("utf-16")), 1, "is not JSON"),
    "no type": (config(model_type=...), 1, "names no model_type"),
    "rope of an unknown type": (
        config(rope_parameters={"rope_type": "foo", "rope_theta": 1e4}),
        1,
        "no rope_parameters.rope_type 'foo'",
    ),
    "rope of an unknown type, as it was written": (
        config(rope_parameters=..., rope_scaling={"type": "foo", "factor": 2.0}),
        1,
        "'foo'",
    ),
    "rope without what it needs": (config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), 1, "factor"),
    "rope without what the attention needs": (
        config(model_type="ministral3", rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
        1,
        "rope_parameters has no number original_max_position_embeddings",
    ),
    "a kind of layer that another family has": (
        config(model_type="qwen3", layer_types=["full_attention", *["chunked_attention"] * 3]),
        1,
        "layer_types has 'chunked_attention'",
    ),
    "rope of words": (config(rope_parameters={"rope_type": "default", "rope_theta": "big"}), 1, "describes no model"),
    "unknown activation": (config(hidden_act="foo"), 1, "no hidden_act 'foo'"),
    "unknown attention": (config(attn_implementation="foo"), 1, 'attn_implementation="foo"'),
    "unknown dtype": (config(dtype="float99"), 1, "dtype is 'float99'"),
    "integer dtype": (config(dtype="int8"), 1, "dtype is 'int8'"),
    "heads that share unevenly": (config(num_key_value_heads=3), 1, "cannot share 3 heads"),
    "heads that do not fit": (config(num_attention_heads=3, num_key_value_heads=3, head_dim=...), 1, "heads"),
    "padding beyond the vocabulary": (config(pad_token_id=999), 1, "pad_token_id is 999"),
    "end beyond the vocabulary": (config(eos_token_id=[1, 999]), 1, "eos_token_id is [1, 999]"),
    "generation config of garbage": (content("generation_config.json", b"{"), 1, "generation_config.json is not JSON"),
    "generation config of a list": (content("generation_config.json", b"[]"), 1, "generation_config.json holds no"),
    "generation config that ends by a word": (
        content("generation_config.json", b'{"eos_token_id": "</s>"}'),
        1,
        "generation_config.json says that eos_token_id is '</s>', expected a number or a list of numbers",
    ),
    "generation config that ends by a list of lists": (
        content("generation_config.json", b'{"eos_token_id": [[1]]}'),
        1,
        "eos_token_id is [[1]], expected a number",
    ),
    # Tokenizers.
    "tokenizer of more tokens than the model": (small_vocabulary, 1, "room for 250"),
    "tokenizer of tomorrow": (tokenizer_of_tomorrow, 1, "install the newer tokenizers"),
    "tokenizer of SentencePiece": (tokenizer_model(SENTENCEPIECE), 1, "pip install sentencepiece protobuf, or copy"),
    "tokenizer of tiktoken": (tokenizer_model(b"IQ== 0\nIg== 1\n"), 1, "pip install tiktoken blobfile, or copy"),
}


@pytest.fixture
def spoilt(supra, base, tmp_path):
    """The session's base, spoilt, as directory `m` beside which verbs run."""

    def make(fault: Fault) -> Path:
        shutil.copytree(base, tmp_path / "m")
        fault(tmp_path / "m")
        return tmp_path / "m"

    return make


@pytest.mark.parametrize("name", FAULTS)
def test_a_directory_that_is_no_model_is_told_by_its_cause_in_every_verb(supra, spoilt, tmp_path, monkeypatch, name):
    fault, code, words = FAULTS[name]
    monkeypatch.setattr("supra_cli.core.checkpoint.reading._installed", lambda package: False)
    spoilt(fault)
    (tmp_path / "r.toml").write_text(
        'base = "./m"\nmixer = { name = "supra" }\n[data]\nseq_len = 16\nsources = [{ path = "python-stdlib" }]\n'
        '[[stages]]\nkind = "transfer"\ntokens = 64\nbatch_tokens = 64\n'
    )
    sentences = set()
    for arguments in (
        ("convert", "m", "-o", "out"),
        ("convert", "m", "--dry-run"),
        ("inspect", "m"),
        ("generate", "m", "-p", "def", "--max-new-tokens", 2),
        ("uptrain", "-r", "r.toml", "-o", "run"),
        ("plan", "-r", "r.toml", "--device", "cpu"),
    ):
        result = supra(*arguments)
        assert result.code == code, (arguments, result.err)
        assert words in result.error, arguments
        assert "internal error" not in result.error
        sentences.add(result.error)
    assert len(sentences) <= 2  # a recipe's base is named by its whole path
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["config.json", INDEX, "tokenizer.json", "tokenizer_config.json"])
def test_a_byte_order_mark_is_read_over(supra, spoilt, base, name):
    if name == INDEX:
        spoilt(sharded)
    else:
        spoilt(lambda model: None)
    file = Path("m") / name
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    expected = supra("generate", base, "-p", "def read", "--max-new-tokens", 4).out
    assert supra("generate", "m", "-p", "def read", "--max-new-tokens", 4).out == expected
    assert supra("convert", "m", "-o", "out").code == 0
    assert supra("inspect", "out", "--verify").code == 0


def test_a_byte_order_mark_does_not_hide_a_generation_config(spoilt):
    """transformers goes on without a generation_config.json that it cannot read, and so without its end tokens."""
    from supra_cli.core import checkpoint

    model = spoilt(content("generation_config.json", b'\xef\xbb\xbf{"eos_token_id": 7, "max_new_tokens": 5}'))
    assert checkpoint.load(model).generation_config.eos_token_id == 7


def test_what_is_written_has_no_byte_order_mark_by_which_transformers_alone_would_be_lost(supra, spoilt, base):
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    def marked(model: Path) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            bytes_of(lambda data: b"\xef\xbb\xbf" + data, name)(model)

    spoilt(lambda model: (content("generation_config.json", b'{"eos_token_id": 7}')(model), marked(model)))
    expected = PreTrainedTokenizerFast.from_pretrained(base)
    for arguments in (("convert", "m", "-o", "converted"), ("export", "converted", "-o", "exported")):
        assert supra(*arguments).code == 0
        tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments[-1])
        assert tokenizer("def read").input_ids == expected("def read").input_ids
        assert tokenizer.special_tokens_map == expected.special_tokens_map
        assert GenerationConfig.from_pretrained(arguments[-1]).eos_token_id == 7
        marked(Path(arguments[-1]))  # as older versions have written them


def test_an_added_token_without_an_embedding_is_no_fault_of_the_whole(supra, spoilt):
    """As the padding that many a fine-tuning has added to Llama's tokenizer."""
    from transformers import AutoTokenizer

    model = spoilt(lambda model: None)
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]}) == 1
    assert len(tokenizer) > AutoConfig.from_pretrained(model).vocab_size
    tokenizer.save_pretrained(model)
    assert supra("convert", "m", "-o", "out").code == 0
    assert supra("generate", "out", "-p", "def", "--max-new-tokens", 2).code == 0


def test_consolidated_files_beside_the_weights_are_never_read(supra, spoilt):
    model = spoilt(lambda model: (model / "consolidated.safetensors").write_bytes(b"junk"))
    (model / "consolidated-00001-of-00002.safetensors").write_bytes(b"junk")
    assert supra("convert", "m", "-o", "out").code == 0
    assert not list(Path("out").glob("consolidated*"))
    assert supra("generate", "m", "-p", "def", "--max-new-tokens", 2).code == 0


def test_a_shard_that_the_index_does_not_name_is_never_read(supra, spoilt, base):
    model = spoilt(sharded)
    (model / "model-00005-of-00005.safetensors").write_bytes(b"junk")
    assert supra("convert", "m", "-o", "out").code == 0
    assert not (Path("out") / "model-00005-of-00005.safetensors").exists()
    expected = supra("generate", base, "-p", "def read", "--max-new-tokens", 4).out
    assert supra("generate", "m", "-p", "def read", "--max-new-tokens", 4).out == expected


# -- Disks


def test_a_file_that_may_not_become_so_large_leaves_nothing(base, tmp_path):
    """A real refusal of the operating system in the middle of a file, as of a disk that fills."""
    limited = (
        "import resource, signal, sys; from supra_cli.__main__ import main; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", limited, "convert", str(base), "-o", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: cannot write ")
    assert "make room or choose another output" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_in_the_middle_of_a_file_leaves_nothing(number, base, tmp_path):
    signalled = (
        "import os, signal, sys; from supra_cli.__main__ import main; "
        "from supra_cli.core.checkpoint import conversion; "
        f"signal.signal({int(number)}, signal.SIG_DFL); "  # which nohup leaves ignored
        f"conversion.write_shards = lambda *given, **named: os.kill(os.getpid(), {int(number)}); "
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", signalled, "convert", str(base), "-o", "new/folder/out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (128 + number, f"error: ended by {number.name}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES], ids=errno.errorcode.get)
@pytest.mark.parametrize(
    "file", ["directory", "model-mixers.safetensors", "config.json", "tokenizer.json", "supra.json"]
)
def test_a_disk_that_refuses_leaves_what_was_there(supra, base, tmp_path, monkeypatch, file, code):
    assert supra("convert", base, "-o", "old", "--seed", 1).code == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def refusing(write: Callable, place: int) -> Callable:
        def checked(*arguments, **named):
            path = Path(os.fsdecode(arguments[place]))
            named_so = path.name == file or path.name.startswith(f".{file}.")  # beside it
            if (path.parent.suffix == ".tmp" and named_so) or (file == "directory" and path.suffix == ".tmp"):
                raise OSError(code, os.strerror(code), str(path))
            return write(*arguments, **named)

        return checked

    monkeypatch.setattr(Path, "mkdir", refusing(Path.mkdir, 0))
    monkeypatch.setattr(Path, "write_text", refusing(Path.write_text, 0))
    monkeypatch.setattr("builtins.open", refusing(open, 0))
    monkeypatch.setattr(shutil, "copyfile", refusing(shutil.copyfile, 1))
    monkeypatch.setattr(slices, "_write", refusing(slices._write, 2))
    for output in ("new", "old"):
        result = supra("convert", base, "-o", output, "--overwrite")
        assert result.code == 1, result.err
        assert "cannot write" in result.error
        assert os.strerror(code) in result.error
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_flash_attention_without_a_gpu_is_unsupported_hardware(supra, spoilt, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    spoilt(config(attn_implementation="flash_attention_2"))
    for arguments in (("convert", "m", "--dry-run"), ("inspect", "m"), ("generate", "m", "-p", "def")):
        result = supra(*arguments)
        assert result.code == 5
        assert "'flash_attention_2', which runs on a CUDA GPU alone; remove that key" in result.error


def test_flash_attention_without_its_package_is_named(spoilt, monkeypatch):
    from supra_cli.core import checkpoint
    from supra_cli.core.errors import ResourceError

    model = spoilt(config(attn_implementation="flash_attention_2"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ResourceError, match="flash_attention_2"):
        checkpoint.load(model, device="cpu")


# -- A bug of ours is called one


def boom(error: Exception) -> Callable:
    def raising(*_, **__):
        raise error

    return raising


def break_the_spec(monkeypatch) -> None:
    monkeypatch.setitem(archs._objects, "llama", replace(archs.get("llama"), spec=boom(AttributeError("no head_size"))))


def break_the_projection(monkeypatch) -> None:
    monkeypatch.setitem(archs._objects, "llama", replace(archs.get("llama"), qkv=boom(AttributeError("no q_proj"))))


def break_the_mixer(monkeypatch) -> None:
    monkeypatch.setattr(mixers.get("supra"), "__init__", boom(TypeError("got an unexpected keyword")))


@pytest.mark.parametrize("bug", [break_the_spec, break_the_mixer, break_the_projection])
def test_a_bug_of_ours_is_never_told_as_a_damaged_config(supra, base, monkeypatch, tmp_path, bug):
    monkeypatch.setattr("supra_cli.__main__.tempfile.gettempdir", lambda: str(tmp_path))
    assert supra("convert", base, "-o", "out").code == 0
    (tmp_path / "train.txt").write_text("def read(self):\n    return 1\n" * 200)
    (tmp_path / "r.toml").write_text(
        f'base = "{base}"\nmixer = {{ name = "supra" }}\n[data]\nseq_len = 16\nsources = [{{ path = "train.txt" }}]\n'
        '[[stages]]\nkind = "transfer"\ntokens = 64\nbatch_tokens = 64\n'
    )
    bug(monkeypatch)
    verbs = [("generate", "out", "-p", "def"), ("uptrain", "-r", "r.toml", "-o", "run")]
    if bug is not break_the_projection:  # which only a forward pass calls
        verbs += [("convert", base, "-o", "again"), ("inspect", "out")]
    for arguments in verbs:
        result = supra(*arguments)
        assert result.code == 1, arguments
        assert "internal error" in result.error, (arguments, result.error)
        assert "config.json" not in result.error
