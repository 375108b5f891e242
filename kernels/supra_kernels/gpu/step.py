"""S ← exp(g) S + k v^T,   o = scale · q^T S: one token per sequence, the state updated where it lies.

With a denominator   z ← exp(g) z + k,   o / max(scale · q·z, least). Before, q and k may go through a ReLU and turn by
their positions.
"""

import triton
import triton.language as tl

from supra_kernels.gpu.rotary import load_turned
from supra_kernels.gpu.tiles import FIXED_DECAY, TOKEN_DECAY


@triton.jit(do_not_specialize=("t", "T"))
def step_kernel(
    p_q, p_k, p_v, p_g, p_state, p_o, p_d, p_cos, p_sin, R, STRIDE,
    t, T, H, G, scale, least,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, NORM: tl.constexpr,
    SUMS: tl.constexpr, ROTARY: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """Token t of T. One program: BV columns of one head's state [B,H,K,V], fp32, BK rows after BK rows. Where K > BK
    the next rows are on their way while these are worked on.

    With NORM or SUMS, BV covers V. NORM normalises o as query_side_kernel does. With SUMS the state is [B,H,K,V+1], z
    its last column, and d [B,T,H] is stored. ROTARY and RELU as in load_turned, with R and STRIDE as in rotary_kernel.
    No dot: K · BV multiplications are bound by memory.
    """
    W = V + 1 if SUMS else V
    tiles_v = tl.cdiv(V, BV)
    pid = tl.program_id(0)
    i_bh = (pid // tiles_v).to(tl.int64)
    i_b, i_h = i_bh // H, (i_bh % H).to(tl.int32)
    row = i_b * T + t
    row_h, row_g, o_table = row * H + i_h, row * G + i_h // (H // G), i_b * STRIDE + t * R
    o_v = pid % tiles_v * BV + tl.arange(0, BV)
    m_v = o_v < V
    decay = 1.0
    if DECAY == FIXED_DECAY:
        decay = tl.exp(tl.load(p_g + i_h))
    elif DECAY == TOKEN_DECAY:
        decay = tl.exp(tl.load(p_g + row_h))
    b_v = tl.load(p_v + row_g * V + o_v, mask=m_v, other=0.0).to(tl.float32)
    p_state += i_bh * K * W
    b_o, b_d = tl.zeros([BV], tl.float32), tl.zeros([BK], tl.float32)
    for i_k in tl.range(0, K, BK, num_stages=3):
        o_k = i_k + tl.arange(0, BK)
        m_k = o_k < K
        o_S, m_S = o_k[:, None] * W + o_v[None, :], m_k[:, None] & m_v[None, :]
        b_S = tl.load(p_state + o_S, mask=m_S, other=0.0)
        b_q = load_turned(p_q, row_h * K + o_k, m_k, o_k, p_cos, p_sin, o_table, R, ROTARY, RELU, TRANSPOSED=False)
        b_k = load_turned(p_k, row_g * K + o_k, m_k, o_k, p_cos, p_sin, o_table, R, ROTARY, RELU, TRANSPOSED=False)
        b_S = b_S * decay + b_k[:, None] * b_v[None, :]
        tl.store(p_state + o_S, b_S, mask=m_S)
        b_o += tl.sum(b_q[:, None] * b_S, 0)
        if SUMS:
            b_z = tl.load(p_state + o_k * W + V, mask=m_k, other=0.0) * decay + b_k
            tl.store(p_state + o_k * W + V, b_z, mask=m_k)
            b_d += b_q * b_z
    b_o *= scale
    if NORM:
        centred = tl.where(m_v, b_o - tl.sum(b_o, 0) / V, 0.0)
        b_o = centred * (1.0 / tl.sqrt(tl.sum(centred * centred, 0) / V + least))
    if SUMS:
        d = tl.sum(b_d, 0) * scale
        tl.store(p_d + row_h, d)
        b_o /= tl.maximum(d, least)
    tl.store(p_o + row_h * V + o_v, b_o.to(p_o.dtype.element_ty), mask=m_v)
