"""The delta rule in chunks: within a chunk a triangular system, between chunks a state.

Forward, for a chunk of C tokens with incoming state S and c_i the sum of its log decays up to and including token i,
per head (a number) or per channel (a vector over K; products of exponentials and keys are then by channel):
    A_ij = β_i k_i·(exp(c_i - c_j) k_j) [j<i]          P_ij = q_i·(exp(c_i - c_j) k_j) [j≤i]
    R = V - (K ∘ e^c) S,    V' = (I + A)^-1 β R
    O = (Q ∘ e^c) S + P V',    S' = e^{c_C} S + (K ∘ e^{c_C - c})^T V'
Backward, dS' being the gradient of S':
    dV' = P^T dO + (K ∘ e^{c_C - c}) dS',    dY = (I + A)^-T dV',    dA = -dY V'^T,    dP = dO V'^T
    dS = e^{c_C} dS' + (Q ∘ e^c)^T dO - (K ∘ e^c)^T β dY,    dV = β dY
    dβ_i = dY_i·R_i + Σ_j dA_ij (A_ij without its β_i)
and dq, dk through the products above. A log decay stands in e^c at q_i or k_i and in e^-c at k_j, so its gradient is
    dc = q∘dq + k∘dk_row - k∘dk_column,    dg_t = Σ_{i≥t} dc_i .
Every exponent is a sum of log decays over a stretch of tokens, so ≤ 0: nothing overflows.
Where r query heads read one state, Q, O, P and their gradients have rC rows, one head's after another's; what stands at
token i in c, A and e^c is for each of these heads, and q∘dq is summed over them in dc.

Source: Yang et al. 2024, arXiv:2412.06464, section 3.2 (a decay per head); arXiv:2510.26692 (per channel). Tokens are
worked through in blocks of a few chunks; the forward pass keeps the state at each block's start, the backward pass
recomputes the rest, so that time and memory are linear in T.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from supra_kernels.boundaries import NAMESPACE, OPERATORS, compute_dtype, decoded, log_decay
from supra_kernels.chunk import BLOCK_ELEMENTS, cut
from supra_kernels.library import library
from supra_kernels.weights import block_weights, exact_parts, fixed_weights

HEAD_CHUNK, CHANNEL_CHUNK = 32, 16
"""Tokens of a chunk, measured on a CPU: with a decay per channel a chunk's weights are [C,C,K], so it is short."""


def block_sizes(q: Tensor, v: Tensor, channels: bool) -> tuple[int, int]:
    """Tokens in a chunk, and chunks in a block at most."""
    batch, _, heads, key_dim = q.shape
    size = CHANNEL_CHUNK if channels else HEAD_CHUNK
    width = size * key_dim if channels else max(key_dim, v.shape[-1])
    return size, max(1, (8 if channels else 1) * BLOCK_ELEMENTS // (size * batch * heads * width))


class _Decay(NamedTuple):
    """Leading dimensions [m,b,h] are chunk, batch and state, each whole or 1; w is 1, or K with a decay per channel.

    within [m,b,h,C,C] or [m,b,h,C,C,K]: of token j at token i ≥ j. from_start, to_end [m,b,h,C,w]: of the incoming
    state at token i, of token j in the outgoing state. through [m,b,h,w,1]: of the incoming state in the outgoing one.
    Below, x has rC rows, those of k and w more heads that read the same state.
    """

    within: Tensor
    from_start: Tensor
    to_end: Tensor
    through: Tensor

    @property
    def channels(self) -> bool:
        return self.within.dim() == 6

    def kept(self, k: Tensor) -> Tensor:
        """`through`, for every chunk, batch and state of k."""
        return self.through.expand(*k.shape[:3], -1, -1)

    def arriving(self, x: Tensor) -> Tensor:
        """x ∘ from_start."""
        return _each_head(x, self.from_start)

    def scores(self, x: Tensor, k: Tensor) -> Tensor:
        """x_i·(within_ij k_j), [m,b,h,rC,C]."""
        if not self.channels:
            return _each_head(x @ k.mT, self.within, in_place=True)
        return _by_head(_by_token(x, k) @ (self.within * k.unsqueeze(-3)).mT)

    def gradients(self, d: Tensor, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Of x and k, from d [m,b,h,rC,C], that of the scores."""
        if not self.channels:
            d = _each_head(d, self.within)
            return d @ k, d.mT @ x
        d, x = _by_token(d, k), _by_token(x, k)
        # No second tensor of [C,C,K] beside `within` lives at a time.
        dx = _by_head(d @ (self.within * k.unsqueeze(-3)))
        return dx, (d.mT @ x).mul_(self.within).sum(-3)


def _each_head(x: Tensor, weights: Tensor, in_place: bool = False) -> Tensor:
    """weights [..,C,·] ∘ the rows of each head in x [..,rC,·]."""
    heads, weights = x.unflatten(-2, (-1, weights.shape[-2])), weights.unsqueeze(-3)
    return (heads.mul_(weights) if in_place else heads * weights).flatten(-3, -2)


def _by_token(x: Tensor, k: Tensor) -> Tensor:
    """[..,rC,·] -> [..,C,r,·], with the C tokens of k."""
    return x.unflatten(-2, (-1, k.shape[-2])).transpose(-3, -2)


def _by_head(x: Tensor) -> Tensor:
    """[..,C,r,·] -> [..,rC,·]."""
    return x.transpose(-3, -2).flatten(-3, -2)


class _Plan:
    """The blocks of one call and the decay of each."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, documents: Tensor | None):
        self.dtype = compute_dtype(q, k, v)
        self.readers = q.shape[2] // k.shape[2]
        self.layout = None if documents is None else decoded(documents)
        self.channels = g is not None and g.dim() == 4
        if g is not None:
            real = None if self.layout is None else self.layout.real
            g = log_decay(g, real.unsqueeze(-1) if self.channels and real is not None else real, self.dtype)
        self.g = g
        self.blocks = cut(q.shape[1], *block_sizes(q, v, self.channels))

    def load(self, block, x: Tensor) -> Tensor:
        """[B,T,H,·] -> [M,B,H,C,·] of the block in the compute dtype."""
        return block.window(x).to(self.dtype).contiguous()

    def rows(self, block, x: Tensor) -> Tensor:
        """[B,T,H,·] -> [M,B,N,rC,·]: of the r query heads of a state one after the other."""
        return self.load(block, x).unflatten(2, (-1, self.readers)).flatten(3, 4)

    def heads(self, rows: Tensor) -> Tensor:
        """[M,B,N,rC,·] -> [M,B,H,C,·]."""
        return rows.unflatten(3, (self.readers, -1)).flatten(2, 3)

    def decay(self, block, device: torch.device) -> _Decay:
        if self.channels:
            return self._by_channel(block)
        fixed = fixed_weights(None, block.length, 1.0, self.dtype, device) if self.g is None else None
        weights = block_weights(fixed, self.g, self.layout, block, 1.0)
        starts, ends = weights.from_start.unsqueeze(-1), weights.to_end.unsqueeze(-1)
        return _Decay(weights.within, starts, ends, weights.through[..., None, None])

    def _by_channel(self, block) -> _Decay:
        totals = [part.cumsum(-2) for part in exact_parts(block.window(self.g), self.g.device.type)]
        apart = _added(total.unsqueeze(-2) - total.unsqueeze(-3) for total in totals).clamp_(max=0).to(self.dtype)
        token = torch.arange(block.length, device=apart.device)
        seen = token[:, None] >= token
        to_end = _added(total[..., -1:, :] - total for total in totals).to(self.dtype).exp_()
        from_start = _added(totals).to(self.dtype).exp_()
        through = from_start[..., -1, :, None]
        if self.layout is not None:
            # Of documents a fixed decay of 1 has what is cut: weights of 0 and 1.
            ones = fixed_weights(None, block.length, 1.0, self.dtype, apart.device)
            cuts = block_weights(ones, None, self.layout, block, 1.0)
            seen = cuts.within > 0
            from_start, to_end = from_start * cuts.from_start.unsqueeze(-1), to_end * cuts.to_end.unsqueeze(-1)
            through = through * cuts.through[..., None, None]
        return _Decay(apart.exp_().mul_(seen.to(self.dtype).unsqueeze(-1)), from_start, to_end, through)


def _added(parts: Iterable[Tensor]) -> Tensor:
    """Their sum; `sum` begins with 0 + x, another pass over [C,C,K]."""
    return functools.reduce(torch.add, parts)


class _Chunks(NamedTuple):
    """What both directions need of a block."""

    scores: Tensor
    """A without its β."""
    lower: Tensor
    """(I + A)^-1."""
    P: Tensor
    from_start: Tensor
    """K ∘ e^c."""
    to_end: Tensor
    """(K ∘ e^{c_C - c})^T."""
    W: Tensor
    """(I + A)^-1 β (K ∘ e^c)."""
    states: Tensor
    """Before each chunk, and after the last: [M+1,B,N,K,V]."""
    values: Tensor
    """V'."""


def _chunks(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: _Decay, start: Tensor) -> _Chunks:
    """q [M,B,N,rC,K], k, v [M,B,N,C,·], beta [M,B,N,C,1]."""
    scores, from_start, to_end = decay.scores(k, k).tril_(-1), k * decay.from_start, (k * decay.to_end).mT
    lower = inverse(scores * beta)
    W, values = lower @ (from_start * beta), lower @ (v * beta)
    states = start.new_empty(len(k) + 1, *start.shape)
    states[0] = start
    S, each = _by_chunk(states), map(_by_chunk, (W, values, to_end, decay.kept(k)))
    for m, (W_, value, end, kept) in enumerate(zip(*each, strict=True)):
        torch.baddbmm(value, W_, S[m], alpha=-1, out=value)
        torch.baddbmm(S[m] * kept, end, value, out=S[m + 1])
    return _Chunks(scores, lower, decay.scores(q, k), from_start, to_end, W, states, values)


def _by_chunk(x: Tensor) -> tuple[Tensor, ...]:
    """[M,B,N,·,·] -> M views [B·N,·,·]: a product of these is one call, and adds to what is there."""
    return x.flatten(1, 2).unbind()


def inverse(A: Tensor) -> Tensor:
    """(I + A)^-1 of strictly lower triangular A [..., C, C], by forward substitution."""
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return torch.linalg.solve_triangular(A + eye, eye.expand_as(A), upper=False, unitriangular=True)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    state: Tensor | None,
    documents: Tensor | None,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B,T,H,K], all else of N states, k [B,T,N,K] and v [B,T,N,V] too -> o, the final state, and with `keep` the
    state at each block's start [blocks,B,N,K,V], for `backward`.
    """
    plan = _Plan(q, k, v, g, documents)
    batch, length, heads, _ = q.shape
    shape = (batch, *k.shape[2:], v.shape[-1])
    S = q.new_zeros(shape, dtype=plan.dtype) if state is None else state.to(plan.dtype)
    o = v.new_empty(batch, length, heads, v.shape[-1])
    starts = q.new_empty((len(plan.blocks) if keep else 0, *shape), dtype=plan.dtype)
    for i, block in enumerate(plan.blocks):
        if keep:
            starts[i] = S
        q_ = plan.rows(block, q)
        k_, v_, beta_ = (plan.load(block, x) for x in (k, v, beta.unsqueeze(-1)))
        decay = plan.decay(block, q.device)
        chunks = _chunks(q_, k_, v_, beta_, decay, S)
        part = decay.arriving(q_) @ chunks.states[:-1] + chunks.P @ chunks.values
        block.window(o).copy_(plan.heads(part * scale))
        S = chunks.states[-1]
    return o, S.clone(), starts


def backward(
    do: Tensor,
    dS: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    documents: Tensor | None,
    starts: Tensor,
    scale: float,
    decays: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of q, k, v, g (empty unless `decays`) and beta, each in its own dtype, and of the initial state in
    the compute dtype.
    """
    plan = _Plan(q, k, v, g, documents)
    dS = torch.zeros_like(starts[0]) if dS is None else dS.to(plan.dtype)
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, beta.unsqueeze(-1))]
    dg = torch.empty_like(plan.g if g is None or plan.channels else plan.g.unsqueeze(-1)) if decays else None
    for block, start in zip(reversed(plan.blocks), reversed(starts.unbind()), strict=True):
        # Handed over and not kept: they are gone when the next block's are made.
        given = (plan.load(block, x) for x in (k, v, beta.unsqueeze(-1)))
        dq, *parts, d_decay, dS = _backward_block(
            plan.rows(block, q), *given, plan.rows(block, do), plan.decay(block, q.device), start, dS, scale, decays
        )
        for whole, part in zip(grads, (plan.heads(dq), *parts), strict=True):
            block.window(whole).copy_(part)
        if decays:
            block.window(dg).copy_(d_decay)
    dq, dk, dv, d_beta = grads
    if not decays:
        return dq, dk, dv, q.new_empty(0), d_beta.squeeze(-1), dS.clone()
    if plan.layout is not None:
        dg *= plan.layout.continues[:, :, None, None]  # where a document starts, and on padding, it acts on nothing
    return dq, dk, dv, dg.view(g.shape).to(g.dtype), d_beta.squeeze(-1), dS.clone()


def _backward_block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    do: Tensor,
    decay: _Decay,
    start: Tensor,
    d_end: Tensor,
    scale: float,
    decays: bool,
) -> tuple[Tensor | None, ...]:
    """Letters as in the module's formulas -> dq, dk, dv, dβ, dg or None, dS of the block's start."""
    chunks = _chunks(q, k, v, beta, decay, start)
    before, values = chunks.states[:-1], chunks.values
    do = do * scale
    d_values = chunks.P.mT @ do
    from_output = decay.arriving(q).mT @ do
    d_states = torch.empty_like(chunks.states)
    d_states[-1] = d_end
    dS = _by_chunk(d_states)
    each = map(_by_chunk, (chunks.W.mT, d_values, chunks.to_end.mT, from_output, decay.kept(k)))
    for m, (W_, d_value, end, output, kept) in reversed(list(enumerate(zip(*each, strict=True)))):
        torch.baddbmm(d_value, end, dS[m + 1], out=d_value)
        torch.baddbmm(torch.addcmul(output, dS[m + 1], kept), W_, d_value, alpha=-1, out=dS[m])

    dY = chunks.lower.mT @ d_values
    dA = (dY @ values.mT).neg_().tril_(-1)
    dP = do @ values.mT  # above the diagonal `gradients` multiplies it by 0
    dv = dY * beta
    d_beta = (dY * (v - chunks.from_start @ before)).sum(-1, keepdim=True)
    d_beta += (dA * chunks.scores).sum(-1, keepdim=True)

    dq, k_column = decay.gradients(dP, q, k)
    k_row, k_other = decay.gradients(dA * beta, k, k)
    q_start = decay.arriving(do @ before.mT)
    k_start = (dv @ before.mT).mul_(decay.from_start).neg_()
    k_end = (values @ d_states[1:].mT).mul_(decay.to_end)
    dq += q_start
    k_row += k_start
    k_column += k_other
    dg = None
    if decays:
        of_queries = (q * dq).unflatten(3, (-1, k.shape[3])).sum(3)
        each = of_queries + k * (k_row - k_column)
        carried = decay.through * (before * d_states[1:])
        earlier = k * k_end
        if not decay.channels:
            each, earlier = each.sum(-1, keepdim=True), earlier.sum(-1, keepdim=True)
            carried = carried.sum((-2, -1), keepdim=True)
        else:
            carried = carried.sum(-1).unsqueeze(-2)
        shifted = torch.nn.functional.pad(earlier[..., :-1, :], (0, 0, 1, 0)).cumsum(-2)
        dg = each.flip(-2).cumsum(-2).flip(-2) + shifted + carried
    return dq, k_row + k_column + k_end, dv, d_beta, dg, d_states[0]


library.define(
    "delta_chunk(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor beta, Tensor? state, Tensor? documents, float scale,"
    " bool keep) -> (Tensor, Tensor, Tensor)"
)
library.define(
    "delta_chunk_backward(Tensor do, Tensor? dS, Tensor q, Tensor k, Tensor v, Tensor? g, Tensor beta,"
    " Tensor? documents, Tensor starts, float scale, bool decays) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.impl("delta_chunk", forward, "CompositeExplicitAutograd")
library.impl("delta_chunk_backward", backward, "CompositeExplicitAutograd")


@torch.library.register_fake(f"{NAMESPACE}::delta_chunk", lib=library)
def _(q, k, v, g, beta, state, documents, scale, keep):
    batch, length, heads, _ = q.shape
    S = q.new_empty(batch, *k.shape[2:], v.shape[-1], dtype=compute_dtype(q, k, v))
    size, most = block_sizes(q, v, g is not None and g.dim() == 4)
    blocks = (length // size + most - 1) // most + (length % size + size - 1) // size
    return v.new_empty(batch, length, heads, v.shape[-1]), S, S.new_empty(blocks if keep else 0, *S.shape)


@torch.library.register_fake(f"{NAMESPACE}::delta_chunk_backward", lib=library)
def _(do, dS, q, k, v, g, beta, documents, starts, scale, decays):
    like = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    dg = torch.empty_like(g, memory_format=torch.contiguous_format) if decays else q.new_empty(0)
    return *like, dg, torch.empty_like(beta, memory_format=torch.contiguous_format), torch.empty_like(starts[0])


def _setup(ctx, inputs, output):
    q, k, v, g, beta, state, documents, ctx.scale, _ = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, g, beta, state, documents, output[2])


def _gradients(ctx, do, dS, _):
    q, k, v, g, beta, state, documents, starts = ctx.saved_tensors
    do = v.new_zeros(*q.shape[:3], v.shape[-1]) if do is None else do
    decays = ctx.needs_input_grad[3]
    given = (do, dS, q, k, v, g, beta, documents, starts, ctx.scale, decays)
    dq, dk, dv, dg, d_beta, d_state = OPERATORS.delta_chunk_backward(*given)
    d_state = None if state is None else d_state.to(state.dtype)
    return dq, dk, dv, dg if decays else None, d_beta, d_state, None, None, None


torch.library.register_autograd(f"{NAMESPACE}::delta_chunk", _gradients, setup_context=_setup, lib=library)
