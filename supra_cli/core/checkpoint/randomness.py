"""Random numbers of one thread: PyTorch draws without a word from one generator that all threads share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_SHARED = Lock()
_IN_PLACE = frozenset(
    getattr(Tensor, f"{name}_")
    for name in ("bernoulli", "cauchy", "exponential", "geometric", "log_normal", "normal", "random", "uniform")
)


class OwnNumbers(TorchFunctionMode):
    """Within it, what this thread draws on a CPU comes from `own`: the numbers that PyTorch's generator would give if
    seeded alike, while that one stays as it is.

    What takes a generator is given `own`, and threads then draw side by side. Anything else that is called might draw
    too; it runs in one thread at a time, with the state of PyTorch's generator exchanged for that of `own`.
    """

    def __init__(self, own: torch.Generator):
        super().__init__()
        self.own = own

    def __torch_function__(
        self, function: Callable, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        call = dict(kwargs or {})
        if _takes_generator(function):
            if call.get("generator") is None:
                call["generator"] = self.own
            return function(*args, **call)
        with _SHARED, torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.own.get_state())
            result = function(*args, **call)
            self.own.set_state(torch.get_rng_state())
        return result


@cache
def _takes_generator(function: Callable) -> bool:
    if function in _IN_PLACE:
        return True
    try:
        return "generator" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # of one that is not written in Python
        return False
