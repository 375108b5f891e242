"""A directory ⇄ a model: strict to read, atomic to write, the base's shards never rewritten."""

from supra_cli.core.checkpoint.conversion import convert, planned
from supra_cli.core.checkpoint.describing import own_shape, read_config, skeleton
from supra_cli.core.checkpoint.files import atomic_directory, check_free
from supra_cli.core.checkpoint.reading import check, examine, holds, load, load_tokenizer, outline, tensors
from supra_cli.core.checkpoint.record import identity, read_provenance, verify
from supra_cli.core.checkpoint.writing import save

__all__ = [
    "atomic_directory",
    "check",
    "check_free",
    "convert",
    "examine",
    "holds",
    "identity",
    "load",
    "load_tokenizer",
    "outline",
    "own_shape",
    "planned",
    "read_config",
    "read_provenance",
    "save",
    "skeleton",
    "tensors",
    "verify",
]

from supra_cli.core.checkpoint.describing import check_attention
from supra_cli.core.checkpoint.slices import materialise, write_model as write
