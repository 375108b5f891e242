"""Damage at random to a model directory: one sentence, or exactly the model that the files as they stand describe.

What they describe is read here by another, simpler reader: JSON, and numbers at offsets.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from supra_cli.core import checkpoint
from supra_cli.core.errors import SupraError
from supra_cli.core.export.card import card
from supra_cli.core.modeling import SupraForCausalLM

ROUNDS, EACH = 20, 100
SHAPE = {"vocab_size": 17, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
VALUES = (None, True, False, -1, 0, 1, 2, 3, 7, 10**6, 2**70, 0.5, -1e30, "", "x", "float16", [], [1], {}, {"a": 1})
INDEX = "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I32": torch.int32, "I64": torch.int64, "U8": torch.uint8, "BOOL": torch.bool}

WORDS = {"architectures", "dtype", "torch_dtype", "transformers_version"}
"""Keys of config.json that are compared otherwise, or say nothing of the model."""

Header = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    """A converted model of two layers, one of them softmax, in three shards of the base and one of the mixer."""
    folder = tmp_path_factory.mktemp("fuzz")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    model.save_pretrained(folder / "base", max_shard_size="3KB")
    checkpoint.convert(folder / "base", folder / "out", mixer="supra", options={}, keep="0", seed=0)
    whole = {file.name: file.read_bytes() for file in (folder / "out").iterdir()}
    assert sum(name.endswith(".safetensors") for name in whole) >= 3
    return whole


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_a_damaged_model_is_one_sentence_or_what_its_files_describe(files, tmp_path, seed):
    rng, loaded = random.Random(seed), 0
    for number in range(EACH):
        damaged = dict(files)
        what = f"damage {number}, {damage(damaged, rng)}"
        place(damaged, tmp_path / "model")
        model = load(tmp_path / "model", what)
        if model is not None:
            loaded += 1
            assert (difference := differs(model, tmp_path / "model")) is None, f"{what}: {difference}"
    assert 5 < loaded < EACH - 20  # both ways out are seen


def load(folder: Path, what: str) -> SupraForCausalLM | None:
    """The model in a directory, of which a card can be written; None where one sentence refuses it."""
    try:
        model = checkpoint.load(folder)
        assert card(folder, model.config, "model")
        return model
    except SupraError as error:
        sentence = str(error)
    except Exception as error:
        pytest.fail(f"{what}: {type(error).__name__}: {error}")
    assert sentence.strip(), what
    assert "\n" not in sentence, f"{what}: {sentence}"
    return None


def test_swapped_offsets_are_never_loaded(files, tmp_path):
    rng = random.Random(0)
    for _ in range(20):
        damaged = dict(files)
        shard = rng.choice([name for name in files if name.endswith(".safetensors")])
        damaged[shard] = of_header(damaged[shard], rng, swap_places)
        if damaged[shard] == files[shard]:
            continue
        place(damaged, tmp_path / "model")
        with pytest.raises(SupraError):
            checkpoint.load(tmp_path / "model")


def place(files: dict[str, bytes], folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)


# -- Damage


def damage(files: dict[str, bytes], rng: random.Random) -> str:
    """Change one file of a model directory, in one way; returns what was done. Half of the models have no record."""
    recorded = rng.random() < 0.5 or files.pop("supra.json") is None
    name = rng.choice([name for name in sorted(files) if name.endswith((".json", ".safetensors"))])
    kinds = {**ANY, **(OF_SHARDS if name.endswith(".safetensors") else OF_JSON)}
    # A shard's ways are many; those of bytes are few and found at once.
    kind = rng.choice([*ANY, *4 * [kind for kind in kinds if kind not in ANY]])
    kinds[kind](files, name, rng)
    return f"{kind} of {name}" if recorded else f"{kind} of {name}, without supra.json"


def cut(files: dict[str, bytes], name: str, rng: random.Random) -> None:
    files[name] = files[name][: rng.randrange(len(files[name]))]


def flip(files: dict[str, bytes], name: str, rng: random.Random) -> None:
    data = bytearray(files[name])
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    files[name] = bytes(data)


def lose(files: dict[str, bytes], name: str, rng: random.Random) -> None:
    del files[name]


def lengthen(files: dict[str, bytes], name: str, rng: random.Random) -> None:
    files[name] += rng.randbytes(rng.randint(1, 20))


def exchange(files: dict[str, bytes], name: str, rng: random.Random) -> None:
    other = rng.choice(sorted(files))
    files[name], files[other] = files[other], files[name]


def double(files: dict[str, bytes], name: str, rng: random.Random) -> None:
    """A file more, under a name that means something or nothing."""
    files[rng.choice(["model.safetensors", "model-extra.safetensors", "adapter_config.json", "x.bin"])] = files[name]


ANY = {"cut": cut, "flip": flip, "lose": lose, "lengthen": lengthen, "exchange": exchange, "double": double}


def of_json(change: Callable[[Any, Any, random.Random], None]) -> Callable:
    """Damage of one place within a JSON file, an object's key or a list's number."""

    def damaged(files: dict[str, bytes], name: str, rng: random.Random) -> None:
        document = json.loads(files[name])
        inside, key = rng.choice(list(places(document)))
        change(inside, key, rng)
        files[name] = json.dumps(document).encode()

    return damaged


def places(document: Any) -> list[tuple[Any, Any]]:
    keys = document if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    return [place for key in keys for place in [(document, key), *places(document[key])]]


def drop(inside: Any, key: Any, rng: random.Random) -> None:
    del inside[key]


def put(inside: Any, key: Any, rng: random.Random) -> None:
    inside[key] = copy.deepcopy(rng.choice(VALUES))


def nudge(inside: Any, key: Any, rng: random.Random) -> None:
    value = inside[key]
    if isinstance(value, int | float):
        inside[key] = rng.choice([value + 1, value - 1, value * 2, -value, value / 2])
    elif isinstance(value, str):
        inside[key] = value[:-1]
    else:
        inside[key] = [value]


def rename(inside: Any, key: Any, rng: random.Random) -> None:
    if isinstance(inside, dict):
        inside[rng.choice([key + "x", key.upper(), "", *inside])] = inside.pop(key)
    else:
        inside.reverse()


def swap(inside: Any, key: Any, rng: random.Random) -> None:
    other = rng.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
    inside[key], inside[other] = inside[other], inside[key]


OF_JSON = {f"{change.__name__} a value": of_json(change) for change in (drop, put, nudge, rename, swap)}


def of_header(data: bytes, rng: random.Random, change: Callable[[Header, random.Random], None]) -> bytes:
    """A shard with another header before the same numbers."""
    header, numbers = split(data)
    change(header, rng)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + numbers


def split(data: bytes) -> tuple[Header, bytes]:
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:end]), data[end:]


def named(header: Header) -> list[str]:
    return [name for name in header if name != "__metadata__"]


def swap_places(header: Header, rng: random.Random) -> None:
    first = header[rng.choice(named(header))]
    second = header[rng.choice([name for name in named(header) if header[name]["shape"] == first["shape"]])]
    first["data_offsets"], second["data_offsets"] = second["data_offsets"], first["data_offsets"]


def swap_names(header: Header, rng: random.Random) -> None:
    first, second = rng.choice(named(header)), rng.choice(named(header))
    header[first], header[second] = header[second], header[first]


def rename_tensor(header: Header, rng: random.Random) -> None:
    name = rng.choice(named(header))
    header[rng.choice([name + "x", "model." + name, name.replace("1", "0"), ""])] = header.pop(name)


def lose_tensor(header: Header, rng: random.Random) -> None:
    del header[rng.choice(named(header))]


def add_tensor(header: Header, rng: random.Random) -> None:
    header[rng.choice(["surplus", "model.layers.0.self_attn.rotary_emb.inv_freq"])] = header[rng.choice(named(header))]


def reshape(header: Header, rng: random.Random) -> None:
    entry = header[rng.choice(named(header))]
    entry["shape"] = rng.choice([entry["shape"][::-1], [*entry["shape"], 1], [], [-1], [2**62, 4], [0], "x"])


def reformat(header: Header, rng: random.Random) -> None:
    header[rng.choice(named(header))]["dtype"] = rng.choice([*DTYPES, "I16", "F8_E4M3", "x", 1, None])


def move(header: Header, rng: random.Random) -> None:
    entry = header[rng.choice(named(header))]
    begin, end = entry["data_offsets"]
    entry["data_offsets"] = rng.choice(
        [[begin + 4, end + 4], [begin, end + 4], [end, begin], [-4, end - 4], [begin], 3]
    )


def respell(header: Header, rng: random.Random) -> None:
    """The same tensors at the same places, in other words."""
    header["__metadata__"] = {"format": "pt", "x": "y"}


OF_HEADERS = (swap_places, swap_names, rename_tensor, lose_tensor, add_tensor, reshape, reformat, move, respell)


def of_shard(change: Callable[[Header, random.Random], None]) -> Callable:
    def damaged(files: dict[str, bytes], name: str, rng: random.Random) -> None:
        files[name] = of_header(files[name], rng, change)

    return damaged


def flip_number(files: dict[str, bytes], name: str, rng: random.Random) -> None:
    _, numbers = split(files[name])
    place = rng.randrange(len(files[name]) - len(numbers), len(files[name]))
    data = bytearray(files[name])
    data[place] ^= 1 << rng.randrange(8)
    files[name] = bytes(data)


OF_SHARDS = {"numbers flipped": flip_number} | {change.__name__: of_shard(change) for change in OF_HEADERS}


# -- What the files describe


def differs(model: SupraForCausalLM, folder: Path) -> str | None:
    """What of a loaded model is not as the files of its directory say."""
    described, stored = json.loads((folder / "config.json").read_text(encoding="utf-8-sig")), read(folder)
    state = model.state_dict()
    for name, tensor in stored.items():
        if name in state and not same(state[name], tensor.to(state[name].dtype)):
            return f"tensor {name} has other numbers than its file"
    for name, tensor in state.items():
        source = name if name in stored else model.all_tied_weights_keys.get(name)
        if source not in stored:
            return f"tensor {name} is in no file"
        if not same(tensor, stored[source].to(tensor.dtype)):
            return f"tensor {name} is not tied to {source}"
    if "dtype" in described and described["dtype"] is not None and str(model.dtype) != f"torch.{described['dtype']}":
        return f"the model is in {model.dtype}, its config.json says {described['dtype']}"
    if described["supra"] != model.config.supra:
        return f"the model is swapped by {model.config.supra}"
    kinds = [layer.mixer.spec.layer for _, layer in model.swapped_layers()]
    if kinds != [number for number, kind in enumerate(described["supra"]["layers"]) if kind != "softmax"]:
        return f"layers {kinds} are swapped"
    told = model.config.to_dict()
    for key in described.keys() - WORDS:
        if described[key] is not None and not says(told.get(key), described[key]):
            return f"config.json says {key} = {described[key]!r}, the model has {told.get(key)!r}"
    return None


def says(told: Any, described: Any) -> bool:
    """Whether a value of a config is the one in the file, but for keys of an object that transformers fills in."""
    if isinstance(told, dict) and isinstance(described, dict):
        return all(key in told and says(told[key], value) for key, value in described.items())
    return told == described


def read(folder: Path) -> dict[str, Tensor]:
    """The tensors of a model directory by name."""
    if (folder / INDEX).exists():
        names = set(json.loads((folder / INDEX).read_text(encoding="utf-8-sig"))["weight_map"].values())
    else:
        names = {"model.safetensors"}
    tensors = {}
    for name in names:
        header, numbers = split((folder / name).read_bytes())
        for tensor in named(header):
            begin, end = header[tensor]["data_offsets"]
            kind = DTYPES[header[tensor]["dtype"]]
            flat = torch.frombuffer(bytearray(numbers[begin:end]), dtype=kind)
            tensors[tensor] = flat.reshape(header[tensor]["shape"])
    return tensors


def same(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.nan_to_num(7.0), second.nan_to_num(7.0)) and torch.equal(first.isnan(), second.isnan())
