"""A recipe: everything needed to repeat a run, as frozen models that read and write TOML.

Unknown keys are refused with the nearest known one, and all errors of a recipe are reported at once, each with its key
path. No torch here: the options of a mixer or a stage are checked against their dataclass through `lookup`, which the
caller provides.
"""

from supra_cli.core.recipe.reading import dumps, find, load, override, shipped, validate
from supra_cli.core.recipe.schema import (
    Checkpoint,
    Data,
    Lookup,
    Mixer,
    Packing,
    Recipe,
    Source,
    Stage,
    Tokenizer,
)

__all__ = [
    "Checkpoint",
    "Data",
    "Lookup",
    "Mixer",
    "Packing",
    "Recipe",
    "Source",
    "Stage",
    "Tokenizer",
    "dumps",
    "find",
    "load",
    "override",
    "shipped",
    "validate",
]
