"""What a score depends on. Two scores with one key are one score, so what can change a score must stand in it."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from supra_cli.core.environment import versions
from supra_cli.core.files import dumps

FORMAT = 2

# Beside supra's own list: what asks, what reads the data, and the packages behind lm-eval's metrics.
_PACKAGES = ("lm_eval", "datasets", "jinja2", "numpy", "triton", "sacrebleu", "scikit-learn", "evaluate", "rouge-score")
# What takes another path through the arithmetic, with the same weights on the same device.
_VARIABLES = ("SUPRA_KERNEL", "TRITON_INTERPRET", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")
# In a model's folder all files count but these: weights have a hash of their own, the rest is for people and for git.
_NOT_READ = (".safetensors", ".md", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".log")
_READ_WHOLE = 1 << 26  # a larger file beside a task's Python is told apart by its size and its time


def model_key(path: Path, weights: str, *, device: str, dtype: str) -> dict[str, Any]:
    """What must be equal for two scores to be of the same model: all that is read from its folder, the code that
    computes it, and what it is computed on.
    """
    import torch

    return {
        "weights": weights,
        "files": _digest_of(path, _read_files(path)),
        "code": _code(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "dtype": dtype,
        "arithmetic": {
            **{name: os.environ.get(name) for name in _VARIABLES},
            # Setting any older name sets these; reading one raises where a process has set a newer.
            "fp32_matmul": [getattr(torch.backends, name).matmul.fp32_precision for name in ("cuda", "mkldnn")],
        },
        "versions": versions(*_PACKAGES),
    }


def task_key(task, settings, shots: int) -> dict[str, Any]:
    """What must be equal for two scores to be of the same questions: settings, the task's definition with what it
    includes, its Python and what lies beside that, the documents that are asked and, with `shots` examples in the
    prompt, those that they are drawn from.

    Not the place of anything: a folder of tasks that moved is the same folder.
    """
    settings = asdict(settings)
    count = settings.pop("limit")  # said by the documents themselves
    documents = list(itertools.islice(task.eval_docs, count))
    examples = list(task.fewshot_docs() or ()) if shots else []
    return {
        "format": FORMAT,
        **{name: settings[name] for name in ("batch_size", "max_length", "seed")},
        "num_fewshot": shots,
        **({"apply_chat_template": True} if settings["apply_chat_template"] else {}),
        "task_version": str(task.VERSION),
        "task_config": digest(dumps(definition(task), sort_keys=True)),
        "task_code": [_digest_of(folder, files) for folder, files in _python(task)],
        "task_data": [digest(dumps(rows, sort_keys=True)) for rows in (documents, examples)],
    }


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read_files(path: Path) -> Iterator[Path]:
    """Config, generation config, tokenizer, chat templates: whatever transformers may read, known to us or not."""
    for file in itertools.chain(path.iterdir(), path.glob("additional_chat_templates/*")):
        if file.is_file() and file.suffix not in _NOT_READ and file.name != "supra.json" and file.name[0] != ".":
            yield file


@functools.cache
def _code() -> str:
    """Of supra's own Python and of the mixers, architectures and measures of other packages: a version does not change
    while somebody writes a mixer.
    """
    folders = [Path(__file__).parents[1], Path(importlib.util.find_spec("supra_kernels").origin).parent]
    groups = (entry_points(group=f"supra.{name}") for name in ("mixers", "archs", "measures"))
    for point in itertools.chain(*groups):
        if (spec := importlib.util.find_spec(point.module)) is not None and spec.origin is not None:
            folders.append(Path(spec.origin).parent)
    return digest("".join(_digest_of(folder, folder.rglob("*.py")) for folder in folders))


def definition(task) -> dict[str, Any]:
    """The task's fields, includes merged, functions by name; without what stands in the key by itself or is a path."""
    fields = _named(asdict(task.config)) if hasattr(task.config, "__dataclass_fields__") else _named(dict(task.config))
    for name in ("num_fewshot", "dataset_kwargs"):
        fields.pop(name, None)
    if isinstance(fields.get("metadata"), dict):
        # The last two are what a task that makes its own documents was told for it; the documents say it themselves.
        for name in ("config_source", "tokenizer", "max_seq_lengths"):
            fields["metadata"].pop(name, None)
    return {"class": type(task).__qualname__, **fields}


def _named(value: Any) -> Any:
    """`value` with functions as their names: as text they would carry an address, another one in each process."""
    if isinstance(value, dict):
        return {str(key): _named(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_named(item) for item in value]
    return getattr(value, "__qualname__", type(value).__qualname__) if callable(value) else value


def _functions(value: Any) -> Iterator[Callable]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _functions(item)
    elif isinstance(value, functools.partial):
        yield from _functions([value.func, *value.args])
    elif callable(value):
        yield value


def _python(task) -> Iterator[tuple[Path, Iterable[Path]]]:
    """(folder, files) of the task's own Python: its folder with all that lies there, for it may import or open any
    of it; of an installed package the file alone. lm-eval's own is known by its version.
    """
    import lm_eval

    fields = asdict(task.config) if hasattr(task.config, "__dataclass_fields__") else dict(task.config)
    sources = {_source(function) for function in [type(task), *_functions(fields)]}
    shipped = Path(lm_eval.__file__).parent
    for source in sorted(Path(source).resolve() for source in sources if source):
        folder = source.parent
        if source.is_relative_to(shipped):
            continue
        if {"site-packages", "dist-packages"} & set(source.parts):
            yield folder, [source]
        else:
            yield folder, (file for file in folder.rglob("*") if _is_read(file.relative_to(folder)) and file.is_file())


def _source(function: Callable) -> str | None:
    try:
        return inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:  # written in C, or an object that can be called: its class has the file
        return None if inspect.isbuiltin(function) or inspect.isclass(function) else _source(type(function))


def _is_read(file: Path) -> bool:
    hidden = any(part.startswith((".", "__pycache__")) for part in file.parts)
    return not hidden and file.suffix not in (".yaml", ".yml")  # the definition has these, with what it includes


def _digest_of(folder: Path, files: Iterable[Path]) -> str:
    """Of names below `folder` and contents."""
    whole = hashlib.sha256()
    for file in sorted(files):
        whole.update(f"{file.relative_to(folder)}\0".encode())
        status = file.stat()
        if status.st_size > _READ_WHOLE:
            whole.update(f"{status.st_size} {status.st_mtime_ns}\0".encode())
            continue
        whole.update(hashlib.sha256(file.read_bytes()).digest())
    return whole.hexdigest()[:16]
