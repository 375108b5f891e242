"""Which bases and mixers a law is tried on together: conftest.py asks it, and the table in the README."""

from __future__ import annotations

import ast
import random
from functools import cache
from itertools import product
from pathlib import Path

from tiny import EXPERTS

from supra_cli.core.archs import archs
from supra_cli.core.mixers import mixers
from supra_cli.core.recipe.keep import SOFTMAX

BASE, MIXER = "llama", "supra"
NARROW = ("gemma2", *EXPERTS)
"""Not tried in float64: Gemma 2 takes the softmax in fp32, where a mask of float64's minimum is -inf, and experts are
grouped in narrower formats alone."""


def usual(base: str, mixer: str) -> bool:
    """Whether every law tries the pair, if it can: every mixer on one base, every base with one mixer and with none."""
    return base == BASE or mixer in (MIXER, SOFTMAX)


@cache
def dealt() -> dict[str, list[tuple[str, str]]]:
    """Law → (base, mixer) of the pairs that it alone tries: every other pair is one law's, in a drawn order."""
    pairs = [pair for pair in product(archs, mixers) if not usual(*pair)]
    random.Random(0).shuffle(pairs)
    hands: dict[str, list[tuple[str, str]]] = {law: [] for law in laws()}
    # Those first that fewer laws can take.
    for pair in sorted(pairs, key=lambda pair: pair[0] not in NARROW):
        able = [law for law, exact in laws().items() if not (exact and pair[0] in NARROW)]
        hands[min(able, key=lambda law: len(hands[law]))].append(pair)
    return hands


@cache
def laws() -> dict[str, bool]:
    """Every law that ranges over bases and mixers → whether in float64."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            law = isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
            names = {argument.arg for argument in node.args.args} if law else set()
            if "base" in names and names & {"mixer", "recurrent"}:
                found[node.name] = "exact" in names
    return found
