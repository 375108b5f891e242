"""Random numbers of one thread: PyTorch draws without a word from one generator that all threads share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

_SHARED = Lock()


class OwnNumbers(TorchDispatchMode):
    """Within it, what this thread draws on a CPU comes from `own`: the numbers that PyTorch's generator would give if
    seeded alike, while that one stays as it is.

    An operator that takes a generator is given `own`, and threads then draw side by side. The few that draw and take
    none run in one thread at a time, with the state of PyTorch's generator exchanged for that of `own`.
    """

    def __init__(self, own: torch.Generator):
        super().__init__()
        self.own = own

    def __torch_dispatch__(
        self, function: OpOverload, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        call = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded not in function.tags:
            return function(*args, **call)
        if any(argument.name == "generator" for argument in function._schema.arguments):
            if call.get("generator") is None:
                call["generator"] = self.own
            return function(*args, **call)
        with _SHARED, torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.own.get_state())
            result = function(*args, **call)
            self.own.set_state(torch.get_rng_state())
        return result
