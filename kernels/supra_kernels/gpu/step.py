"""S ← exp(g) S + k v^T,   o = scale · q^T S: one token per sequence, the state updated where it lies."""

import triton
import triton.language as tl

from supra_kernels.gpu.tiles import FIXED_DECAY, TOKEN_DECAY


@triton.jit
def step_kernel(
    p_q, p_k, p_v, p_g, p_state, p_o,
    T, H, G, K, V, scale, eps,
    BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """One program: BV columns of one head's state [B,H,K,V], fp32, for the T tokens one after the other.

    With NORM, BV covers V and o is normalised as in output_kernel. No dot: K · BV multiplications are bound by memory.
    """
    tiles_v = tl.cdiv(V, BV)
    pid = tl.program_id(0).to(tl.int64)
    i_bh = pid // tiles_v
    i_b, i_h = i_bh // H, i_bh % H
    i_g = i_h // (H // G)
    o_k, o_v = tl.arange(0, BK), pid % tiles_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    o_S = i_bh * K * V + o_k[:, None] * V + o_v[None, :]
    m_S = m_k[:, None] & m_v[None, :]
    b_S = tl.load(p_state + o_S, mask=m_S, other=0.0)
    for t in range(T):
        row = i_b * T + t
        b_q = tl.load(p_q + (row * H + i_h) * K + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_k = tl.load(p_k + (row * G + i_g) * K + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_v = tl.load(p_v + (row * G + i_g) * V + o_v, mask=m_v, other=0.0).to(tl.float32)
        if DECAY == FIXED_DECAY:
            b_S *= tl.exp(tl.load(p_g + i_h))
        elif DECAY == TOKEN_DECAY:
            b_S *= tl.exp(tl.load(p_g + row * H + i_h))
        b_S += b_k[:, None] * b_v[None, :]
        b_o = tl.sum(b_q[:, None] * b_S, 0) * scale
        if NORM:
            centred = tl.where(m_v, b_o - tl.sum(b_o, 0) / V, 0.0)
            b_o = centred * (1.0 / tl.sqrt(tl.sum(centred * centred, 0) / V + eps))
        tl.store(p_o + (row * H + i_h) * V + o_v, b_o.to(p_o.dtype.element_ty), mask=m_v)
    tl.store(p_state + o_S, b_S, mask=m_S)
