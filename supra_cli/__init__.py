"""supra: pretrained softmax transformers become recurrent models, and what that cost is measured.

Importing this is light, and enough for `AutoModelForCausalLM.from_pretrained` to know a converted model: its classes
are registered as soon as transformers' Auto classes are there.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

__version__ = "0.1.0"
"""The one place that holds it; pyproject.toml reads it from here."""

_AUTO = "transformers.models.auto.modeling_auto"


class _RegisterOnImport(MetaPathFinder, Loader):
    """Runs `core.modeling`, which registers the classes, right after transformers' Auto models have been imported."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != _AUTO:
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
        _register()


def _register() -> None:
    import supra_cli.core.modeling  # noqa: F401


if _AUTO in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _RegisterOnImport())
