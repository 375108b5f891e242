"""The modeling files of an exported model: this package's own modules, those that the model needs, in one flat folder.

transformers runs code that comes with a model from a folder without folders, in which a module is found by `from .name
import ...` alone. So each module is copied as it stands, but for its imports of ours:

    from supra_cli.core.layout import Layout       from .supra_layout import Layout
    from supra_cli.core import cache as caches     from .supra_cache import __name__ as _caches
                                                   caches = sys.modules[_caches]

What is imported inside `try` may be missing, and under `if __name__ ...` it is for this package alone: both stay as
they are and are not brought along.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path
from typing import NamedTuple

from supra_cli import __version__
from supra_cli.core.archs import archs
from supra_cli.core.config import config_class
from supra_cli.core.errors import UsageError
from supra_cli.core.mixers import mixers
from supra_cli.core.modeling import SupraForCausalLM, SupraModel, model_class
from supra_cli.core.registry import Registry

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
    others: list[str]
    """What else it imports, `os as system`."""


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
    # transformers 5.14 brings what the entry itself imports, no further.
    end = [f"from .{flat(module)} import __name__ as _" for module in sorted(sources) if flat(module) != _ENTRY]
    end += [*_registered("archs", archs, base), *_registered("mixers", mixers, mixer)]
    for maker, of, kind in made.values():
        # Saved again, the code that is copied is that of the class's own module.
        end += ["", f'{kind.__name__} = {maker}("{base}"{of})', f"{kind.__name__}.__module__ = __name__"]
    files[f"{_ENTRY}.py"] += "\n" + "\n".join(end) + "\n"
    return Code(files, {auto: f"{_ENTRY}.{kind.__name__}" for auto, (*_, kind) in made.items()})


def _registered(here: str, registry: Registry, name: str) -> Iterator[str]:
    """Lines that register what an entry point names; what registers itself has no name of its own, or is the same."""
    module, made = registry.origin(name), registry.get(name)
    if own := next((key for key, value in vars(sys.modules[module]).items() if value is made), None):
        yield f"from .{flat(module)} import {own} as _{here}"
        yield f'{here}.register("{name}")(_{here})'


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
        for statement in _imports(module, found[module], packages):
            modules += [name for name, _, _ in statement.names]
    return found


def _imports(module: str, source: str, packages: set[str]) -> Iterator[Import]:
    """Every import from `packages` that is brought along. UsageError for one of anything else that may not be there."""
    todo: list[ast.AST] = [ast.parse(source)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Try) or (isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)):
            continue
        todo += ast.iter_child_nodes(node)
        names, others, whole = [], [], set()
        if isinstance(node, ast.ImportFrom):
            named = "." * node.level + (node.module or "")
            whole = {resolve_name(named, importlib.import_module(module).__package__)}
            if _top(min(whole)) in packages:
                names = [_part(min(whole), alias) for alias in node.names]
        elif isinstance(node, ast.Import):
            whole = {alias.name for alias in node.names}
            for alias in node.names:
                if _top(alias.name) not in packages:
                    others.append(ast.unparse(alias))
                elif "." in alias.name and alias.asname is None:
                    package, _, part = alias.name.rpartition(".")
                    raise UsageError(
                        f"{module} says `import {alias.name}`, which an export cannot follow; write "
                        f"`from {package} import {part}`"
                    )
                else:
                    names.append((alias.name, None, alias.asname or alias.name))
        if foreign := {_top(name) for name in whole} - packages - _THERE:
            raise UsageError(
                f"{module} imports {min(foreign)}, which who loads an export may not have; import it inside `try`, or "
                "do without"
            )
        if names:
            yield Import(node.lineno, node.end_lineno, node.col_offset, names, others)


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
    for statement in sorted(_imports(module, source, packages), reverse=True):
        lines[statement.first - 1 : statement.last] = [
            f"{' ' * statement.indent}{line}\n" for line in _relative(statement)
        ]
    return f"# {module} of supra {__version__}, written by `supra export`.\n" + "".join(lines)


def _relative(statement: Import) -> Iterator[str]:
    names = statement.names
    yield from (f"import {other}" for other in statement.others)
    for module in dict.fromkeys(module for module, _, _ in names):
        parts = [(part, name) for other, part, name in names if other == module]
        attributes = [part if part == name else f"{part} as {name}" for part, name in parts if part]
        if attributes:
            yield f"from .{flat(module)} import {', '.join(attributes)}"
        for name in (name for part, name in parts if part is None):
            yield f"from .{flat(module)} import __name__ as _{name}"
            yield "import sys"
            yield f"{name} = sys.modules[_{name}]"
