"""Gradient of a log decay, from the state S before a chunk and the gradient dS' of the state after it.

With P_ij = exp(b_i - b_j) (q_i·k_j) [j≤i]:

    dg_t = scale · Σ_{j<t≤i} P_ij (do_i·v_j) + scale · Σ_{i≥t} exp(b_i) q_i^T S do_i
         + Σ_{j<t} exp(b_C - b_j) k_j^T dS' v_j + exp(b_C) <S, dS'>

With a denominator, whose gradient is dd_i, do_i·v_j gains dd_i, and S and dS' their columns z and dz'.
"""

import triton
import triton.language as tl

from supra_kernels.gpu.tiles import (
    edge_weights,
    inner_weights,
    load_columns,
    load_decay,
    load_documents,
    load_numbers,
    load_rate,
    load_rows,
    load_state,
    load_z,
)


@triton.jit
def decay_kernel(
    p_q, p_k, p_v, p_do, p_dd, p_g, p_count, p_rest, p_code, p_states, p_z, p_d_states, p_dz, p_dg,
    T, N, H, G, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, PACKED: tl.constexpr, SUMS: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dg [B,T,H], 0 on padding and where a document starts. One program: one chunk of one head.

    The diagonal of P∘(do v^T) touches no decay and is left out before any sum, so a tiny decay keeps its digits.
    """
    pid = tl.program_id(0)
    n, i_bh = pid % N, (pid // N).to(tl.int64)
    i_b, i_h = i_bh // H, (i_bh % H).to(tl.int32)
    i_g = i_h // (H // G)
    i_state, start = i_bh * N + n, n * C
    number, real, entering, last = load_documents(p_code, i_b, start, T, C, PACKED)
    rate = load_rate(p_g, i_h, DECAY)
    count, rest, all_count, all_rest = load_decay(p_count, p_rest, i_b, i_h, start, T, H, C, DECAY, PACKED)
    from_start, to_end, through = edge_weights(rate, count, rest, all_count, all_rest, number, real, entering, last)

    scores, b_D = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    if SUMS:
        b_dd = load_numbers(p_dd, i_bh * T + start, T - start, C)
        b_D += b_dd[:, None]
    read, written, carried = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32), 0.0
    for i_k in range(0, K, BK):
        b_q = load_rows(p_q, i_b, i_h, start, T, H, K, i_k, C, BK, OPERAND)
        b_k = load_rows(p_k, i_b, i_g, start, T, G, K, i_k, C, BK, OPERAND)
        b_k_t = load_columns(p_k, i_b, i_g, start, T, G, K, i_k, C, BK, OPERAND)
        scores += tl.dot(b_q, b_k_t, input_precision=PRECISION)
        for i_v in range(0, V, BV):
            b_do = load_rows(p_do, i_b, i_h, start, T, H, V, i_v, C, BV, OPERAND)
            b_v = load_rows(p_v, i_b, i_g, start, T, G, V, i_v, C, BV, OPERAND)
            b_S = load_state(p_states, i_state, K, V, i_k, i_v, BK, BV, False, OPERAND)
            b_dS = load_state(p_d_states, i_state, K, V, i_k, i_v, BK, BV, False, OPERAND)
            read += tl.sum(tl.dot(b_q, b_S, input_precision=PRECISION) * b_do, 1)
            written += tl.sum(tl.dot(b_k, b_dS, input_precision=PRECISION) * b_v, 1)
            carried += tl.sum(b_S.to(tl.float32) * b_dS.to(tl.float32))
        if SUMS:
            b_z, b_dz = load_z(p_z, i_state, K, i_k, BK), load_z(p_dz, i_state, K, i_k, BK)
            read += tl.sum(b_q.to(tl.float32) * b_z[None, :], 1) * b_dd
            written += tl.sum(b_k.to(tl.float32) * b_dz[None, :], 1)
            carried += tl.sum(b_z * b_dz)
    for i_v in range(0, V, BV):
        b_do = load_rows(p_do, i_b, i_h, start, T, H, V, i_v, C, BV, OPERAND)
        b_v_t = load_columns(p_v, i_b, i_g, start, T, G, V, i_v, C, BV, OPERAND)
        b_D += tl.dot(b_do, b_v_t, input_precision=PRECISION)

    o_c = tl.arange(0, C)
    pairs = scores * b_D * inner_weights(rate, count, rest, number, real, C, False)
    pairs = tl.where(o_c[:, None] == o_c[None, :], 0.0, pairs)
    inward, outward = tl.sum(pairs, 1), tl.sum(pairs, 0)
    read, written = read * from_start * scale, written * to_end
    later = tl.where(o_c[None, :] >= o_c[:, None], (scale * inward + read)[None, :], 0.0)
    gone = tl.where(o_c[None, :] >= o_c[:, None], (scale * outward)[None, :], 0.0)
    earlier = tl.where(o_c[None, :] < o_c[:, None], written[None, :], 0.0)
    b_dg = tl.sum(later - gone + earlier, 1) + through * carried

    o_t = start + o_c
    if PACKED:
        code = tl.load(p_code + i_b * T + tl.maximum(o_t - 1, 0), mask=o_t < T, other=0)
        b_dg = tl.where(real & ((code >> 1) == number), b_dg, 0.0)
    tl.store(p_dg + (i_b * T + o_t) * H + i_h, b_dg, mask=o_t < T)
