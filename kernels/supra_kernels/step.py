"""Decoding: a few tokens at a time against a state that is updated in place."""

from __future__ import annotations

import torch
from torch import Tensor

from supra_kernels.boundaries import compute_dtype, decoded, log_decay, writable


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    scale: float = 1.0,
    state: Tensor | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S ← exp(g) S + k v^T,   o = scale · q^T S, once per token.

    Without gradients `state` is consumed: it is overwritten and returned. With gradients it is left alone.
    """
    batch, length, heads, key_dim = q.shape
    kv_heads, v_dim = v.shape[2:]
    dtype = compute_dtype(q, k, v)
    split = (batch, kv_heads, heads // kv_heads)
    layout = None if documents is None else decoded(documents)
    g = log_decay(g, None if layout is None else layout.real, dtype)
    decay = None if g is None else g.exp().expand(batch, length, heads)
    if layout is not None:
        kept = (layout.continues | ~layout.real).to(dtype).unsqueeze(-1)
        kept[:, 0] = 1
        decay = kept.expand(batch, length, heads) if decay is None else decay * kept
        k = k * layout.real[:, :, None, None]
    q, k, values = q.to(dtype) * scale, k.to(dtype), v.to(dtype)
    S = q.new_zeros(*split, key_dim, v_dim) if state is None else state.to(dtype).view(*split, key_dim, v_dim)
    inputs = [x for x in (q, k, values, g, S) if x is not None]
    in_place = not (torch.is_grad_enabled() and any(x.requires_grad for x in inputs))
    S = writable(S) if in_place else S

    outputs = []
    for t in range(length):
        new_key, new_value = k[:, t, :, None, :, None], values[:, t, :, None, None, :]
        if decay is not None:
            b_decay = decay[:, t].view(*split, 1, 1)
            S = S.mul_(b_decay) if in_place else S * b_decay
        S = S.addcmul_(new_key, new_value) if in_place else S + new_key * new_value
        outputs.append((q[:, t].view(*split, 1, key_dim) @ S).view(batch, heads, v_dim))
    o = outputs[0].unsqueeze(1) if length == 1 else torch.stack(outputs, dim=1)
    return o.to(v.dtype), S.view(batch, heads, key_dim, v_dim)
