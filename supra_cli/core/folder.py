"""A model directory by its files alone: those that hold the weights, or what the directory is instead. No torch."""

from __future__ import annotations

from pathlib import Path

from supra_cli.core.errors import NotFoundError, SupraError
from supra_cli.core.files import check_whole, read_json

_WORDS = (".json", ".txt", ".md", ".model", ".jinja", ".toml", "")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

_MERGE = (
    'merge it first: python -c "from peft import AutoPeftModelForCausalLM as M; '
    "M.from_pretrained('{path}').merge_and_unload().save_pretrained('MERGED')\""
)
_FROM_BIN = (
    'python -c "from transformers import AutoModelForCausalLM as M; '
    "M.from_pretrained('{path}').save_pretrained('{path}')\""
)
_FROM_GGUF = (
    'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
    "[C.from_pretrained('{path}', gguf_file='{file}').save_pretrained('{path}') for C in (M, T)]\""
)

# Pattern of files → what they are, and what to do. The first that matches is told: the specific before the common.
_WEIGHTS_OF_OTHERS = (
    ("*.gguf", "weights in GGUF", f"with `pip install gguf`, {_FROM_GGUF} writes them as safetensors"),
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
    ("pytorch_model*.bin", "pickled weights", f"{_FROM_BIN} writes them as safetensors"),
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


def check_model(path: Path) -> None:
    """Raise unless `path` holds the config.json of a model; the NotFoundError says what the directory is instead."""
    if (path / "adapter_config.json").is_file():
        # Where peft is installed, transformers would load the adapter's base, whatever weights lie here.
        adapter = read_json(path / "adapter_config.json")
        base = adapter.get("base_model_name_or_path") if isinstance(adapter, dict) else None
        raise NotFoundError(
            f"{path} holds a PEFT adapter{f' of {base}' if base else ''}, expected a whole model; "
            f"{_MERGE.format(path=path)}, or delete adapter_config.json if the weights here are merged"
        )
    config = path / "config.json"
    if config.is_file() or config.is_symlink():
        check_whole(config)
        return
    raise NotFoundError(f"{path} is no model: it holds no config.json{_instead(path)}")


def bare(path: Path) -> bool:
    """Whether a directory describes a model and holds nothing else: enough for a plan, without any weights."""
    if (path / INDEX).exists() or any(path.glob("**/*.incomplete")):
        return False
    return all(file.suffix in _WORDS for file in path.iterdir() if not file.is_dir())


def _instead(path: Path) -> str:
    if (path / "model_index.json").is_file():
        return " but a diffusers pipeline; supra converts language models"
    if (path / "modules.json").is_file():
        return " but a sentence-transformers model; supra converts language models that predict the next token"
    inner = sorted(config.parent for config in path.glob("*/config.json"))
    if inner:
        return f", {inner[0]} does; name that"
    if hint := _other_weights(path):
        return f" but {hint}"
    return "; give the directory of a model"


def _other_weights(path: Path) -> str | None:
    """What weights lie there in another format, and how they become safetensors."""
    for pattern, what, remedy in _WEIGHTS_OF_OTHERS:
        for file in sorted(path.glob(pattern)):
            return f"{what} ({file.name}); {remedy.format(path=path, file=file.name)}"
    return None


def weight_files(path: Path, name: str | None = None) -> list[str]:
    """The files that hold the weights of a model, each there and no pointer to content elsewhere.

    Only `model.safetensors` and what the index names is read: `consolidated*` beside it repeats the weights in another
    layout. NotFoundError where there are no safetensors, for `name` where the directory's own says nothing; SupraError
    where some are missing, or where two models lie in one directory.
    """
    single, index = path / SINGLE, path / INDEX
    if not (index.is_file() or index.is_symlink()):
        if not (single.is_file() or single.is_symlink()):
            raise _no_weights(path, name or str(path))
        shards = [SINGLE]
    else:
        shards = sorted(set(weight_map(path).values()))
        if single.is_file() and shards != [SINGLE]:
            # transformers' save_pretrained leaves an older save in the other form where it lies, and its
            # from_pretrained prefers model.safetensors, be it the stale one.
            raise SupraError(
                f"{path} holds two models, {SINGLE} and the {len(shards)} files that {INDEX} names; "
                f"delete whichever is stale"
            )
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


def _no_weights(path: Path, name: str) -> SupraError:
    """Why a directory with a config has no weights."""
    shards = sorted(file.name for file in path.glob("model*-of-*.safetensors"))
    if shards:
        return SupraError(
            f"{path} holds {shards[0]} and {len(shards) - 1} more but not their index, {INDEX}; "
            "copy it from where the shards come from"
        )
    if partial := next((path.glob("**/*.incomplete")), None):
        return SupraError(f"{path} is a download that broke off ({partial.name}); download the model again")
    if hint := _other_weights(path):
        return NotFoundError(f"{name} holds no safetensors weights but {hint}")
    if others := sorted(file.name for file in path.glob("*.safetensors")):
        return NotFoundError(
            f"{name} holds {others[0]} but neither {SINGLE} nor {INDEX}; if it is the whole model, name it {SINGLE}"
        )
    return NotFoundError(f"{name} holds no safetensors weights; supra reads no other format")
