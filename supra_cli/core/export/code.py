"""The modeling files of an exported model: this package's own modules, those that the model needs, in one flat folder.

transformers runs code that comes with a model from a folder without folders, in which a module is found by `from .name
import ...` alone. So each module is copied as it stands, but for its imports of ours:

    from supra_cli.core.layout import Layout       from .supra_layout import Layout
    from supra_cli.core import cache as caches     from .supra_cache import __name__ as _caches
                                                   caches = sys.modules[_caches]

What is imported inside `try` may be missing: it stays as it is and is not brought along.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from supra_cli import __version__
from supra_cli.core.archs import archs
from supra_cli.core.config import config_class
from supra_cli.core.errors import UsageError
from supra_cli.core.mixers import mixers
from supra_cli.core.modeling import SupraForCausalLM, SupraModel, model_class

_NAMES = {"supra_cli.core.config": "configuration_supra", "supra_cli.core.modeling": "modeling_supra"}
_ENTRY = "modeling_supra"
"""The file that config.json names, for the config too: transformers takes what it begins from for a package."""
_OURS = {"supra_cli", "supra_kernels"}
_THERE = {"torch", "transformers", "safetensors", "huggingface_hub", "numpy", *sys.stdlib_module_names}
"""What is there where transformers is."""


class Import(NamedTuple):
    """A statement that imports some of the packages that are brought along."""

    first: int
    """Line, from 1."""
    last: int
    indent: int
    names: list[tuple[str, str | None, str]]
    """(module, what of it or None for the module itself, name here)."""


class Code(NamedTuple):
    files: dict[str, str]
    """Name → source."""
    auto_map: dict[str, str]
    """Of config.json: which classes transformers' Auto classes are to make."""


def code(base: str, mixer: str) -> Code:
    """What a model of `base` with `mixer` needs, a mixer or a base of another package included.

    UsageError for one that imports what transformers does not bring.
    """
    makers = [archs.origin(base), mixers.origin(mixer)]
    packages = {*_OURS, *(maker.partition(".")[0] for maker in makers)}
    sources = _reached([*_NAMES, *makers], packages)
    files = {f"{flat(module)}.py": _rewritten(module, source, packages) for module, source in sources.items()}
    kinds = (SupraForCausalLM, SupraModel)
    made = {"AutoConfig": ("config_class", "", config_class(base))}
    made |= {kind.auto.__name__: ("model_class", f", {kind.__name__}", model_class(base, kind)) for kind in kinds}
    # A registry knows what was imported; and transformers 5.14 brings what the entry itself imports, no further.
    end = [f"from .{flat(module)} import __name__ as _" for module in sorted(sources) if flat(module) != _ENTRY]
    for maker, of, kind in made.values():
        # Saved again, the code that is copied is that of the class's own module.
        end += ["", f'{kind.__name__} = {maker}("{base}"{of})', f"{kind.__name__}.__module__ = __name__"]
    files[f"{_ENTRY}.py"] += "\n" + "\n".join(end) + "\n"
    return Code(files, {auto: f"{_ENTRY}.{kind.__name__}" for auto, (*_, kind) in made.items()})


def flat(module: str) -> str:
    """`supra_cli.core.mixers.t2r` is supra_mixers_t2r, `supra_kernels.chunk` supra_kernels_chunk."""
    return _NAMES.get(module) or module.replace("supra_cli.core.", "supra_").replace(".", "_")


def _reached(modules: list[str], packages: set[str]) -> dict[str, str]:
    """Module → source, of the given ones and all of `packages` that they import, one after the other."""
    found: dict[str, str] = {}
    while modules:
        module = modules.pop()
        if module in found:
            continue
        found[module] = Path(importlib.import_module(module).__file__).read_text(encoding="utf-8")
        for statement in _imports(found[module], packages):
            modules += [name for name, _, _ in statement.names]
    return found


def _imports(source: str, packages: set[str]) -> Iterator[Import]:
    """Every import from `packages` outside of `try`. UsageError for one of anything else that may not be there."""
    todo: list[ast.AST] = [ast.parse(source)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Try):
            continue
        todo += ast.iter_child_nodes(node)
        if isinstance(node, ast.ImportFrom):
            names = [_part(node.module, alias) for alias in node.names] if _top(node.module) in packages else []
            tops = {_top(node.module)}
        elif isinstance(node, ast.Import):
            names = [(alias.name, None, alias.asname or alias.name) for alias in node.names]
            tops = {_top(alias.name) for alias in node.names}
        else:
            continue
        if foreign := tops - packages - _THERE:
            raise UsageError(
                f"the model's code imports {min(foreign)}, which who loads an export may not have; import it inside "
                "`try`, or do without"
            )
        if tops & packages:
            yield Import(node.lineno, node.end_lineno, node.col_offset, names)


def _top(module: str) -> str:
    return module.partition(".")[0]


def _part(module: str, alias: ast.alias) -> tuple[str, str | None, str]:
    """An attribute of the module, or a module of the package that it is."""
    name, whole = alias.asname or alias.name, f"{module}.{alias.name}"
    found = getattr(importlib.import_module(module), alias.name)
    if inspect.ismodule(found) and found.__name__ == whole:
        return whole, None, name
    return module, alias.name, name


def _rewritten(module: str, source: str, packages: set[str]) -> str:
    lines = source.splitlines(keepends=True)
    for statement in sorted(_imports(source, packages), reverse=True):
        lines[statement.first - 1 : statement.last] = [
            f"{' ' * statement.indent}{line}\n" for line in _relative(statement.names)
        ]
    return f"# {module} of supra {__version__}, written by `supra export`.\n" + "".join(lines)


def _relative(names: list[tuple[str, str | None, str]]) -> Iterator[str]:
    for module in dict.fromkeys(module for module, _, _ in names):
        parts = [(part, name) for other, part, name in names if other == module]
        attributes = [part if part == name else f"{part} as {name}" for part, name in parts if part]
        if attributes:
            yield f"from .{flat(module)} import {', '.join(attributes)}"
        for name in (name for part, name in parts if part is None):
            yield f"from .{flat(module)} import __name__ as _{name}"
            yield "import sys"
            yield f"{name} = sys.modules[_{name}]"
