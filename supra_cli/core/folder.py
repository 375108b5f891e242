"""A model directory by its files alone: those that hold the weights, or what the directory is instead. No torch."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path

from supra_cli.core.errors import NotFoundError, SupraError
from supra_cli.core.files import check_whole, read_json

_WORDS = (".json", ".txt", ".md", ".model", ".jinja", ".toml", "")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

# Pattern of files → what they are, and what to do. The first that matches is told: the specific before the common.
_WEIGHTS_OF_OTHERS = (
    ("*.gguf", "weights in GGUF", "with `pip install gguf accelerate`, {from_gguf} writes them as safetensors"),
    (
        "consolidated*.safetensors",
        "weights in the layout of mistral-inference",
        "take the model's Hugging Face files, or convert these with convert_mistral_weights_to_hf.py of transformers' "
        "repository",
    ),
    (
        "consolidated*.pth",
        "weights in Meta's own layout",
        "take the model's Hugging Face files (often named -hf), or convert these with convert_llama_weights_to_hf.py "
        "of transformers' repository",
    ),
    ("pytorch_model*.bin", "pickled weights", "{from_bin} writes them as safetensors"),
    ("*.ckpt", "a pickled training state", "export it to safetensors with the tool that trained it"),
    ("*.pt*", "pickled weights", "save them as safetensors with the tool that wrote them"),
    (
        "*.distcp",
        "a sharded training state",
        "merge it first: accelerate merge-weights '{path}' MERGED",
    ),
    ("*.h5", "weights of TensorFlow", "take the model's PyTorch files, or convert them with transformers 4"),
    ("*.msgpack", "weights of Flax", "take the model's PyTorch files, or convert them with transformers 4"),
    ("*.onnx", "an exported ONNX graph", "take the model that it was exported from"),
    ("*.npz", "weights of MLX", "take the model that they were converted from"),
    ("*.mlx", "weights of MLX", "take the model that they were converted from"),
)


@dataclass(frozen=True)
class Place:
    """Where a model's files lie, here or on the hub, as sentences about them have to name it."""

    name: str
    files: tuple[str, ...]
    """All of them, with `/` between folder and file."""
    load: str
    """What transformers' `from_pretrained` takes, in quotes."""
    save: str
    """Where the same model as safetensors would go."""
    on_hub: bool = False

    @classmethod
    def here(cls, path: Path) -> Place:
        files = (file.relative_to(path).as_posix() for file in path.rglob("*") if not file.is_dir())
        return cls(str(path), tuple(sorted(files)), f"'{path}'", str(path))

    @classmethod
    def hub(cls, repo: str, revision: str | None, files: Iterable[str]) -> Place:
        pinned = f", revision='{revision}'" if revision else ""
        return cls(repo, tuple(sorted(files)), f"'{repo}'{pinned}", repo.rpartition("/")[2], on_hub=True)

    @property
    def top(self) -> list[str]:
        """The files that lie in no folder."""
        return [file for file in self.files if "/" not in file]


def check_model(path: Path, place: Callable[[], Place] | None = None) -> None:
    """Raise unless `path` holds the config.json of a model; the NotFoundError says what the directory is instead.

    `place` is what to call it, and all of its files, where `path` is a copy of some.
    """
    if place is None and not path.is_dir():
        raise NotFoundError(f"{path} is no directory here; give that of a model")
    place = place or functools.partial(Place.here, path)
    if (path / "adapter_config.json").is_file():
        # Where peft is installed, transformers would load the adapter's base, whatever weights lie here.
        raise _adapter(path, place())
    config = path / "config.json"
    if config.is_file() or config.is_symlink():
        check_whole(config)
        return
    raise NotFoundError(f"{place().name} is no model: it holds no config.json{_instead(place())}")


def _adapter(path: Path, place: Place) -> NotFoundError:
    """What to do with a PEFT adapter: the line that merges it, its tokenizer beside it or else its base's."""
    adapter = read_json(path / "adapter_config.json")
    base = adapter.get("base_model_name_or_path") if isinstance(adapter, dict) else None
    own = {"tokenizer.json", "tokenizer_config.json", "tokenizer.model"}.intersection(place.top)
    words = place.load if own else f"'{_plain(base, 'BASE')}'" if base else None
    tokenizer = f"; T.from_pretrained({words}).save_pretrained('MERGED')" if words else ""
    return NotFoundError(
        f"{place.name} holds a PEFT adapter{f' of {base}' if base else ''}, expected a whole model; merge it first: "
        'with `pip install peft`, python -c "from peft import AutoPeftModelForCausalLM as M; '
        "from transformers import AutoTokenizer as T; "
        f"M.from_pretrained({place.load}).merge_and_unload().save_pretrained('MERGED'){tokenizer}\" writes it to "
        "MERGED, or delete adapter_config.json if the weights here are merged"
    )


def bare(path: Path) -> bool:
    """Whether a directory describes a model and holds nothing else: enough for a plan, without any weights."""
    if (path / INDEX).exists() or any(path.glob("**/*.incomplete")):
        return False
    return all(file.suffix in _WORDS for file in path.iterdir() if not file.is_dir())


def _instead(place: Place) -> str:
    if "model_index.json" in place.files:
        return " but a diffusers pipeline; supra converts language models"
    if "modules.json" in place.files:
        return " but a sentence-transformers model; supra converts language models that predict the next token"
    inner = [file for file in place.files if fnmatch(file, "*/config.json") and file.count("/") == 1]
    if inner and not place.on_hub:
        return f", {Path(place.name, inner[0]).parent} does; name that"
    if inner:
        return f" but a folder {inner[0].partition('/')[0]} does; download that and give its directory"
    if hint := _other_weights(place):
        return f" but {hint}"
    return "; give the directory of a model" if not place.on_hub else "; name a model"


def _other_weights(place: Place) -> str | None:
    """What weights lie there in another format, and how they become safetensors."""
    for pattern, what, remedy in _WEIGHTS_OF_OTHERS:
        if files := [file for file in place.top if fnmatch(file, pattern)]:
            # Of several quantisations, the one that lost least: none, or else the most bits, by the name.
            file = max(files, key=lambda name: ("f16" in name.lower() or "f32" in name.lower(), name))
            file = file if pattern == "*.gguf" else files[0]
            lines = {"from_bin": _from_bin(place), "from_gguf": _from_gguf(place, _plain(file, "FILE.gguf"))}
            return f"{what} ({file}); {remedy.format(path=place.save, **lines)}"
    return None


def _plain(name: object, otherwise: str) -> str:
    """What someone else has named, in a line that is to be pasted: only as long as no shell and no Python heeds it."""
    return name if isinstance(name, str) and re.fullmatch(r"[\w./ -]+", name) else otherwise


def _from_bin(place: Place) -> str:
    """The line that writes pickled weights as safetensors; beside a local model its tokenizer lies already."""
    tokenizer = f"; T.from_pretrained({place.load}).save_pretrained('{place.save}')" if place.on_hub else ""
    names = "AutoModelForCausalLM as M" + (", AutoTokenizer as T" if place.on_hub else "")
    return (
        f'python -c "from transformers import {names}; '
        f"M.from_pretrained({place.load}).save_pretrained('{place.save}'){tokenizer}\""
    )


def _from_gguf(place: Place, file: str) -> str:
    """The line that writes a GGUF's weights, config and tokenizer as transformers' own files."""
    told = f"{place.load}, gguf_file='{file}'"
    # Since 5.17 transformers keeps a GGUF's weights packed, and refuses to save them, unless it is told to unpack them.
    packs = tuple(int(part) for part in version("transformers").split(".")[:2]) >= (5, 17)
    name, unpacked = (", GgufConfig as G", ", quantization_config=G(dequantize=True)") if packs else ("", "")
    return (
        f'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T{name}; '
        f"M.from_pretrained({told}{unpacked}).save_pretrained('{place.save}'); "
        f"T.from_pretrained({told}).save_pretrained('{place.save}')\""
    )


def named_shards(path: Path) -> list[str]:
    """The files that hold the weights of a model by its index, or the one file where it has none; there or not."""
    index = path / INDEX
    return sorted(set(weight_map(path).values())) if index.is_file() or index.is_symlink() else [SINGLE]


def weight_files(path: Path) -> list[str]:
    """The files that hold the weights of a model, each there and no pointer to content elsewhere.

    Only `model.safetensors` and what the index names is read: `consolidated*` beside it repeats the weights in another
    layout. NotFoundError where there are no safetensors; SupraError where some are missing, or where two models lie in
    one directory.
    """
    single, shards = path / SINGLE, named_shards(path)
    if single.is_file() or single.is_symlink():
        if shards != [SINGLE]:
            # transformers' save_pretrained leaves an older save in the other form where it lies, and its
            # from_pretrained prefers model.safetensors, be it the stale one.
            raise SupraError(
                f"{path} holds two models, {SINGLE} and the {len(shards)} files that {INDEX} names; "
                f"delete whichever is stale"
            )
    elif not (path / INDEX).exists():
        raise no_weights(Place.here(path))
    for shard in shards:
        if shard != SINGLE and not ((path / shard).is_file() or (path / shard).is_symlink()):
            missing = [name for name in shards if not (path / name).is_file()]
            raise SupraError(
                f"{path / shard} is missing, though {INDEX} names it ({len(missing)} of {len(shards)} weight files "
                "are); restore the file, download or convert again"
            )
        check_whole(path / shard)
    return shards


def weight_map(path: Path) -> dict[str, str]:
    """Tensor → file, as a model's index says."""
    index = read_json(path / INDEX)
    placed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(placed, dict) or not placed or not all(isinstance(file, str) for file in placed.values()):
        raise SupraError(f"{path / INDEX} has no weight_map from tensors to files; restore the file")
    if outside := next((file for file in placed.values() if Path(file).name != file), None):
        raise SupraError(f"{path / INDEX} names {outside}, expected files in its own directory; restore the file")
    if not isinstance(index.get("metadata"), dict):  # transformers writes into it
        raise SupraError(f'{path / INDEX} has no object "metadata", which may be empty; restore the file')
    return placed


def no_weights(place: Place) -> SupraError:
    """Why what has a config has no weights."""
    shards = [file for file in place.top if fnmatch(file, "model*-of-*.safetensors")]
    if shards:
        return SupraError(
            f"{place.name} holds {shards[0]} and {len(shards) - 1} more but not their index, {INDEX}; "
            "copy it from where the shards come from"
        )
    if partial := [file for file in place.files if file.endswith(".incomplete")]:
        return SupraError(
            f"{place.name} is a download that broke off ({Path(partial[0]).name}); download the model again"
        )
    if hint := _other_weights(place):
        return NotFoundError(f"{place.name} holds no safetensors weights but {hint}")
    if others := [file for file in place.top if file.endswith(".safetensors")]:
        return NotFoundError(
            f"{place.name} holds {others[0]} but neither {SINGLE} nor {INDEX}; if it is the whole model, "
            f"{'download it and ' if place.on_hub else ''}name it {SINGLE}"
        )
    return NotFoundError(f"{place.name} holds no safetensors weights; supra reads no other format")
