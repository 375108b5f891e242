"""Every law runs over what is registered: `mixer` and `base` range over the registries, so a new file there is under
the law; `recurrent` leaves out the mixer without a state. Where a law ranges over both, every mixer is tried on one
base and every base with one mixer, with and without a kept layer, and each other pair is one law's (`pairs`). Variants
of a mixer are under it too, on one base and without kept layers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from itertools import product
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pairs
import pytest
import torch
from pairs import BASE, NARROW
from tiny import tiny_model

from supra_cli.core.archs import archs
from supra_cli.core.errors import UsageError
from supra_cli.core.mixers import mixers
from supra_cli.core.modeling import SupraForCausalLM
from supra_cli.core.recipe.keep import SOFTMAX

# Models this small spend their time in starting threads.
torch.set_num_threads(1)

# One kept layer among the swapped ones, so that state and keys live in one cache.
KEEPS = ("none", "1")


def variants(mixer: str) -> Iterator[dict[str, Any]]:
    """Options other than the default ones: each other choice of a Literal or bool that the mixer takes alone, then what
    it names.
    """
    options = mixers.get(mixer).Options
    hints = get_type_hints(options)
    for field in fields(options):
        hint = hints[field.name]
        choices = get_args(hint) if get_origin(hint) is Literal else (False, True) if hint is bool else ()
        for choice in (choice for choice in choices if choice != field.default):
            try:
                options(**{field.name: choice})
                yield {field.name: choice}
            except UsageError:  # beside another option alone, which the mixer then names
                assert any(named.get(field.name) == choice for named in mixers.get(mixer).variants), (mixer, field.name)
    yield from map(dict, mixers.get(mixer).variants)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    ranges = {
        "base": [base for base in archs if base not in NARROW or "exact" not in metafunc.fixturenames],
        "keep": KEEPS,
    }
    names = [name for name in ranges if name in metafunc.fixturenames]
    cases = list(product(*(ranges[name] for name in names)))
    for name in {"mixer", "recurrent"} & set(metafunc.fixturenames):
        narrow = tuple({"base": BASE, "keep": "none"}[name] for name in names)
        chosen = [mixer for mixer in mixers if name == "mixer" or mixer != SOFTMAX]
        cases = [(*case, mixer, {}) for mixer in chosen for case in cases]
        if "base" in names:
            law, some = metafunc.function.__name__, random.Random(metafunc.function.__name__)
            others = [[case for case in cases if (case[0], case[-2]) == pair] for pair in pairs.dealt()[law]]
            cases = [case for case in cases if pairs.usual(case[0], case[-2])] + list(map(some.choice, others))
        cases += [(*narrow, mixer, options) for mixer in chosen for options in variants(mixer)]
        names += [name, "options"]
    if names:
        metafunc.parametrize(names, [_case(case, "options" in names and case[-1]) for case in cases])


def _case(case: tuple[Any, ...], varied: bool) -> Any:
    """A variant is marked so, to be left out where it is the versions of libraries that are tried."""
    name = "-".join(map(_word, case)).strip("-")
    return pytest.param(*case, id=name, marks=[pytest.mark.variant] if varied else [])


def _word(value: str | dict[str, Any]) -> str:
    return value if isinstance(value, str) else ",".join(f"{key}={choice}" for key, choice in value.items())


@pytest.fixture
def options() -> dict[str, Any]:
    """The options of the mixer that a law ranges over."""
    return {}


@pytest.fixture
def build(options: dict[str, Any]) -> Callable[..., SupraForCausalLM]:
    """Models whose mixers are a little away from where they start, as many parameters start at 0 or 1."""
    torch.manual_seed(0)

    @torch.no_grad()
    def moved(*args: Any, **changes: Any) -> SupraForCausalLM:
        model = tiny_model(*args, options=options, **changes)
        for name, parameter in model.named_parameters():
            if ".mixer." in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    return moved


@pytest.fixture
def exact(build: Callable[..., SupraForCausalLM]) -> Callable[..., SupraForCausalLM]:
    """Models in float64, where two orders of one sum differ only by what is fp32 by design: norms, constants, window
    states.
    """
    return partial(build, dtype=torch.float64)
