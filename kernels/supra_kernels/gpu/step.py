"""S ← exp(g) S + k v^T,   o = scale · q^T S: one token per sequence, the state updated where it lies.

With a denominator   z ← exp(g) z + k,   o / max(scale · q·z, least). Before, q and k may go through a ReLU and turn by
their positions.
"""

import triton
import triton.language as tl

from supra_kernels.gpu.rotary import load_turned
from supra_kernels.gpu.tiles import FIXED_DECAY, TOKEN_DECAY


@triton.jit
def step_kernel(
    p_q, p_k, p_v, p_g, p_state, p_o, p_cos, p_sin, R, STRIDE,
    T, H, G, K, V, scale, least,
    BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, NORM: tl.constexpr, SUMS: tl.constexpr,
    ROTARY: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """One program: BV columns of one head's state [B,H,K,V], fp32, for the T tokens one after the other.

    With NORM or SUMS, BV covers V. NORM normalises o as output_kernel does. With SUMS the state is [B,H,K,V+1], z its
    last column. ROTARY and RELU as in load_turned, with R and STRIDE as in rotary_kernel. No dot: K · BV
    multiplications are bound by memory.
    """
    W = V + 1 if SUMS else V
    tiles_v = tl.cdiv(V, BV)
    pid = tl.program_id(0).to(tl.int64)
    i_bh = pid // tiles_v
    i_b, i_h = i_bh // H, i_bh % H
    i_g = i_h // (H // G)
    o_k, o_v = tl.arange(0, BK), pid % tiles_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    o_S = i_bh * K * W + o_k[:, None] * W + o_v[None, :]
    o_z = (i_bh * K + o_k) * W + V
    m_S = m_k[:, None] & m_v[None, :]
    b_S = tl.load(p_state + o_S, mask=m_S, other=0.0)
    b_z = tl.zeros([BK], tl.float32)
    if SUMS:
        b_z += tl.load(p_state + o_z, mask=m_k, other=0.0)
    for t in range(T):
        row = i_b * T + t
        o_q, o_key, o_table = (row * H + i_h) * K + o_k, (row * G + i_g) * K + o_k, i_b * STRIDE + t * R
        b_q = load_turned(p_q, o_q, m_k, o_k, p_cos, p_sin, o_table, R, ROTARY, RELU, TRANSPOSED=False)
        b_k = load_turned(p_k, o_key, m_k, o_k, p_cos, p_sin, o_table, R, ROTARY, RELU, TRANSPOSED=False)
        b_v = tl.load(p_v + (row * G + i_g) * V + o_v, mask=m_v, other=0.0).to(tl.float32)
        decay = 1.0
        if DECAY == FIXED_DECAY:
            decay = tl.exp(tl.load(p_g + i_h))
        elif DECAY == TOKEN_DECAY:
            decay = tl.exp(tl.load(p_g + row * H + i_h))
        b_S = b_S * decay + b_k[:, None] * b_v[None, :]
        b_o = tl.sum(b_q[:, None] * b_S, 0) * scale
        if NORM:
            centred = tl.where(m_v, b_o - tl.sum(b_o, 0) / V, 0.0)
            b_o = centred * (1.0 / tl.sqrt(tl.sum(centred * centred, 0) / V + least))
        if SUMS:
            b_z = b_z * decay + b_k
            b_o /= tl.maximum(tl.sum(b_q * b_z, 0) * scale, least)
        tl.store(p_o + (row * H + i_h) * V + o_v, b_o.to(p_o.dtype.element_ty), mask=m_v)
    tl.store(p_state + o_S, b_S, mask=m_S)
    if SUMS:
        tl.store(p_state + o_z, b_z, mask=m_k)
