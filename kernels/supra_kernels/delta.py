"""The delta rule: the entry point, the recurrence token by token, and the step that decodes."""

from __future__ import annotations

import torch
from torch import Tensor

from supra_kernels import delta_chunk  # noqa: F401  (defines the operator of torch.library)
from supra_kernels.boundaries import OPERATORS, compute_dtype, decoded, log_decay, writable
from supra_kernels.boundaries import documents as coded
from supra_kernels.library import STEP_LENGTH
from supra_kernels.operator import check_shapes, passing_over, without_autocast

DELTA_FORMS = ("naive", "chunk", "step")


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    *,
    scale: float = 1.0,
    state: Tensor | None = None,
    segment: Tensor | None = None,
    documents: Tensor | None = None,
    form: str | None = None,
) -> tuple[Tensor, Tensor]:
    """S ← exp(g_t) S,   S ← S + β_t k_t (v_t - S^T k_t)^T,   o_t = scale · S^T q_t.

    q [B,T,H,K], k [B,T,G,K], v [B,T,G,V]; state [B,N,K,V] or None for zeros, with N states, which β tells, G dividing N
    and N dividing H. State n is written by kv head n // (N/G), and query head h reads state h // (H/N): with N = H each
    has its own, with N = G those of a kv head read one. g is a log decay ≤ 0: None, [B,T,N], or [B,T,N,K] for one a
    channel (row of S). β [B,T,N] is in (0,1), or in (0,2) for eigenvalues of the transition down to -1; keys are to be
    of length 1 (β |k|² < 2), or S may grow without bound. segment and documents as in `linear_attention`.
    Returns o [B,T,H,V] in v's dtype and the state after each row's last real token, fp32 (float64 for float64 inputs).
    Without gradients the step form overwrites `state` and returns it. Raises ValueError for shapes that do not fit and
    for an unknown form.
    """
    check_shapes(q, k, v, None, segment, documents)
    states = _states(q, k, v, g, beta, state)
    if form is None:
        form = "step" if q.shape[1] <= (STEP_LENGTH if segment is None else 1) else "chunk"
    if form not in DELTA_FORMS:
        raise ValueError(f"form is one of {', '.join(DELTA_FORMS)}, got '{form}'")
    if states > k.shape[2]:
        k, v = (x.repeat_interleave(states // k.shape[2], 2) for x in (k, v))
    with without_autocast(q.device.type):
        if form == "naive":
            return _naive(q, k, v, g, beta, scale, state, segment)
        if segment is not None and q.shape[1] == 1:
            k, g = passing_over(segment >= 0, k, g)
            segment = documents = None
        if documents is None and segment is not None:
            documents = coded(segment)
        if form == "step":
            return _step(q, k, v, g, beta, scale, state, documents)
        grows = [x for x in (q, k, v, g, beta, state) if x is not None and x.requires_grad]
        keep = torch.is_grad_enabled() and bool(grows)
        return OPERATORS.delta_chunk(q, k, v, g, beta, state, documents, scale, keep)[:2]


def _states(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, state: Tensor | None) -> int:
    """N, by β; ValueError for a β, g or state that does not fit q, k and v."""
    (batch, length, heads, key_dim), kv_heads = q.shape, k.shape[2]
    states = beta.shape[-1] if beta.dim() else 0
    rows = batch, length, states
    if beta.shape != rows or not states or states % kv_heads or heads % states:
        raise ValueError(
            f"beta is [{batch}, {length}, N], N a multiple of {kv_heads} dividing {heads}, got {tuple(beta.shape)}"
        )
    if g is not None and g.shape != rows and g.shape != (*rows, key_dim):
        raise ValueError(f"g is None, {list(rows)} or {[*rows, key_dim]}, got {tuple(g.shape)}")
    if state is not None and state.shape != (batch, states, key_dim, v.shape[-1]):
        raise ValueError(f"state is {[batch, states, key_dim, v.shape[-1]]}, got {tuple(state.shape)}")
    return states


def _naive(q, k, v, g, beta, scale, state, segment):
    """The specification, backward by autograd; float64 in, float64 out."""
    dtype = compute_dtype(q, k, v)
    decay = None if g is None else g.to(dtype).exp().view(*beta.shape, -1)
    q, k, values, beta = (x.to(dtype) for x in (q, k, v, beta))
    q = _by_state(q, beta)
    S = k.new_zeros(k.shape[0], *k.shape[2:], v.shape[-1]) if state is None else state.to(dtype)
    document = torch.full((len(q),), -1, device=q.device)  # of the row's last real token so far; -1: none yet
    outputs = []
    for t in range(q.shape[1]):
        left = S if decay is None else S * decay[:, t].unsqueeze(-1)
        if segment is not None:
            here = segment[:, t]
            starts = (here >= 0) & (document >= 0) & (here != document)
            left = torch.where(starts[:, None, None, None], 0, left)
        wrong = values[:, t] - torch.einsum("bhkv,bhk->bhv", left, k[:, t])
        after = left + torch.einsum("bh,bhk,bhv->bhkv", beta[:, t], k[:, t], wrong)
        if segment is not None:
            after = torch.where((here >= 0)[:, None, None, None], after, S)
            document = torch.where(here >= 0, here, document)
        S = after
        outputs.append(scale * torch.einsum("bhrk,bhkv->bhrv", q[:, t], S))
    return torch.stack(outputs, dim=1).flatten(2, 3).to(v.dtype), S


def _step(q, k, v, g, beta, scale, state, documents):
    """One token after another; without gradients `state` is overwritten and returned."""
    dtype = compute_dtype(q, k, v)
    layout = None if documents is None else decoded(documents)
    real = None if layout is None else layout.real
    if g is not None:
        g = log_decay(g.view(*beta.shape, -1), None if real is None else real.unsqueeze(-1), dtype)
    decay = None if g is None else g.exp()
    if layout is not None:
        kept = (layout.continues | ~real).to(dtype)[:, :, None, None]
        kept[:, 0] = 1
        decay = kept.expand(*beta.shape, 1) if decay is None else decay * kept
        k = k * real[:, :, None, None]
    q, k, values, beta = _by_state(q.to(dtype) * scale, beta), k.to(dtype), v.to(dtype), beta.to(dtype)
    S = k.new_zeros(k.shape[0], *k.shape[2:], v.shape[-1]) if state is None else state.to(dtype)
    inputs = [x for x in (q, k, values, beta, decay, S) if x is not None]
    in_place = not (torch.is_grad_enabled() and any(x.requires_grad for x in inputs))
    S = writable(S) if in_place else S
    outputs = []
    for t in range(q.shape[1]):
        if decay is not None:
            S = S.mul_(decay[:, t].unsqueeze(-1)) if in_place else S * decay[:, t].unsqueeze(-1)
        key = k[:, t].unsqueeze(-1)
        wrong = values[:, t].unsqueeze(-2) - key.mT @ S
        key = key * beta[:, t, :, None, None]
        S = S.addcmul_(key, wrong) if in_place else S + key * wrong
        outputs.append(q[:, t] @ S)
    return torch.stack(outputs, dim=1).flatten(2, 3).to(v.dtype), S


def _by_state(q: Tensor, beta: Tensor) -> Tensor:
    """q [B,T,H,K] -> [B,T,N,H/N,K]: what reads each of the N states of β [B,T,N]."""
    return q.unflatten(2, (beta.shape[2], -1))
