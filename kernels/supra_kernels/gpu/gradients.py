"""Gradients of one chunk from the state S before it and the gradient dS' of the state after it.

With W_ij = exp(b_i - b_j) [j≤i], D = W∘(do v^T), P = W∘(q k^T):
    dq_i = scale · ( Σ_j D_ij k_j + exp(b_i) S do_i )
    dk_j = scale · Σ_i D_ij q_i + exp(b_C - b_j) dS' v_j             summed over the query heads of a kv head
    dv_j = scale · Σ_i P_ij do_i + exp(b_C - b_j) dS'^T k_j          likewise
    dg_t = scale · Σ_{j<t≤i} P_ij (do_i·v_j) + scale · Σ_{i≥t} exp(b_i) q_i^T S do_i
         + Σ_{j<t} exp(b_C - b_j) k_j^T dS' v_j + exp(b_C) <S, dS'>
With a denominator, whose gradient is dd_i: D gains W∘dd_i, dq_i scale · exp(b_i) dd_i z, dk_j exp(b_C - b_j) dz'; in
dg_t, do_i·v_j gains dd_i, and S and dS' their columns z and dz'.
A program owns what it writes: no atomics. A transposed product is its own tl.dot, never tl.trans of one.
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
    load_rows,
    load_sums,
    state_offsets,
    store_rows,
)


@triton.jit
def query_key_kernel(
    p_q, p_k, p_v, p_do, p_dd, p_g, p_code, p_states, p_z, p_d_states, p_dz, p_dq, p_dk,
    T, N, H, G, K, V, scale,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, PACKED: tl.constexpr, SUMS: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq and dk. One program: one chunk of one kv head, BK columns, all its query heads one after the other."""
    tiles_k = tl.cdiv(K, BK)
    pid = tl.program_id(0).to(tl.int64)
    i_k, n, i_bg = pid % tiles_k * BK, pid // tiles_k % N, pid // tiles_k // N
    i_b, i_g = i_bg // G, i_bg % G
    start = n * C
    number, real, entering, last = load_documents(p_code, i_b, start, T, C, PACKED)
    b_k = load_rows(p_k, i_b, i_g, start, T, G, K, i_k, C, BK, OPERAND)
    b_dk = tl.zeros([C, BK], tl.float32)
    for i_h in range(i_g * (H // G), (i_g + 1) * (H // G)):
        rate, count, rest, all_count, all_rest = load_decay(p_g, i_b, i_h, start, T, H, real, C, DECAY)
        from_start, to_end, _ = edge_weights(rate, count, rest, all_count, all_rest, number, real, entering, last)
        b_D, b_Dt = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
        b_dq, b_out = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
        for i_v in range(0, V, BV):
            b_do = load_rows(p_do, i_b, i_h, start, T, H, V, i_v, C, BV, OPERAND)
            b_do_t = load_columns(p_do, i_b, i_h, start, T, H, V, i_v, C, BV, OPERAND)
            b_v = load_rows(p_v, i_b, i_g, start, T, G, V, i_v, C, BV, OPERAND)
            b_v_t = load_columns(p_v, i_b, i_g, start, T, G, V, i_v, C, BV, OPERAND)
            o_S, m_S = state_offsets((i_b * H + i_h) * N + n, K, V, V, i_k, i_v, BK, BV, True)
            b_S = tl.load(p_states + o_S, mask=m_S, other=0.0).to(OPERAND)
            b_dS = tl.load(p_d_states + o_S, mask=m_S, other=0.0).to(OPERAND)
            b_D += tl.dot(b_do, b_v_t, input_precision=PRECISION)
            b_Dt += tl.dot(b_v, b_do_t, input_precision=PRECISION)
            b_dq += tl.dot(b_do, b_S, input_precision=PRECISION)
            b_out += tl.dot(b_v, b_dS, input_precision=PRECISION)
        if SUMS:
            b_dd = load_numbers(p_dd, i_b, i_h, start, T, H, C)
            b_D += b_dd[:, None]
            b_Dt += b_dd[None, :]
            b_dq += b_dd[:, None] * load_sums(p_z, (i_b * H + i_h) * N + n, K, i_k, BK)[None, :]
            b_out += load_sums(p_dz, (i_b * H + i_h) * N + n, K, i_k, BK)[None, :]
        b_D = (b_D * inner_weights(rate, count, rest, number, real, C, False)).to(OPERAND)
        b_Dt = (b_Dt * inner_weights(rate, count, rest, number, real, C, True)).to(OPERAND)
        b_q = load_rows(p_q, i_b, i_h, start, T, H, K, i_k, C, BK, OPERAND)
        b_dq = b_dq * from_start[:, None] + tl.dot(b_D, b_k, input_precision=PRECISION)
        b_dk += b_out * to_end[:, None] + scale * tl.dot(b_Dt, b_q, input_precision=PRECISION)
        store_rows(p_dq, b_dq * scale, i_b, i_h, start, T, H, K, i_k, C, BK)
    store_rows(p_dk, b_dk, i_b, i_g, start, T, G, K, i_k, C, BK)


@triton.jit
def value_kernel(
    p_q, p_k, p_do, p_g, p_code, p_d_states, p_dv,
    T, N, H, G, K, V, scale,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, PACKED: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv. One program: one chunk of one kv head, BV columns, all its query heads one after the other."""
    tiles_v = tl.cdiv(V, BV)
    pid = tl.program_id(0).to(tl.int64)
    i_v, n, i_bg = pid % tiles_v * BV, pid // tiles_v % N, pid // tiles_v // N
    i_b, i_g = i_bg // G, i_bg % G
    start = n * C
    number, real, entering, last = load_documents(p_code, i_b, start, T, C, PACKED)
    b_dv = tl.zeros([C, BV], tl.float32)
    for i_h in range(i_g * (H // G), (i_g + 1) * (H // G)):
        rate, count, rest, all_count, all_rest = load_decay(p_g, i_b, i_h, start, T, H, real, C, DECAY)
        _, to_end, _ = edge_weights(rate, count, rest, all_count, all_rest, number, real, entering, last)
        b_P, b_out = tl.zeros([C, C], tl.float32), tl.zeros([C, BV], tl.float32)
        for i_k in range(0, K, BK):
            b_k = load_rows(p_k, i_b, i_g, start, T, G, K, i_k, C, BK, OPERAND)
            b_q = load_columns(p_q, i_b, i_h, start, T, H, K, i_k, C, BK, OPERAND)
            o_S, m_S = state_offsets((i_b * H + i_h) * N + n, K, V, V, i_k, i_v, BK, BV, False)
            b_dS = tl.load(p_d_states + o_S, mask=m_S, other=0.0).to(OPERAND)
            b_P += tl.dot(b_k, b_q, input_precision=PRECISION)
            b_out += tl.dot(b_k, b_dS, input_precision=PRECISION)
        b_P = (b_P * inner_weights(rate, count, rest, number, real, C, True)).to(OPERAND)
        b_do = load_rows(p_do, i_b, i_h, start, T, H, V, i_v, C, BV, OPERAND)
        b_dv += b_out * to_end[:, None] + scale * tl.dot(b_P, b_do, input_precision=PRECISION)
    store_rows(p_dv, b_dv, i_b, i_g, start, T, G, V, i_v, C, BV)


@triton.jit
def decay_kernel(
    p_q, p_k, p_v, p_do, p_dd, p_g, p_code, p_states, p_z, p_d_states, p_dz, p_dg,
    T, N, H, G, K, V, scale,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, PACKED: tl.constexpr, SUMS: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dg [B,T,H], 0 on padding and where a document starts. One program: one chunk of one head.

    The diagonal of P∘(do v^T) touches no decay and is left out before any sum, so a tiny decay keeps its digits.
    """
    pid = tl.program_id(0).to(tl.int64)
    n, i_bh = pid % N, pid // N
    i_b, i_h = i_bh // H, i_bh % H
    i_g = i_h // (H // G)
    start = n * C
    number, real, entering, last = load_documents(p_code, i_b, start, T, C, PACKED)
    rate, count, rest, all_count, all_rest = load_decay(p_g, i_b, i_h, start, T, H, real, C, DECAY)
    from_start, to_end, through = edge_weights(rate, count, rest, all_count, all_rest, number, real, entering, last)

    scores, b_D = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    if SUMS:
        b_dd = load_numbers(p_dd, i_b, i_h, start, T, H, C)
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
            o_S, m_S = state_offsets(i_bh * N + n, K, V, V, i_k, i_v, BK, BV, False)
            b_S = tl.load(p_states + o_S, mask=m_S, other=0.0)
            b_dS = tl.load(p_d_states + o_S, mask=m_S, other=0.0)
            read += tl.sum(tl.dot(b_q, b_S.to(OPERAND), input_precision=PRECISION) * b_do, 1)
            written += tl.sum(tl.dot(b_k, b_dS.to(OPERAND), input_precision=PRECISION) * b_v, 1)
            carried += tl.sum(b_S.to(tl.float32) * b_dS.to(tl.float32))
        if SUMS:
            b_z, b_dz = load_sums(p_z, i_bh * N + n, K, i_k, BK), load_sums(p_dz, i_bh * N + n, K, i_k, BK)
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
