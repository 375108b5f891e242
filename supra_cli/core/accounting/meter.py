"""FLOPs and live bytes of whatever runs while the meter is on, with storage or without."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten
# The attention that the CPU runs is not in PyTorch's register; it takes what the others take.
_FLOPS = {
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
}


class Meter(TorchDispatchMode):
    """Adds up FLOPs and follows the bytes of all storages made while it is on, and their highest sum.

    `copies` are those among them that are weights in another dtype.
    """

    def __init__(self, *models: nn.Module | None):
        super().__init__()
        self.flops = 0
        self.live = 0
        self.peak = 0
        self.copies = 0
        weights = [p.untyped_storage()._cdata for model in models if model is not None for p in _tensors(model)]
        self._weights = frozenset(weights)
        self._known = set(weights)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        if count := _FLOPS.get(function.overloadpacket):
            self.flops += count(*args, **kwargs, out_val=output)
        copied = function is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self._weights
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage(), copied)
        return output

    def _see(self, storage: torch.UntypedStorage, copied: bool) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.copies += size * copied
        weakref.finalize(storage, self._forget, key, size, copied)

    def _forget(self, key: int, size: int, copied: bool) -> None:
        self._known.discard(key)
        self.live -= size
        self.copies -= size * copied


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
