"""A directory ⇄ a model: strict to read, atomic to write, the base's shards never rewritten."""

from supra_cli.core.checkpoint.conversion import conversion_bytes, convert, converted, planned
from supra_cli.core.checkpoint.describing import check_attention, own_shape, read_config, skeleton
from supra_cli.core.checkpoint.files import atomic_directory, check_free
from supra_cli.core.checkpoint.reading import (
    check,
    examine,
    holds,
    load,
    load_tokenizer,
    materialise,
    outline,
    tensors,
)
from supra_cli.core.checkpoint.record import identity, read_provenance, verify
from supra_cli.core.checkpoint.writing import describe, keeps_mixers_apart, save, write

__all__ = [
    "atomic_directory",
    "check",
    "check_attention",
    "check_free",
    "conversion_bytes",
    "convert",
    "converted",
    "describe",
    "examine",
    "holds",
    "identity",
    "keeps_mixers_apart",
    "load",
    "load_tokenizer",
    "materialise",
    "outline",
    "own_shape",
    "planned",
    "read_config",
    "read_provenance",
    "save",
    "skeleton",
    "tensors",
    "verify",
    "write",
]
