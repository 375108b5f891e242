"""What is installed, and that a folder named `kernels` troubles nobody."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """A wheel built, without a network, from a copy of the tree."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("supra_cli", "kernels", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", "dist"]
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", ".", *options], cwd=tree, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr[-2000:]
    return zipfile.ZipFile(next((tree / "dist").glob("*.whl")))


@pytest.mark.parametrize("page", ["mixer", "stage"])
def test_the_example_of_a_page_is_code_as_the_linter_wants_it(page: str) -> None:
    text = (ROOT / "docs" / f"adding-a-{page}.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for verb in (["check"], ["format", "--check"]):
        given = [*verb, "--stdin-filename", f"supra_cli/core/{page}s/example.py", "-"]
        ruff = [sys.executable, "-m", "ruff", *given]
        done = subprocess.run(ruff, input=example, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def python(code: str, **environment: str) -> str:
    """What `code` prints in a fresh interpreter that starts at the root of the repository."""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.strip()


def test_no_text_sends_anyone_to_another_project_of_our_name():
    """Which is what PyPI has under it: ours is installed from a clone."""
    named = re.compile(r"\bsupra\[[a-z]+\]|install ['\"]?supra\b|package `?supra\b")
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("supra_cli/**/*.py")):
        assert not named.search(path.read_text(encoding="utf-8")), path


def test_kernels_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_transformers_imports_at_the_root_and_nothing_of_ours_is_called_kernels():
    code = """
import importlib.util, sys
sys.path.insert(0, "")
import transformers, transformers.integrations
spec = importlib.util.find_spec("kernels")
print(spec is None or spec.origin is None or "site-packages" in spec.origin)
print(getattr(sys.modules.get("kernels"), "__file__", None) or "not imported")
"""
    found, imported = python(code).splitlines()
    assert found == "True"
    assert imported == "not imported" or "site-packages" in imported


def test_the_wheel_holds_two_packages_and_nothing_else(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"supra_cli", "supra_kernels"}


def test_the_wheel_holds_every_module_and_asset(wheel):
    names = set(wheel.namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "supra_cli").rglob("*.py")}
    modules |= {path.relative_to(ROOT / "kernels").as_posix() for path in (ROOT / "kernels").rglob("*.py")}
    assets = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "supra_cli" / "assets").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert (modules | assets) - names == set()


def test_the_wheel_is_licensed_and_gives_the_command(wheel):
    entry_points = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "supra = supra_cli.__main__:main" in wheel.read(entry_points).decode()
    assert any(name.endswith("LICENSE") for name in wheel.namelist())


def test_importing_supra_cli_loads_no_torch():
    code = "import sys, supra_cli; print(sorted({'torch', 'transformers', 'numpy', 'typer'} & set(sys.modules)))"
    assert python(code) == "[]"


def test_torchao_which_transformers_imports_where_it_is_there_makes_no_noise():
    command = ["generate", "tiny", "--prompt", "def", "--max-new-tokens", "1", "--quiet"]
    result = subprocess.run([sys.executable, "-m", "supra_cli", *command], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_the_kernels_import_without_triton():
    code = """
import sys
sys.modules["triton"] = None
sys.path.insert(0, "kernels")
import supra_kernels
print("fine")
"""
    assert python(code) == "fine"


def pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    found = [Requirement(line) for line in lines if not line.startswith("#")]
    return {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in found}


def test_every_dependency_has_a_lower_bound_that_one_set_is_at_and_the_other_meets():
    newest, lowest = pins("constraints.txt"), pins("constraints-lowest.txt")
    for requirement in declared():
        name, bounds = (
            canonicalize_name(requirement.name),
            {part.operator: part.version for part in requirement.specifier},
        )
        assert newest[name] in requirement.specifier, requirement
        if name in lowest and name != "torch":  # of which one build for CPUs is at hand
            assert Version(lowest[name]) == Version(bounds[">="]), requirement


def test_what_we_know_from_the_inside_is_capped_below_the_first_minor_version_not_tried():
    newest = pins("constraints.txt")
    bounds = {requirement.name: requirement.specifier for requirement in declared()}
    transformers = Version(newest["transformers"])
    assert f"{transformers.major}.{transformers.minor + 1}.0" not in bounds["transformers"]
    assert "2.14.1" in bounds["torch"]
    assert "2.15.0" not in bounds["torch"]


def test_every_package_that_the_source_imports_is_declared():
    ours = {"supra_cli", "supra_kernels"}
    optional = {"fla"}  # `supra bench` measures beside it where somebody has installed it
    imported = set()
    for path in [*(ROOT / "supra_cli").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {name.name.partition(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.partition(".")[0])
    distributions = packages_distributions()
    needed = {distributions.get(name, [name])[0] for name in imported - ours - optional - sys.stdlib_module_names}
    names = {canonicalize_name(requirement.name) for requirement in declared()}
    assert {canonicalize_name(name) for name in needed} - names == set()


def declared() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(line) for line in sum(project["optional-dependencies"].values(), project["dependencies"])]


def test_every_bundled_configuration_is_json_that_belongs_to_an_alias():
    from supra_cli.core import hub

    configs = ROOT / "supra_cli" / "assets" / "configs"
    bundled = {path.relative_to(configs).parent.as_posix(): path for path in configs.rglob("*.json")}
    assert {path.name for path in bundled.values()} == {"config.json"}
    assert set(bundled) == set(hub.ALIASES.values())
    for path in bundled.values():
        assert json.loads(path.read_text())["model_type"]
