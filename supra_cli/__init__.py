"""supra: pretrained softmax transformers become recurrent models, and what that cost is measured.

Importing this is light, and enough for `AutoModelForCausalLM.from_pretrained` to know a converted model: its classes
are registered as soon as transformers' Auto classes are there.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

__version__ = "0.1.0"
"""The one place that holds it; pyproject.toml reads it from here."""

_REGISTERING = {
    "transformers.models.auto.configuration_auto": "supra_cli.core.config",
    "transformers.models.auto.modeling_auto": "supra_cli.core.modeling",
}
"""The modules of transformers that hold its Auto classes, and ours that register with them when imported."""


class _RegisterOnImport(MetaPathFinder, Loader):
    """Imports our module right after transformers' has been imported."""

    def __init__(self, auto: str):
        self._auto = auto

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != self._auto:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        import_module(_REGISTERING[self._auto])


for _auto, _ours in _REGISTERING.items():
    if _auto in sys.modules:
        import_module(_ours)
    else:
        sys.meta_path.insert(0, _RegisterOnImport(_auto))
