"""Imports go downward only; who may know what is written here once, and read from the source."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE = "supra_cli.core"


def core(*names: str) -> tuple[str, ...]:
    return tuple(f"{CORE}.{name}" for name in names)


# From top to bottom. A module may import its own tier and those below it.
TIERS = (
    ("supra_cli.__main__",),
    ("supra_cli.commands",),
    core("export", "serve", "need"),
    core("train", "evaluate", "generate", "checkpoint", "accounting", "bench", "report", "lookup"),
    core("modeling", "config", "data", "stages"),
    core("swap", "backbone"),
    core("archs", "mixers"),
    core("ops", "flops"),
    core("layout", "cache"),
    core("hub"),
    core("download"),
    core("connection"),
    (
        "supra_cli",
        CORE,
        *core("errors", "files", "folder", "environment", "registry", "recipe", "corpus", "device", "parallel"),
    ),
    ("supra_kernels",),
)

TORCHLESS = ("errors", "files", "folder", "registry", "recipe", "corpus", "connection", "hub", "download", "lookup")

# What an exported model needs, and so all that these may import besides the standard library.
EXPORTED = ("archs", "mixers", "swap", "backbone", "cache", "config", "modeling", "ops", "layout")
EXPORTED_MAY_IMPORT = {"torch", "transformers", "safetensors", "supra_kernels", "supra_cli"}


def module_name(path: Path) -> str:
    root = ROOT / "kernels" if "kernels" in path.relative_to(ROOT).parts[:1] else ROOT
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {
    module_name(path): path
    for folder in ("supra_cli", "kernels/supra_kernels")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "assets" not in path.parts
}


def imports(module: str, *, only_top: bool = False) -> set[str]:
    """The modules that `module` imports, those for type checkers left out; `only_top`: when it is itself imported."""
    tree = ast.parse(SOURCES[module].read_text(encoding="utf-8"))
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if only_top and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update(name if name in SOURCES else node.module for name in names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


def tier(module: str) -> int:
    """The index of the tier whose longest prefix `module` has."""
    matches = [
        (len(prefix), index) for index, prefixes in enumerate(TIERS) for prefix in prefixes if is_in(module, prefix)
    ]
    return max(matches)[1]


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def top(name: str) -> str:
    return name.partition(".")[0]


def ours(names: set[str]) -> set[str]:
    return {name for name in names if top(name) in ("supra_cli", "supra_kernels")}


def in_core(module: str, *names: str) -> bool:
    return any(is_in(module, f"{CORE}.{name}") for name in names)


@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_downward_only(module):
    if module == "supra_cli":  # its import hook registers the classes of core.modeling with transformers
        return
    above = {name for name in ours(imports(module)) if tier(name) < tier(module)}
    assert not above, f"{module} imports {sorted(above)} from above itself"


def test_every_module_has_a_place():
    places = [name for names in TIERS for name in names if name not in (CORE, "supra_cli")]
    unplaced = [module for module in SOURCES if not any(is_in(module, place) for place in places)]
    assert unplaced == ["supra_cli", CORE], "give the new module a tier"


def test_only_ops_and_the_layout_import_the_kernels():
    importers = {module for module in SOURCES if any(top(name) == "supra_kernels" for name in imports(module))}
    assert {module for module in importers if top(module) == "supra_cli"} == {f"{CORE}.ops", f"{CORE}.layout"}


def test_the_kernels_know_torch_and_triton_alone():
    for module in SOURCES:
        if top(module) == "supra_kernels":
            foreign = {top(name) for name in imports(module)} - sys.stdlib_module_names
            assert foreign <= {"torch", "triton", "supra_kernels"}, module


def test_no_mixer_imports_an_arch_and_no_arch_a_mixer():
    for module in SOURCES:
        for one, other in (("archs", "mixers"), ("mixers", "archs")):
            if in_core(module, one):
                assert not any(in_core(name, other) for name in imports(module)), module


def test_what_an_export_needs_imports_little():
    for module in SOURCES:
        if in_core(module, *EXPORTED):
            foreign = {top(name) for name in imports(module)} - sys.stdlib_module_names
            assert foreign <= EXPORTED_MAY_IMPORT, module


def test_the_leaves_import_no_torch():
    for module in SOURCES:
        if in_core(module, *TORCHLESS):
            assert not {"torch", "transformers"} & {top(name) for name in imports(module, only_top=True)}, module


def test_commands_import_core_inside_their_functions():
    for module in SOURCES:
        if is_in(module, "supra_cli.commands") or module == "supra_cli.__main__":
            heavy = {name for name in imports(module, only_top=True) if is_in(name, CORE)}
            assert heavy <= set(core("errors", "files", "environment")), module
            foreign = {top(name) for name in imports(module, only_top=True)} - sys.stdlib_module_names
            assert foreign <= {"typer", "supra_cli"}, module


def test_core_never_prints():
    for module, path in SOURCES.items():
        if is_in(module, CORE) or top(module) == "supra_kernels":
            calls = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
            assert not any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls), module


def test_no_module_imports_itself_through_others():
    graph = {module: ours(imports(module)) & SOURCES.keys() for module in SOURCES}
    while ends := {module for module, below in graph.items() if not below}:
        graph = {module: below - ends for module, below in graph.items() if module not in ends}
    assert not graph, f"in a circle, or above one: {sorted(graph)}"
