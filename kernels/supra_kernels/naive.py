"""The recurrence, token by token: the specification every other form is held against. float64 in, float64 out."""

from __future__ import annotations

import torch
from torch import Tensor

from supra_kernels.boundaries import compute_dtype


def naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    scale: float = 1.0,
    state: Tensor | None = None,
    segment: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T,   o_t = scale · q_t^T S_t.   As `linear_attention`; backward by autograd."""
    batch, length, heads, key_dim = q.shape
    dtype = compute_dtype(q, k, v)
    group = heads // k.shape[2]
    q, k, v_ = q.to(dtype), k.to(dtype).repeat_interleave(group, 2), v.to(dtype).repeat_interleave(group, 2)
    decay = torch.ones(batch, length, heads, dtype=dtype, device=q.device)
    if g is not None:
        decay = decay * g.to(dtype).exp()
    S = q.new_zeros(batch, heads, key_dim, v.shape[-1]) if state is None else state.to(dtype)
    document = torch.full((batch,), -1, device=q.device)  # of the row's last real token so far; -1: none yet

    outputs = []
    for t in range(length):
        after = decay[:, t, :, None, None] * S + k[:, t, :, :, None] * v_[:, t, :, None, :]
        if segment is not None:
            here = segment[:, t]
            starts = (here >= 0) & (document >= 0) & (here != document)
            fresh = k[:, t, :, :, None] * v_[:, t, :, None, :]
            after = torch.where(starts[:, None, None, None], fresh, after)
            after = torch.where((here >= 0)[:, None, None, None], after, S)
            document = torch.where(here >= 0, here, document)
        S = after
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    return torch.stack(outputs, dim=1).to(v.dtype), S
