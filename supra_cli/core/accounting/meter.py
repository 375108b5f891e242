"""FLOPs and live bytes of whatever runs while the meter is on, with storage or without.

The linear attention operator is one call to PyTorch, and its form for CPUs is made of many: what it takes inside is
counted by running that form on the first tokens. Its form for GPUs runs nowhere else; what that takes is written here.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper

from supra_cli.core import ops
from supra_cli.core.flops import SDPA_FLOPS, operator_flops

_aten = torch.ops.aten
_FLOPS = {
    **flop_registry,
    **{operation: shape_wrapper(formula) for operation, formula in SDPA_FLOPS.items()},
    _aten.baddbmm_: flop_registry[_aten.baddbmm],  # products in place are not in PyTorch's register
}

_QUESTIONS = (_aten._local_scalar_dense.default, _aten.item.default, _aten.is_nonzero.default)
_NUMBERS = 1 << 18
"""Of q: two of the operator's blocks, each of which needs the same."""
_TOKENS = 128
"""At least: two of its chunks."""
_KERNEL = torch._C.DispatchKey.CompositeExplicitAutograd


class Lap(NamedTuple):
    """Bytes while a lap lasted."""

    peak: int = 0
    copies: int = 0
    """Those bytes of `peak` that are weights in another dtype."""
    both: int = 0
    """The peak with what is in another memory."""


class Meter(TorchDispatchMode):
    """Adds up FLOPs and follows the bytes of all storages made while it is on, and their highest sum in each lap.

    What a program asks of data that are not there is answered with one, and where it asks for yes or no with `packed`:
    whether a row holds more than one document.
    """

    def __init__(self, *given: nn.Module | Tensor | None, packed: bool = True):
        """Counts nothing that is `given`."""
        super().__init__()
        self.flops = 0
        self.live = 0
        self.laps = [Lap()]
        self.elsewhere = 0
        """Bytes that whoever runs says are in another memory."""
        self._copies = 0
        self._packed = packed
        self._given = [one for one in given if one is not None]

    def lap(self) -> None:
        self.laps.append(Lap())

    def unread(self, tensors: Iterable[Tensor]) -> int:
        """Bytes of those of these given tensors from which no operation took a number."""
        return sum(tensor.nbytes for tensor in tensors if tensor.untyped_storage()._cdata in self._unread)

    def __enter__(self):
        weights = {tensor.untyped_storage()._cdata for one in self._given for tensor in _tensors(one)}
        self._weights, self._known, self._unread = weights, set(weights), set(weights)
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _QUESTIONS and isinstance(args[0], FakeTensor) and args[0].constant is None:
            return self._answer(function, args[0].dtype)
        output = function(*args, **kwargs)
        if self._unread and not function.is_view:
            self._take(args)
        within = inside(function, args)
        if within is not None:
            self.flops += within.flops
        elif count := _FLOPS.get(function.overloadpacket):
            self.flops += count(*args, **kwargs, out_val=output)
        copied = function is _aten._to_copy.default and args[0].untyped_storage()._cdata in self._weights
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage(), copied)
        self._reach(0 if within is None else within.scratch)
        return output

    def _take(self, args: Iterable[object]) -> None:
        for one in args:
            if isinstance(one, Tensor):
                self._unread.discard(one.untyped_storage()._cdata)
            elif isinstance(one, (list, tuple)):
                self._take(one)

    def _see(self, storage: torch.UntypedStorage, copied: bool) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.live += size
        self._copies += size * copied
        weakref.finalize(storage, self._forget, key, size, copied)

    def _reach(self, scratch: int) -> None:
        now, lap = self.live + scratch, self.laps[-1]
        both = max(lap.both, now + self.elsewhere)
        self.laps[-1] = Lap(now, self._copies, both) if now > lap.peak else lap._replace(both=both)

    def _forget(self, key: int, size: int, copied: bool) -> None:
        self._known.discard(key)
        self.live -= size
        self._copies -= size * copied

    def _answer(self, question: torch._ops.OpOverload, dtype: torch.dtype) -> bool | int | float:
        if question is _aten.is_nonzero.default or dtype == torch.bool:
            return self._packed
        return 1.0 if dtype.is_floating_point else 1


def _tensors(given: nn.Module | Tensor) -> Iterator[Tensor]:
    if isinstance(given, Tensor):
        yield given
    else:
        yield from given.parameters()
        yield from given.buffers()


class Inside(NamedTuple):
    flops: int
    scratch: int
    """Bytes above those of what is returned."""


def inside(function: torch._ops.OpOverload, args: tuple) -> Inside | None:
    """What a call of `function` takes; None for any but the operator's chunked forms."""
    supra = torch.ops.supra
    if function in (supra.triton.default, supra.triton_backward.default):
        named = dict(zip((argument.name for argument in function._schema.arguments), args, strict=False))
        return _in_triton(**named)
    if function not in (supra.chunk.default, supra.chunk_backward.default):
        return None
    return _inside(function, tuple((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in args))


def _in_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    do: Tensor | None = None,
    row: Tensor | None = None,
    denominator_min: float | None = None,
    decays: bool = False,
    **_: object,
) -> Inside:
    """Of the form for GPUs, which keeps the state at the start of each of N chunks while it runs: [B,H,N,K,V], in bf16
    where q, k and v are and in fp32 elsewhere, and with a denominator [B,H,N,K] in fp32. Backward the same, then in its
    place as many gradients of them; both at a time, and the last state [B,H,K,V or V+1], where there are gradients of
    decays. Where the output was normed or divided, its gradient before that too. A per-token decay, clamped, and its
    two sums, 12 bytes a token and head. Left out: the starts of spans, where few heads meet a long sequence.
    """
    backward, sums = do is not None, denominator_min is not None
    batch, tokens, heads, width = q.shape
    chunk, v_dim = ops.chunk_tokens("cuda", width, v.shape[-1]), v.shape[-1]
    number = 2 if all(x.dtype == torch.bfloat16 for x in (q, k, v)) else 4
    starts = batch * heads * -(-tokens // chunk) * width * (v_dim * number + 4 * sums)
    last = 4 * batch * heads * width * (v_dim + sums)
    decay = 12 * batch * tokens * heads if g is not None and g.dim() == 3 else 0
    before = 0 if row is None or do is None else number * do.numel() + 4 * sums * row.numel()
    flops = operator_flops(batch * tokens * heads, width, v_dim, chunk)[backward]
    return Inside(flops, decay + (starts + decays * (starts + last) + before if backward else starts))


@lru_cache(maxsize=64)
def _inside(function: torch._ops.OpOverload, described: tuple) -> Inside:
    """By running it on the first tokens, without storage: each block after the first takes what that one takes."""
    backward = function is torch.ops.supra.chunk_backward.default
    (batch, tokens, heads, width), _ = described[0]
    some = min(tokens, max(_TOKENS, _NUMBERS // (batch * heads * width) // _TOKENS * _TOKENS))

    def shortened(shape: torch.Size) -> tuple[int, ...]:
        return (batch, some, *shape[2:]) if shape[:2] == (batch, tokens) else shape

    # A torch.device(...) around the plan is a function mode, which would make an ordinary call of that of one kernel.
    with FakeTensorMode(), torch._C.DisableTorchFunction():
        args = [torch.empty(shortened(x[0]), dtype=x[1]) if isinstance(x, tuple) else x for x in described]
        if backward:
            q, k, v, g, documents, _, scale, _ = args[2:]
            args[7] = torch.ops.supra.chunk(q, k, v, g, None, documents, scale, True)[2]
        counted = Meter(*(x for x in args if isinstance(x, Tensor)))
        with counted:
            returned = function._op_dk(_KERNEL, *args)
        scratch = counted.laps[-1].peak - sum(tensor.nbytes for tensor in returned)
    return Inside(counted.flops * tokens // some, max(0, scratch))
