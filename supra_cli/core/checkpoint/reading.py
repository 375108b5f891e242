"""Reading a model directory, strictly: what is missing, too much, misshapen or damaged is an error that names it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from supra_cli.core import hub
from supra_cli.core.checkpoint.describing import UNQUANTISED, check_attention, legible, read_config, skeleton, theirs
from supra_cli.core.checkpoint.record import check_headers, identity
from supra_cli.core.checkpoint.slices import Entry, fill, headers, same, stacked
from supra_cli.core.data.tokenizer import check_vocabulary
from supra_cli.core.errors import NotFoundError, SupraError, UsageError, first_line
from supra_cli.core.files import check_whole
from supra_cli.core.folder import INDEX, SINGLE, bare, weight_files, weight_map
from supra_cli.core.modeling import SupraConfig, SupraForCausalLM

_WHOLE = ("F64", "F32", "BF16", "F16")
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")

# Tensors of GPTQ, AWQ, compressed-tensors, fp8 and bitsandbytes, whose config does not always say so.
_QUANTISED = re.compile(r"\.(qweight|qzeros|weight_packed|weight_scale(_inv)?|absmax|quant_map|SCB)$")

# Buffers that old checkpoints carry as tensors; transformers computes them.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$")


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
    check_attention(config, device, "the call" if attn_implementation is not None else str(path / "config.json"))
    check(config, path)
    with _quiet(), legible(path) as readable:
        model = SupraForCausalLM.from_pretrained(readable, config=config, dtype=dtype or config.dtype or torch.float32)
    return model.to(device)


@torch.no_grad()
def materialise(model: SupraForCausalLM, path: Path | str, device: torch.device | str) -> None:
    """Give a model on meta the weights of a directory, in the model's own number format, each rank only its rows.

    A head that has been untied since the model was saved begins as what it was tied to. Errors as of `load`.
    """
    path = Path(path)
    config = read_config(path)
    stored = check(config, path)
    saved = skeleton(config)
    stored = _renamed(saved, stored)
    model.to_empty(device=device)
    model.tie_weights()
    for part in model.modules():
        if part._non_persistent_buffers_set:  # in no file: rotary tables, which the module computes of its config
            model._init_weights(part)
    for name, source in saved.all_tied_weights_keys.items():
        stored.setdefault(name, stored.get(source))
    fill(model.state_dict(), path, stored)


def examine(path: Path | str) -> SupraConfig:
    """The config of a model directory, after everything that its files can say wrong was looked for.

    config.json and generation_config.json, the weights' names, shapes and formats, the tokenizer where there is one and
    its vocabulary: all that loading would stumble over, from headers alone.
    """
    path = Path(path)
    config = read_config(path)
    check(config, path)
    if has_tokenizer(path):
        load_tokenizer(path, config)
    return config


def outline(source: hub.Source) -> SupraConfig:
    """The config of a model that a plan is made for: no weights are needed, but what lies here of them is examined."""
    path = hub.config_folder(source)
    return read_config(path) if source.repo is not None or bare(path) else examine(path)


def has_tokenizer(path: Path) -> bool:
    return any((path / name).is_file() or (path / name).is_symlink() for name in _TOKENIZERS)


def load_tokenizer(path: Path | str, config: SupraConfig | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside a model; `config` is the model's own, read where None.

    A SupraError names a file that cannot be read, or a vocabulary that the model has no room for.
    """
    path = Path(path)
    if not has_tokenizer(path):
        raise NotFoundError(
            f"{path} has no tokenizer, expected tokenizer.json beside the model; copy the base's tokenizer files there"
        )
    for name in (*_TOKENIZERS, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"):
        if (path / name).exists() or (path / name).is_symlink():
            check_whole(path / name)
    if config is None and (path / "config.json").is_file():
        config = read_config(path)
    # A converted model's type is not in transformers' table of tokenizers, its base's is.
    plain = None if config is None else config.plain()
    try:
        with legible(path) as readable:
            tokenizer = AutoTokenizer.from_pretrained(readable, config=plain)
    except Exception as error:
        if not theirs(error):
            raise
        if not (path / "tokenizer.json").is_file() and (path / "tokenizer.model").is_file():
            raise SupraError(_needed_for_model_file(path / "tokenizer.model", error)) from error
        raise SupraError(
            f"the tokenizer in {path} cannot be read ({first_line(error)}); restore its files, or install the newer "
            f"tokenizers that wrote them (here is {metadata.version('tokenizers')})"
        ) from error
    tokenizer.name_or_path = str(path)  # not that of the copies without byte-order marks
    if config is not None:
        check_vocabulary(tokenizer, config)
    return tokenizer


def _needed_for_model_file(file: Path, error: Exception) -> str:
    """What reading `tokenizer.model` takes: SentencePiece is a protocol buffer, tiktoken's are lines of base64."""
    with file.open("rb") as stream:
        needed = ("sentencepiece", "protobuf") if stream.read(1) == b"\n" else ("tiktoken", "blobfile")
    missing = [name for name in needed if not _installed(name)]
    if missing:
        return (
            f"{file} is read with {' and '.join(needed)}; pip install {' '.join(missing)}, "
            f"or copy the base's tokenizer.json into {file.parent}"
        )
    return f"{file} cannot be read ({first_line(error)}); restore it, or copy the base's tokenizer.json there"


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def tensors(path: Path) -> dict[str, Entry]:
    """Name → entry of every tensor of a model directory, from the shards' headers, checked against the index."""
    found = headers(path, weight_files(path))
    if (path / INDEX).is_file() and not (path / SINGLE).is_file():
        for name, file in weight_map(path).items():
            if name not in found or found[name].file != file:
                raise SupraError(
                    f"tensor '{name}' is missing in {path / file}, though {INDEX} places it there; restore the file"
                )
    return found


def check(config: SupraConfig, path: Path) -> dict[str, Entry]:
    """`tensors` of a directory. SupraError naming the first tensor that the model of `config` lacks, has not, has in
    another shape or ties to one that differs, or a file whose tensors do not lie where they were saved.
    """
    found = tensors(path)
    _check_names(config, path, found)
    check_headers(path)
    return found


def _check_names(config: SupraConfig, path: Path, found: Mapping[str, Entry]) -> None:
    for name, entry in found.items():
        if _QUANTISED.search(name) or (entry.dtype not in _WHOLE and name.endswith(".weight")):
            raise UsageError(f"tensor '{name}' in {entry.file} is quantised ({entry.dtype}); {UNQUANTISED}")
    model = skeleton(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = _renamed(model, found)
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
    for name, source in tied.items():
        if name in found and source in found and not same(path, found[name], found[source]):
            raise SupraError(
                f"{path / 'config.json'} ties {name} to {source} and the files hold two that differ; set "
                f"tie_word_embeddings to false in it, or leave {name} out"
            )


def _renamed(model: SupraForCausalLM, found: Mapping[str, Entry]) -> dict[str, Entry]:
    """The entries by the names of the model in memory, for which transformers keeps a table: tensors were renamed, have
    a prefix or none, or are stored expert by expert.
    """
    table, expected = get_model_conversion_mapping(model), model.state_dict()
    renames = [entry for entry in table if isinstance(entry, WeightRenaming)]
    merges = [entry for entry in table if isinstance(entry, WeightConverter)]
    entries: dict[str, Entry] = {}
    apart: dict[str, dict[str, list[Entry]]] = {}
    for name in sorted(found, key=dot_natural_key):
        new, pattern = rename_source_key(name, renames, merges, model.base_model_prefix, expected)
        if pattern is None:
            entries[new] = found[name]
        else:
            apart.setdefault(new, {}).setdefault(pattern, []).append(found[name])
    for name, columns in apart.items():
        merge = next(merge for merge in merges if columns.keys() <= set(merge.source_patterns))
        try:
            entries[name] = stacked([columns.get(pattern, []) for pattern in merge.source_patterns])
        except ValueError as error:
            raise SupraError(f"the checkpoint does not have each expert of '{name}' once ({error})") from error
    return entries


def holds(path: Path | str, weights: str) -> bool:
    """Whether a directory has the weights of that identity, and every file of them in its full size."""
    try:
        return identity(path) == weights and bool(tensors(Path(path)))
    except (SupraError, OSError):
        return False


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
