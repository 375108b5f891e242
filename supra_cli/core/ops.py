"""The operators that mixers are made of. `supra_kernels`, imported here alone, picks the form by device and length."""

from __future__ import annotations

import supra_kernels
from torch import Tensor

from supra_cli.core.layout import Layout


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    scale: float = 1.0,
    state: Tensor | None = None,
    layout: Layout | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = exp(g_t) S_{t-1} + k_t v_tᵀ,  o_t = scale · q_tᵀ S_t,  with S = 0 where a document starts and S kept over
    padding.

    q [B,T,H,K], k [B,T,G,K], v [B,T,G,V] with G dividing H; g is None, [H] or [B,T,H], a log decay ≤ 0; state
    [B,H,K,V] or None for zeros. Returns o [B,T,H,V] in v's dtype and the state after each row's last real token, in
    fp32.
    """
    segment = None if layout is None else layout.segment
    return supra_kernels.linear_attention(q, k, v, g, scale=scale, state=state, segment=segment)
