"""The recurrence in chunks: matrix products inside a chunk, a state between chunks. What trains on a CPU.

Forward, for a chunk of C tokens with incoming state S and b_i the sum of its log decays up to and including token i:
    o_i = scale · ( Σ_{j≤i} exp(b_i - b_j) (q_i·k_j) v_j + exp(b_i) q_i^T S )
    S'  = exp(b_C) S + Σ_j exp(b_C - b_j) k_j v_j^T
Backward, dS' being the gradient of S', W_ij = scale · exp(b_i - b_j) [j≤i], P = W∘(q k^T), D = W∘(do v^T):
    dq_i = Σ_j D_ij k_j + scale · exp(b_i) S do_i
    dk_j = Σ_i D_ij q_i + exp(b_C - b_j) dS' v_j
    dv_j = Σ_i P_ij do_i + exp(b_C - b_j) dS'^T k_j
    dS   = exp(b_C) dS' + scale · Σ_i exp(b_i) q_i do_i^T
    dg_t = Σ_{j<t≤i} P_ij (do_i·v_j) + Σ_{i≥t} scale · exp(b_i) q_i^T S do_i
         + Σ_{j<t} exp(b_C - b_j) k_j^T dS' v_j + exp(b_C) <S, dS'>
Derived in docs/numerics.md. Every exponent is a sum of log decays over a stretch of tokens, so ≤ 0: nothing overflows.

Tokens are worked through in blocks of a few chunks, chunk first: [M,B,heads,C,·]. The forward pass keeps the state at
each block's start, the backward pass recomputes the rest; time and memory are linear in T. Under GQA the query heads of
a kv head are rows of one product, so k and v are never repeated. Every product and copy of a block is written to a
buffer of `Scratch`, which the next block uses again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from supra_kernels.boundaries import compute_dtype, decoded, log_decay
from supra_kernels.weights import Weights, block_weights, fixed_weights

BLOCK_ELEMENTS = 1 << 17
"""Elements of q in one block: a block and its products stay in a core's cache."""


def chunk_length(key_dim: int, v_dim: int) -> int:
    """Tokens: short chunks cost less arithmetic, long ones fewer calls. Measured on a CPU, widths 32, 64 and 128."""
    return 32 if max(key_dim, v_dim) <= 48 else 64


def block_sizes(batch: int, heads: int, key_dim: int, v_dim: int) -> tuple[int, int]:
    """Tokens in a chunk, and chunks in a block at most."""
    size = chunk_length(key_dim, v_dim)
    return size, max(1, BLOCK_ELEMENTS // (size * batch * heads * max(key_dim, v_dim)))


class Scratch:
    """Buffers by name and shape. Fresh ones for every block cost a sixth more time: page faults, missed caches."""

    def __init__(self, like: Tensor, dtype: torch.dtype):
        self._like, self._dtype = like, dtype
        self._held: dict[tuple, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """The buffer [*shape], with whatever was last written to it."""
        if (name, shape) not in self._held:
            self._held[name, shape] = self._like.new_empty(shape, dtype=self._dtype)
        return self._held[name, shape]


class _Block(NamedTuple):
    start: int
    chunks: int
    length: int

    def load(self, x: Tensor, into: Scratch, name: str) -> Tensor:
        """[B,T,heads,·] -> [M,B,heads,C,·] of this block, contiguous, in the compute dtype.

        By way of a copy in x's own order: to read memory in sequence and turn the copy in the cache takes 3/4 the time.
        """
        x = self._tokens(x)
        window = self._window(into("tokens", *x.shape).copy_(x))
        return into(name, *window.shape).copy_(window)

    def store(self, x: Tensor, value: Tensor) -> None:
        self.window(x).copy_(value)

    def window(self, x: Tensor) -> Tensor:
        """[B,T,heads,·] -> [M,B,heads,C,·] of this block, as a view."""
        return self._window(self._tokens(x))

    def _tokens(self, x: Tensor) -> Tensor:
        return x.narrow(1, self.start, self.chunks * self.length)

    def _window(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.chunks, self.length)).permute(1, 0, 3, 2, 4)


def cut(length: int, size: int, most: int) -> list[_Block]:
    """Chunks of `size` tokens, `most` of them in a block; what is left over is a block of one shorter chunk."""
    whole = length // size
    blocks = [_Block(first * size, min(most, whole - first), size) for first in range(0, whole, most)]
    if length % size:
        blocks.append(_Block(whole * size, 1, length % size))
    return blocks


class Plan:
    """The blocks of one call and the decay weights of each; weights of a fixed decay are made once per chunk length."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, documents: Tensor | None, scale: float):
        self.dtype, self.scale = compute_dtype(q, k, v), scale
        self.layout = None if documents is None else decoded(documents)
        real = None if self.layout is None else self.layout.real
        # Without padding a fixed decay has the same weights in every chunk. Asked on a CPU alone, since a GPU would be
        # waited for; and of no fake tensor, which has no answer.
        if type(real) is Tensor and real.device.type == "cpu" and bool(real.all()):
            real = None
        self.g = log_decay(g, real, self.dtype)
        batch, length, heads, key_dim = q.shape
        size, most = block_sizes(batch, heads, key_dim, v.shape[-1])
        self.blocks = cut(length, size, most)
        self._fixed: dict[int, Weights] = {}

    def weights(self, block: _Block, device: torch.device) -> Weights:
        if self.g is not None and self.g.dim() == 3:
            return block_weights(None, self.g, self.layout, block, self.scale)
        if block.length not in self._fixed:
            self._fixed[block.length] = fixed_weights(self.g, block.length, self.scale, self.dtype, device)
        fixed = self._fixed[block.length]
        return fixed if self.layout is None else block_weights(fixed, self.g, self.layout, block, self.scale)


def _group(x: Tensor, kv_heads: int) -> Tensor:
    """[M,B,H,C,·] -> [M·B·G, (H/G)·C, ·]: the query heads of one kv head as rows."""
    chunks, batch, heads, length, width = x.shape
    return x.view(chunks * batch * kv_heads, heads // kv_heads * length, width)


def _per_head(x: Tensor, kv_heads: int) -> Tensor:
    """[m,b,h,C] -> [m,b,G or 1,C,H/G or 1,1], to weigh what belongs to a kv head's tokens per query head."""
    if x.shape[2] == 1:
        return x[..., None, None]
    return x.unflatten(2, (kv_heads, -1)).transpose(3, 4).unsqueeze(-1)


def _states(k: Tensor, v: Tensor, weights: Weights, start: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """-> S before each chunk and after the last [M+1,B,H,K,V]; k weighted to the chunk's end [M·B·G, C, (H/G)·K]."""
    chunks, batch, kv_heads, length, key_dim = k.shape
    heads, v_dim = start.shape[1], v.shape[-1]
    group = heads // kv_heads
    weighted = scratch("weighted", chunks, batch, kv_heads, length, group, key_dim)
    torch.mul(k.unsqueeze(4).expand_as(weighted), _per_head(weights.to_end, kv_heads), out=weighted)
    weighted = weighted.view(-1, length, group * key_dim)
    states = scratch("states", chunks + 1, batch, heads, key_dim, v_dim)
    states[0] = start
    torch.bmm(weighted.mT, v.flatten(0, 2), out=states[1:].view(-1, group * key_dim, v_dim))
    each = states.unbind()
    for before, after, through in zip(each[:-1], each[1:], _through(weights, chunks), strict=True):
        after.addcmul_(before, through)
    return states, weighted


def _through(weights: Weights, chunks: int) -> tuple[Tensor, ...]:
    """What is left of the incoming state after each chunk, as factors of [B,H,K,V]."""
    return weights.through[..., None, None].expand(chunks, -1, -1, -1, -1).unbind()


def _forward_block(
    q: Tensor, k: Tensor, v: Tensor, weights: Weights, start: Tensor, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """Overwrites q."""
    kv_heads, (chunks, batch, heads, length, _), v_dim = k.shape[2], q.shape, v.shape[-1]
    scores = scratch("P", chunks, batch, heads, length, length)
    torch.bmm(_group(q, kv_heads), k.flatten(0, 2).mT, out=_group(scores, kv_heads))
    scores.mul_(weights.within)
    o = scratch("o", chunks, batch, heads, length, v_dim)
    torch.bmm(_group(scores, kv_heads), v.flatten(0, 2), out=_group(o, kv_heads))
    states, _ = _states(k, v, weights, start, scratch)
    from_start = q.mul_(weights.from_start.unsqueeze(-1))
    o.flatten(0, 2).baddbmm_(from_start.flatten(0, 2), states[:-1].flatten(0, 2))
    return o, states[-1]


class _Gradients(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    state: Tensor


def _backward_block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    weights: Weights,
    start: Tensor,
    d_end: Tensor,
    decays: bool,
    scratch: Scratch,
) -> _Gradients:
    """Letters as in the module's formulas; d_end is dS' of the block's last chunk. dg is [M,B,H,C]. Overwrites do."""
    kv_heads, (chunks, batch, heads, length, key_dim), v_dim = k.shape[2], q.shape, v.shape[-1]
    group = heads // kv_heads
    square = (chunks, batch, heads, length, length)
    q_rows, do_rows, k_flat, v_flat = _group(q, kv_heads), _group(do, kv_heads), k.flatten(0, 2), v.flatten(0, 2)
    states, weighted = _states(k, v, weights, start, scratch)

    P, D = scratch("P", *square), scratch("D", *square)
    P_rows, D_rows = _group(P, kv_heads), _group(D, kv_heads)
    torch.bmm(q_rows, k_flat.mT, out=P_rows)
    P.mul_(weights.within)
    torch.bmm(do_rows, v_flat.mT, out=D_rows)
    pairs = P * D if decays else None
    D.mul_(weights.within)
    dq, dk, dv = scratch("dq", *q.shape), scratch("dk", *k.shape), scratch("dv", *v.shape)
    torch.bmm(D_rows, k_flat, out=_group(dq, kv_heads))
    torch.bmm(D_rows.mT, q_rows, out=dk.flatten(0, 2))
    torch.bmm(P_rows.mT, do_rows, out=dv.flatten(0, 2))

    do_start = do.mul_(weights.from_start.unsqueeze(-1)).flatten(0, 2)
    from_state = scratch("from_state", *q.shape)
    torch.bmm(do_start, states[:-1].flatten(0, 2).mT, out=from_state.flatten(0, 2))
    dq.add_(from_state)

    d_states = scratch("d_states", *states.shape)
    d_states[-1] = d_end
    torch.bmm(q.flatten(0, 2).mT, do_start, out=d_states[:-1].view(-1, key_dim, v_dim))
    each = d_states.unbind()[::-1]
    for after, before, through in zip(each[:-1], each[1:], _through(weights, chunks)[::-1], strict=True):
        before.addcmul_(after, through)

    d_out = d_states[1:].view(-1, group * key_dim, v_dim)
    to_state = scratch("to_state", chunks, batch, kv_heads, length, group, key_dim)
    torch.bmm(v_flat, d_out.mT, out=to_state.view(-1, length, group * key_dim))
    to_state.mul_(_per_head(weights.to_end, kv_heads))
    dk.add_(to_state.squeeze(4) if group == 1 else to_state.sum(4))
    dv.flatten(0, 2).baddbmm_(weighted, d_out)

    dg = None
    if decays:
        pairs.diagonal(dim1=-2, dim2=-1).zero_()
        later = pairs.sum(-1).sub_(pairs.sum(-2)).add_(from_state.mul_(q).sum(-1))
        earlier = to_state.mul_(k.unsqueeze(4)).sum(-1).transpose(3, 4).reshape(later.shape)
        carried = weights.through * (states[:-1] * d_states[1:]).sum((-2, -1))
        before = torch.nn.functional.pad(earlier[..., :-1], (1, 0)).cumsum(-1)
        dg = later.flip(-1).cumsum(-1).flip(-1) + before + carried.unsqueeze(-1)
    return _Gradients(dq, dk, dv, dg, d_states[0])


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor | None,
    documents: Tensor | None,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> o, the final state, and with `keep` the state at each block's start [blocks,B,H,K,V], for `backward`."""
    plan = Plan(q, k, v, g, documents, scale)
    batch, length, heads, key_dim = q.shape
    shape = (batch, heads, key_dim, v.shape[-1])
    S = q.new_zeros(shape, dtype=plan.dtype) if state is None else state.to(plan.dtype)
    o = v.new_empty(batch, length, heads, v.shape[-1])
    scratch = Scratch(q, plan.dtype)
    starts = q.new_empty((len(plan.blocks) if keep else 0, *shape), dtype=plan.dtype)
    for i, block in enumerate(plan.blocks):
        if keep:
            starts[i] = S
        inputs = (block.load(x, scratch, name) for name, x in (("q", q), ("k", k), ("v", v)))
        part, S = _forward_block(*inputs, plan.weights(block, q.device), S, scratch)
        block.store(o, part)
    return o, S.clone(), starts


def backward(
    do: Tensor,
    dS: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    documents: Tensor | None,
    starts: Tensor,
    scale: float,
    decays: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of q, k, v, g (empty unless `decays`) and the initial state, which is in the compute dtype."""
    plan = Plan(q, k, v, g, documents, scale)
    dS = torch.zeros_like(starts[0]) if dS is None else dS.to(plan.dtype)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    dg = q.new_empty(q.shape[:3] if decays else 0, dtype=plan.dtype)
    scratch = Scratch(q, plan.dtype)
    for block, start in zip(reversed(plan.blocks), reversed(starts.unbind()), strict=True):
        inputs = (block.load(x, scratch, name) for name, x in (("q", q), ("k", k), ("v", v), ("do", do)))
        grads = _backward_block(*inputs, plan.weights(block, q.device), start, dS, decays, scratch)
        dS = grads.state
        for whole, part in ((dq, grads.q), (dk, grads.k), (dv, grads.v)):
            block.store(whole, part)
        if decays:
            block.store(dg.unsqueeze(-1), grads.g.unsqueeze(-1))
    if decays and plan.layout is not None:
        dg *= plan.layout.continues.unsqueeze(-1)  # where a document starts, and on padding, the decay acts on nothing
    if decays and g.dim() == 1:
        dg = dg.sum((0, 1))
    return dq, dk, dv, dg.to(g.dtype) if decays else dg, dS.clone()
