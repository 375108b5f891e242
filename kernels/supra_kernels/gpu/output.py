"""o_i = scale · ( Σ_{j≤i} exp(b_i - b_j) (q_i·k_j) v_j + exp(b_i) q_i^T S ), every chunk for itself.

With a denominator   d_i = scale · ( Σ_{j≤i} exp(b_i - b_j) q_i·k_j + exp(b_i) q_i·z ),   o_i / max(d_i, least).
"""

import triton
import triton.language as tl

from supra_kernels.gpu.tiles import (
    edge_weights,
    inner_weights,
    load_columns,
    load_decay,
    load_documents,
    load_rows,
    load_sums,
    state_offsets,
    store_rows,
)


@triton.jit
def output_kernel(
    p_q, p_k, p_v, p_g, p_code, p_states, p_z, p_o, p_row,
    T, N, H, G, K, V, scale, least,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, PACKED: tl.constexpr,
    NORM: tl.constexpr, SUMS: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one chunk of one head, BV columns of o. With NORM, BV covers V and each row of o is normalised over
    the V numbers of a head, (o - mean) · inverse, inverse = 1 / sqrt(variance + least); row [B,T,H] takes inverse. With
    SUMS, o is divided as above and row takes d.
    """
    tiles_v = tl.cdiv(V, BV)
    pid = tl.program_id(0).to(tl.int64)
    i_v, n, i_bh = pid % tiles_v * BV, pid // tiles_v % N, pid // tiles_v // N
    i_b, i_h = i_bh // H, i_bh % H
    i_g = i_h // (H // G)
    start = n * C
    number, real, entering, last = load_documents(p_code, i_b, start, T, C, PACKED)
    rate, count, rest, all_count, all_rest = load_decay(p_g, i_b, i_h, start, T, H, real, C, DECAY)
    from_start, _, _ = edge_weights(rate, count, rest, all_count, all_rest, number, real, entering, last)

    scores = tl.zeros([C, C], tl.float32)
    b_o = tl.zeros([C, BV], tl.float32)
    b_d = tl.zeros([C], tl.float32)
    for i_k in range(0, K, BK):
        b_q = load_rows(p_q, i_b, i_h, start, T, H, K, i_k, C, BK, OPERAND)
        b_k = load_columns(p_k, i_b, i_g, start, T, G, K, i_k, C, BK, OPERAND)
        o_S, m_S = state_offsets(i_bh * N + n, K, V, V, i_k, i_v, BK, BV, False)
        b_S = tl.load(p_states + o_S, mask=m_S, other=0.0).to(OPERAND)
        scores += tl.dot(b_q, b_k, input_precision=PRECISION)
        b_o += tl.dot(b_q, b_S, input_precision=PRECISION)
        if SUMS:
            b_d += tl.sum(b_q.to(tl.float32) * load_sums(p_z, i_bh * N + n, K, i_k, BK)[None, :], 1)
    scores *= inner_weights(rate, count, rest, number, real, C, False)
    b_v = load_rows(p_v, i_b, i_g, start, T, G, V, i_v, C, BV, OPERAND)
    b_o = b_o * from_start[:, None] + tl.dot(scores.to(OPERAND), b_v, input_precision=PRECISION)
    b_o *= scale
    o_t = start + tl.arange(0, C)
    o_row = (i_b * T + o_t) * H + i_h
    if NORM:
        inside = (tl.arange(0, BV) < V)[None, :]
        centred = tl.where(inside, b_o - (tl.sum(b_o, 1) / V)[:, None], 0.0)
        inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / V + least)
        b_o = centred * inverse[:, None]
        tl.store(p_row + o_row, inverse, mask=o_t < T)
    if SUMS:
        b_d = (b_d * from_start + tl.sum(scores, 1)) * scale
        b_o /= tl.maximum(b_d, least)[:, None]
        if i_v == 0:
            tl.store(p_row + o_row, b_d, mask=o_t < T)
    store_rows(p_o, b_o, i_b, i_h, start, T, H, V, i_v, C, BV)
