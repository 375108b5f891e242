"""A model's description: config.json read, and everything that it can say wrong refused before any weight is read.

What transformers raises on a config is the config's fault; what our own code raises on one is ours, and stays an
internal error. So transformers builds the base from the config alone first, and only then is anything swapped.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
)

from supra_cli.core.archs import archs, by_kind
from supra_cli.core.checkpoint import slices
from supra_cli.core.checkpoint.record import check_format
from supra_cli.core.errors import ResourceError, SupraError, UsageError
from supra_cli.core.files import read_json
from supra_cli.core.folder import check_model, weight_files
from supra_cli.core.modeling import SupraConfig, SupraForCausalLM

ADVICE = "restore the model's own config.json"
DTYPES = ("float32", "float64", "bfloat16", "float16")
_WIDEST = 2**24  # the square of it still fits into the bytes of a tensor
_DEEPEST = 10_000  # layers, of which transformers would build every one
UNQUANTISED = "take the model that it was quantised from, or dequantise it first (`model.dequantize()` in transformers)"


def read_config(path: Path | str) -> SupraConfig:
    """The config of a model directory, converted or plain; transformers has built the base that it describes. Where it
    names no dtype it has that of the weights beside it, if there are any.

    NotFoundError: the directory holds no model. UsageError: a model that cannot be converted, by name. ResourceError:
    an attention that does not run on this machine. SupraError: a config that describes no model.
    """
    path = Path(path)
    check_model(path)
    check_format(path)
    file = path / "config.json"
    described = read_json(file)
    if not isinstance(described, dict):
        raise SupraError(f"{file} holds a JSON {type(described).__name__}, expected an object; {ADVICE}")
    if not isinstance(described.get("model_type"), str):
        raise SupraError(f"{file} names no model_type; {ADVICE}")
    record = _swap_record(file, described) if described["model_type"] == SupraConfig.model_type else None
    base_type = described["model_type"] if record is None else record["base"]
    _refuse_what_cannot_be_converted(file, described, base_type)
    with legible(path) as readable, describing_a_model(file):
        _check_depth(described, base_type)
        if record is None:
            base = AutoConfig.from_pretrained(readable, trust_remote_code=False)
        else:
            plain = {key: value for key, value in described.items() if key != "supra"}
            base = CONFIG_MAPPING[base_type].from_dict(plain | {"model_type": base_type})
        base.name_or_path = str(path)
    if base.model_type != base_type:  # transformers reads a mistral with layer_types as another architecture
        _refuse_what_cannot_be_converted(file, described, base.model_type)
    build_base(base, file)
    if (path / "generation_config.json").exists():
        _generation(path)
    if record is None:
        config = SupraConfig.from_base(base)
    else:
        config = SupraConfig.from_dict(described)
        config.name_or_path = str(path)
        with describing_a_model(file):
            config.swap.check(config.num_hidden_layers)
    if config.dtype is None:
        config.dtype = _dtype_of_weights(path)
    return config


def _dtype_of_weights(path: Path) -> torch.dtype | None:
    """That of the first floating-point tensor, as transformers' `dtype="auto"` takes it. None where no weights are, or
    damaged ones: who reads them says what is wrong.
    """
    with suppress(SupraError):
        stored = slices.headers(path, weight_files(path)[:1]).values()
        kinds = [slices.DTYPES[entry.dtype] for entry in stored if entry.dtype in slices.DTYPES]
        return next((kind for kind in kinds if kind.is_floating_point), None)


def own_shape(described: Mapping[str, Any], **ends: int | None) -> SupraConfig:
    """The config of what a recipe's [model] and its tokenizer's `ends` describe; UsageError if that is no model."""
    name, advice = "the recipe's [model]", "give a whole Hugging Face configuration"
    with describing_a_model(name, advice, UsageError):
        _check_depth(described, described.get("model_type"))
        base = AutoConfig.for_model(**described, **ends)
    archs.get(base.model_type)
    build_base(base, name, advice, UsageError)
    return SupraConfig.from_base(base)


@contextmanager
def describing_a_model(
    file: Path | str, advice: str = ADVICE, kind: type[SupraError] = SupraError, what: str = "describes no model"
) -> Iterator[None]:
    """What transformers and PyTorch raise on a config that makes no sense, as a `kind` that ends with `advice`.

    Around calls of theirs alone: our own errors are no fault of the file.
    """
    try:
        yield
    except Exception as error:
        if not theirs(error):
            raise
        words = " ".join(str(error).split()) or type(error).__name__
        raise kind(f"{file} {what} ({words}); {advice}") from error


def theirs(error: Exception) -> bool:
    """Whether a library says with `error` that a file makes no sense; not what the system refuses, with an errno."""
    if isinstance(error, OSError):
        return error.errno is None
    kinds = (
        *(StrictDataclassError, ArithmeticError, AssertionError, AttributeError, ImportError, LookupError),
        *(RuntimeError, TypeError, ValueError),
    )
    return isinstance(error, kinds) or type(error) is Exception  # which is what tokenizers raises


def _check_depth(described: Mapping[str, Any], base_type: str | None) -> None:
    """ValueError before transformers makes a list, or a model, of as many layers as no memory holds."""
    other = CONFIG_MAPPING[base_type].attribute_map if base_type in CONFIG_MAPPING else {}
    for key in ("num_hidden_layers", other.get("num_hidden_layers")):
        if isinstance(layers := described.get(key), int | float) and layers > _DEEPEST:
            raise ValueError(f"{key} is {layers:,}, more than any model has")


def build_base(
    base: PreTrainedConfig, file: Path | str, advice: str = ADVICE, kind: type[SupraError] = SupraError
) -> None:
    """Build the base of a config on the meta device, as loading it would: rotary tables, activations, attention."""
    base = copy.deepcopy(base)
    with describing_a_model(file, advice, kind):
        heads, layers = base.num_attention_heads, base.num_hidden_layers
        kv_heads = getattr(base, "num_key_value_heads", None) or heads
        if layers < 1:
            raise ValueError("it has no layer")
        if heads < 1 or kv_heads < 1:
            raise ValueError(f"it has {heads} heads, and {kv_heads} of keys and values")
        if heads % kv_heads:
            raise ValueError(f"{heads} heads cannot share {kv_heads} heads of keys and values evenly")
        if max(base.hidden_size, heads * (getattr(base, "head_dim", None) or 1)) > _WIDEST:
            raise ValueError(f"{heads} heads of {getattr(base, 'head_dim', None)} are wider than any model")
        if getattr(base, "head_dim", None) is None and base.hidden_size % heads:
            raise ValueError(f"a width of {base.hidden_size} is no multiple of its {heads} heads")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = getattr(base, name, None)
            if any(number >= base.vocab_size for number in (ids if isinstance(ids, list) else [ids or 0])):
                raise ValueError(f"{name} is {ids}, expected less than vocab_size, {base.vocab_size}")
        arch = archs.get(base.model_type)
        for layer in base.layer_types if arch.window is by_kind else ():
            if layer not in ("full_attention", "sliding_attention"):
                raise ValueError(f"layer_types has '{layer}', expected full_attention or sliding_attention")
        for name in arch.rope:
            if not isinstance(base.rope_parameters.get(name), int | float):
                raise ValueError(f"rope_parameters has no number {name}")
    try:
        with torch.device("meta"), describing_a_model(file, advice, kind):
            AutoModelForCausalLM.from_config(base)
    except kind as error:
        if isinstance(error.__cause__, ImportError):
            raise ResourceError(
                f"{file} asks for attn_implementation '{base._attn_implementation}', which does not run here "
                f"({' '.join(str(error.__cause__).split())}); install it, or remove that key"
            ) from error
        if isinstance(error.__cause__, KeyError) and (place := _place(base.to_dict(), error.__cause__.args[0])):
            raise kind(f"{file} describes no model (transformers knows no {place}); {advice}") from error
        raise


def _place(described: Mapping[str, Any], value: Any) -> str | None:
    """Where a config says `value`, as `rope_parameters.rope_type 'foo'`; None if nowhere."""
    for key, item in described.items():
        if item == value:
            return f"{key} '{value}'"
        if isinstance(item, dict) and (place := _place(item, value)):
            return f"{key}.{place}"
    return None


def skeleton(config: SupraConfig, dtype: torch.dtype | None = None) -> SupraForCausalLM:
    """The model of `config` without weights, on the meta device; `dtype` None is the config's own."""
    with torch.device("meta"):
        return SupraForCausalLM._from_config(copy.deepcopy(config), **({} if dtype is None else {"dtype": dtype}))


def check_attention(config: SupraConfig, device: torch.device | str, what: str) -> None:
    """ResourceError for flash attention, which `what` asks for, on a device that is no GPU."""
    name = config._attn_implementation
    if isinstance(name, str) and "flash" in name and torch.device(device).type != "cuda":
        raise ResourceError(
            f"{what} asks for attn_implementation '{name}', which runs on a CUDA GPU alone, not on {device}; "
            "remove that key or choose another device"
        )


def _swap_record(file: Path, described: Mapping[str, Any]) -> dict[str, Any]:
    """The key `supra` of a converted model's config, of the right types."""
    record = described.get("supra")
    if not isinstance(record, dict) or not isinstance(record.get("base"), str):
        raise SupraError(f"{file} has no key 'supra' that names its base; {ADVICE}")
    for key, kind in {"base": str, "mixer": str, "options": dict, "layers": list}.items():
        if not isinstance(record.get(key), kind):
            raise SupraError(f"{file} has no {kind.__name__} '{key}' under 'supra'; {ADVICE}")
    if not all(isinstance(layer, str) for layer in record["layers"]) or len(record) != 4:
        raise SupraError(f"{file} has more under 'supra' than base, mixer, options and names of layers; {ADVICE}")
    return record


def _refuse_what_cannot_be_converted(file: Path, described: Mapping[str, Any], base_type: str) -> None:
    if base_type not in archs:
        raise UsageError(
            f"unknown base architecture '{base_type}': {file} is of {_what(described, base_type)}; "
            f"supra converts {', '.join(archs)} (docs/adding-a-base-model.md: how to add one)"
        )
    for key, (causal, reason) in _UNKEPT.items():
        if bool(described.get(key, causal)) != causal:
            raise UsageError(f"{file} says {key} = {described[key]!r}, {reason}; supra converts causal attention alone")
    if (quantised := described.get("quantization_config", described.get("compression_config"))) is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise UsageError(f"{file} is of a model quantised by {method or 'an unnamed method'}; {UNQUANTISED}")
    code = described.get("auto_map")
    own = code.get("AutoModelForCausalLM") if isinstance(code, dict) else None
    known = AutoModelForCausalLM._model_mapping[CONFIG_MAPPING[base_type]].__name__
    exported = described["model_type"] == SupraConfig.model_type  # whose code is a copy of this package's
    if isinstance(own, str) and own.rpartition(".")[2] != known and not exported:
        raise UsageError(
            f"{file} says that its model is {own} (auto_map), code of its own, expected transformers' {known}; "
            "supra runs no code that comes with a model"
        )
    dtype = described.get("dtype", described.get("torch_dtype"))
    if dtype is not None and dtype not in DTYPES:
        raise SupraError(f"{file} says that dtype is {dtype!r}, expected one of {', '.join(DTYPES)}; {ADVICE}")
    attention = described.get("attn_implementation") or described.get("_attn_implementation")
    if isinstance(attention, str) and "flash" in attention and not torch.cuda.is_available():
        raise ResourceError(
            f"{file} asks for attn_implementation '{attention}', which runs on a CUDA GPU alone; remove that key"
        )


_UNKEPT = {
    "use_bidirectional_attention": (False, "tokens that see the ones after them"),
    "is_causal": (True, "tokens that see the ones after them"),
    "add_cross_attention": (False, "attention to an encoder"),
}
"""Keys of bases that have an arch, by which their attention may be another: what they say of causal attention, and what
the other is."""

_SINKS = {"deepseek_v4", "gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash"}
_HYBRIDS = {
    *("bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear", "lfm2", "lfm2_moe", "mamba"),
    *("mamba2", "minimax", "nemotron_h", "olmo_hybrid", "qwen3_5", "qwen3_5_moe", "qwen3_next", "recurrent_gemma"),
    *("rwkv", "xlstm", "zamba", "zamba2"),
}


def _what(described: Mapping[str, Any], base_type: str) -> str:
    """What kind of model it is that no arch is for, in words."""
    if isinstance(described.get("audio_config"), dict):
        return "an audio-language model"
    if isinstance(described.get("vision_config"), dict) or "_vl" in base_type:
        return "a vision-language model"
    if (
        described.get("is_encoder_decoder")
        or base_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
        or base_type in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES
    ):
        return "an encoder-decoder model"
    if base_type in _SINKS:
        return "a model with attention sinks, a learned logit in each softmax, which no mixer here has"
    if "kv_lora_rank" in described:
        return "a model with latent attention (MLA), which has no keys and values of its own to hand to a mixer"
    kinds = described.get("layer_types")
    if base_type in _HYBRIDS or (isinstance(kinds, list) and "linear_attention" in kinds):
        return "a hybrid, some or all of whose layers are recurrent already"
    if base_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "an encoder, which predicts no next token"
    if base_type in CONFIG_MAPPING:
        return "a model whose attention supra does not know yet"
    if "auto_map" in described:
        return "a model with code of its own (auto_map), which supra does not run"
    return f"a model that transformers {transformers.__version__} does not know either"


def _generation(path: Path) -> None:
    """Raise for a generation_config.json that is damaged: transformers would go on without it, and without its end."""
    file = path / "generation_config.json"
    described, advice = read_json(file), "restore the file, or delete it to do without"
    if not isinstance(described, dict):
        raise SupraError(f"{file} holds no JSON object; {advice}")
    ends = described.get("eos_token_id")
    if ends is not None and any(type(token) is not int for token in (ends if isinstance(ends, list) else [ends])):
        raise SupraError(f"{file} says that eos_token_id is {ends!r}, expected a number or a list of numbers; {advice}")
    with legible(path) as readable, describing_a_model(file, advice, what="makes no sense"):
        GenerationConfig.from_pretrained(readable)


@contextmanager
def legible(path: Path) -> Iterator[Path]:
    """`path`, or links to its files in a directory where no JSON has a byte-order mark.

    transformers and tokenizers read the files themselves, and take a mark for damage or, in generation_config.json, go
    on without the file.
    """
    if not (marked := with_mark(path)):
        yield path
        return
    with tempfile.TemporaryDirectory() as temporary:
        copies = Path(temporary)
        for file in path.iterdir():
            if file.name in marked:
                (copies / file.name).write_bytes(file.read_bytes().removeprefix(_MARK))
            else:
                (copies / file.name).symlink_to(file.absolute())
        yield copies


_MARK = b"\xef\xbb\xbf"


def with_mark(path: Path) -> set[str]:
    """The names of a directory's JSON files that begin with a byte-order mark."""
    return {file.name for file in path.glob("*.json") if file.is_file() and _has_mark(file)}


def _has_mark(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(_MARK)) == _MARK
