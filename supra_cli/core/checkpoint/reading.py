"""Reading a model directory, strictly: what is missing, too much, misshapen or damaged is an error that names it."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from supra_cli.core.checkpoint.files import sha256
from supra_cli.core.errors import NotFoundError, SupraError, UsageError, first_line
from supra_cli.core.files import read_json
from supra_cli.core.modeling import SupraConfig, SupraForCausalLM

PROVENANCE = "supra.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

# Buffers that old checkpoints carry as tensors; transformers computes them.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$")


class Entry(NamedTuple):
    """Where a tensor lies."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    """As safetensors writes it: F32, BF16, ..."""


def load(
    path: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
) -> SupraForCausalLM:
    """The model in a directory, converted or plain, in evaluation mode; dtype None is the one it was saved in.

    A missing, extra or misshapen tensor and a damaged file are a SupraError that names it.
    """
    path = Path(path)
    config = read_config(path)
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    check(config, tensors(path))
    with _quiet():
        model = SupraForCausalLM.from_pretrained(path, config=config, dtype=dtype or config.dtype or torch.float32)
    return model.to(device)


def load_tokenizer(path: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside a model."""
    path = Path(path)
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise NotFoundError(
            f"{path} has no tokenizer, expected tokenizer.json beside the model; copy the base's tokenizer files there"
        )
    # A converted model's type is not in transformers' table of tokenizers, its base's is.
    config = read_config(path).plain() if (path / "config.json").is_file() else None
    try:
        return AutoTokenizer.from_pretrained(path, config=config)
    except (ValueError, OSError, LookupError, TypeError, AttributeError) as error:
        raise SupraError(f"the tokenizer in {path} cannot be read ({first_line(error)}); restore its files") from error


def read_config(path: Path | str) -> SupraConfig:
    """The config of a model directory, converted or plain."""
    path = Path(path)
    if not (path / "config.json").is_file():
        raise NotFoundError(
            f"{path} is not a model directory, expected a config.json in it; give the directory of a model"
        )
    described = read_json(path / "config.json")
    if not isinstance(described, dict) or "model_type" not in described:
        raise SupraError(f"{path / 'config.json'} names no model_type; restore the model's own config.json")
    record = described.get("supra")
    if described["model_type"] == SupraConfig.model_type and not (isinstance(record, dict) and "base" in record):
        raise SupraError(
            f"{path / 'config.json'} has no key 'supra' that names its base; restore the model's own config.json"
        )
    with describing_a_model(path / "config.json"):
        config = AutoConfig.from_pretrained(path)
        return config if isinstance(config, SupraConfig) else SupraConfig.from_base(config)


@contextmanager
def describing_a_model(
    file: Path | str, advice: str = "restore the model's own config.json", kind: type[SupraError] = SupraError
) -> Iterator[None]:
    """What transformers and PyTorch raise on a config that makes no sense, as a `kind` that ends with `advice`."""
    try:
        yield
    except (
        StrictDataclassError,
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        words = " ".join(str(error).split()) or type(error).__name__
        raise kind(f"{file} describes no model ({words}); {advice}") from error


def own_shape(described: Mapping[str, Any], **ends: int | None) -> SupraConfig:
    """The config of what a recipe's [model] and its tokenizer's `ends` describe; UsageError if that is no model."""
    with describing_a_model("the recipe's [model]", "give a whole Hugging Face configuration", UsageError):
        config = SupraConfig.from_base(AutoConfig.for_model(**described, **ends))
        if config.num_hidden_layers < 1:
            raise ValueError("it has no layer")
        skeleton(config)
        return config


def read_provenance(path: Path | str) -> dict[str, Any]:
    """What supra.json says: recipe, base, parent, tokens, versions, hashes; empty where supra did not write it."""
    file = Path(path) / PROVENANCE
    found = read_json(file) if file.is_file() else {}
    files = found.get("files") or {} if isinstance(found, dict) else None
    if not isinstance(files, dict) or not all(
        isinstance(known, dict) and "sha256" in known for known in files.values()
    ):
        raise SupraError(f"{file} is not what supra writes; restore the file, or delete it to do without what it says")
    return found


def tensors(path: Path) -> dict[str, Entry]:
    """Name → entry of every tensor of a model directory, from the shards' headers, checked against the index."""
    found: dict[str, Entry] = {}
    for file in shards(path):
        try:
            with safetensors.safe_open(path / file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 (a safe_open is no mapping)
                    view = shard.get_slice(name)
                    found[name] = Entry(file, tuple(view.get_shape()), view.get_dtype())
        except FileNotFoundError as error:
            raise SupraError(
                f"{path / file} is missing, though {INDEX} names it; restore the file or convert again"
            ) from error
        except safetensors.SafetensorError as error:
            raise SupraError(
                f"{path / file} is damaged ({first_line(error)}); restore the file or convert again"
            ) from error
    if (path / INDEX).is_file() and not (path / SINGLE).is_file():
        for name, file in _weight_map(path).items():
            if name not in found or found[name].file != file:
                raise SupraError(
                    f"tensor '{name}' is missing in {path / file}, though {INDEX} places it there; restore the file"
                )
    return found


def shards(path: Path) -> list[str]:
    """The names of a model directory's weight files."""
    if (path / SINGLE).is_file():
        return [SINGLE]
    if (path / INDEX).is_file():
        return sorted(set(_weight_map(path).values()))
    raise NotFoundError(
        f"{path} has no {SINGLE} and no {INDEX}; only safetensors weights are read, save the model in that format"
    )


def _weight_map(path: Path) -> dict[str, str]:
    index = read_json(path / INDEX)
    placed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
        raise SupraError(f"{path / INDEX} has no weight_map from tensors to files; restore the file")
    return placed


def skeleton(config: SupraConfig) -> SupraForCausalLM:
    """The model of `config` without weights, on the meta device."""
    with torch.device("meta"):
        return SupraForCausalLM._from_config(copy.deepcopy(config))


def check(config: SupraConfig, found: Mapping[str, Entry]) -> None:
    """Raise a SupraError naming the first tensor that the model of `config` lacks, has not or has in another shape."""
    with describing_a_model("config.json"):
        model = skeleton(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    renames = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    found = {rename_source_key(name, renames, [])[0]: entry for name, entry in found.items()}
    ignored = [_COMPUTED, *(re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ())]
    tied = model.all_tied_weights_keys
    missing = [name for name in expected if name not in found and tied.get(name) not in found]
    extra = [name for name in found if name not in expected and not any(pattern.search(name) for pattern in ignored)]
    for names, fault in ((missing, "lacks"), (extra, "has an unexpected")):
        if names:
            raise SupraError(
                f"the checkpoint {fault} tensor {_some(names)}; it is not a whole model of its config.json"
            )
    for name, shape in expected.items():
        if name in found and found[name].shape != shape:
            got, file = list(found[name].shape), found[name].file
            raise SupraError(
                f"tensor '{name}' in {file} has shape {got}, expected {list(shape)}; it belongs to another model"
            )


def verify(path: Path | str) -> None:
    """Hash every weight file and compare with supra.json; a difference is a SupraError that names the file."""
    path = Path(path)
    recorded = read_provenance(path).get("files")
    if not recorded:
        raise NotFoundError(
            f"{path} has no hashes to verify, expected them in {PROVENANCE}; convert or save the model with supra"
        )
    for file, known in recorded.items():
        if not (path / file).is_file():
            raise SupraError(f"{path / file} is missing, though {PROVENANCE} lists it; restore the file")
        if sha256(path / file) != known["sha256"]:
            raise SupraError(
                f"{path / file} is not what was saved, its hash differs from {PROVENANCE}; restore the file"
            )


def fingerprint(path: Path | str) -> str | None:
    """One hash for all weights of a directory that supra wrote; None for any other."""
    return digest(read_provenance(path).get("files"))


def holds(path: Path | str, weights: str) -> bool:
    """Whether a directory has the weights of that fingerprint, by its record, and every file of them in its full size.

    Unlike `verify`, it reads headers only.
    """
    try:
        return fingerprint(path) == weights and bool(tensors(Path(path)))
    except (SupraError, OSError):
        return False


def digest(files: Mapping[str, Any] | None) -> str | None:
    """One hash of the hashes of files; None without any."""
    if not files:
        return None
    return hashlib.sha256("".join(f"{name} {files[name]['sha256']}\n" for name in sorted(files)).encode()).hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bar of transformers: the command line has its own."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"'{names[0]}'{more}"
