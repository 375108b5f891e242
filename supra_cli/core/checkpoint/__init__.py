"""A directory ⇄ a model: strict to read, atomic to write, the base's shards never rewritten."""

from supra_cli.core.checkpoint.conversion import convert
from supra_cli.core.checkpoint.files import atomic_directory, check_free
from supra_cli.core.checkpoint.reading import (
    check,
    fingerprint,
    load,
    load_tokenizer,
    read_config,
    read_provenance,
    shards,
    tensors,
    verify,
)
from supra_cli.core.checkpoint.writing import save

__all__ = [
    "atomic_directory",
    "check",
    "check_free",
    "convert",
    "fingerprint",
    "load",
    "load_tokenizer",
    "read_config",
    "read_provenance",
    "save",
    "shards",
    "tensors",
    "verify",
]
