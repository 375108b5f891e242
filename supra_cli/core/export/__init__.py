"""A model that leaves the house: a directory that torch and transformers alone load, code, weights and card."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress
from itertools import groupby
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from supra_cli.core import checkpoint
from supra_cli.core.checkpoint.reading import has_tokenizer
from supra_cli.core.checkpoint.slices import DTYPES, Entry, write_shards
from supra_cli.core.errors import NotFoundError, UsageError
from supra_cli.core.export.card import card
from supra_cli.core.export.code import code

log = logging.getLogger(__name__)


def export(path: Path | str, output: Path | str, *, dtype: torch.dtype | None = None, overwrite: bool = False) -> Path:
    """Write the converted model in `path` so that AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)
    loads it where this package is not installed; returns `output`. `dtype` is that of the weights, their own if None.

    The weights are held against supra.json first, where there is one. UsageError: a model without a recurrent layer,
    which transformers loads as it is, or code that others cannot run. SupraError: a damaged model.
    """
    path, output = Path(path), Path(output)
    if path.resolve().is_relative_to(output.resolve()):
        raise UsageError(f"{output} is, or holds, the model to export, which would be lost; choose another output")
    checkpoint.check_free(output, overwrite)
    config = checkpoint.examine(path)
    if not config.swap.any:
        raise UsageError(f"{path} has no recurrent layer: it is a plain {config.swap.base}, which needs no export")
    with suppress(NotFoundError):  # what others have saved has no hashes, and its headers were read just now
        checkpoint.verify(path)
    if not has_tokenizer(path):
        log.warning("%s has no tokenizer, which the export's card loads; copy the base's there and export again", path)
    files, config.auto_map = code(config.swap.base, config.swap.mixer)
    config.dtype = dtype or config.dtype or torch.float32
    stored = checkpoint.tensors(path)
    # By the files that hold them, in whose order they are read.
    stored = dict(sorted(stored.items(), key=lambda item: item[1].file))
    described = {name: torch.empty(x.shape, dtype=DTYPES[x.dtype], device="meta") for name, x in stored.items()}
    other = dtype is not None and any(tensor.dtype != dtype for tensor in described.values())
    files["README.md"] = card(path, config, output.absolute().name, dtype if other else None)
    with checkpoint.atomic_directory(output, overwrite=overwrite) as directory:
        placed, _ = write_shards(described, directory, "model", values=_read(path, stored), dtype=dtype)
        checkpoint.describe(directory, config, placed, path)
        for name, text in files.items():
            (directory / name).write_text(text, encoding="utf-8")
    return output


def _read(path: Path, stored: dict[str, Entry]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor as it lies in its file), the file's pages read when it is written."""
    for file, entries in groupby(stored.items(), key=lambda item: item[1].file):
        with safetensors.safe_open(path / file, "pt") as opened:
            yield from ((name, opened.get_tensor(name)) for name, _ in entries)
