"""Every law runs over what is registered: `mixer` and `base` range over the registries, so a new file there is under
the law.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from tiny import tiny_model

from supra_cli.core.archs import archs
from supra_cli.core.mixers import mixers
from supra_cli.core.modeling import SupraForCausalLM

# Models this small spend their time in starting threads.
torch.set_num_threads(1)

# One kept layer among the swapped ones, so that state and keys live in one cache.
KEEPS = ("none", "1")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name, values in (("mixer", list(mixers)), ("base", list(archs)), ("keep", KEEPS)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values)


@pytest.fixture
def build() -> Callable[..., SupraForCausalLM]:
    torch.manual_seed(0)
    return tiny_model


@pytest.fixture
def exact(build: Callable[..., SupraForCausalLM]) -> Callable[..., SupraForCausalLM]:
    """Models in float64, where two orders of one sum differ only by what is fp32 by design: norms, constants, window
    states.
    """
    return partial(build, dtype=torch.float64)
