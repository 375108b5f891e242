"""What a query token has of a chunk, given the state S before it: the output o, and the gradient dq. Every chunk for
itself, and both by one kernel, since they are one formula. With W_ij = exp(b_i - b_j) [j≤i]:

    o_i  = scale · ( Σ_j W_ij (q_i·k_j) v_j  + exp(b_i) S^T q_i )
    dq_i = scale · ( Σ_j W_ij (do_i·v_j) k_j + exp(b_i) S do_i )

With a denominator   d_i = scale · ( Σ_j W_ij q_i·k_j + exp(b_i) q_i·z ),   o_i / max(d_i, least),
and in dq, dd_i being the gradient of d_i, do_i·v_j gains dd_i and S do_i gains dd_i z.
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
    store_rows,
)


@triton.jit
def query_side_kernel(
    p_x, p_y, p_u, p_dd, p_g, p_count, p_rest, p_code, p_states, p_z, p_out, p_row,
    T, N, H, G, scale, least,
    X: tl.constexpr, U: tl.constexpr, C: tl.constexpr, BX: tl.constexpr, BU: tl.constexpr,
    DECAY: tl.constexpr, PACKED: tl.constexpr, GRADIENT: tl.constexpr, NORM: tl.constexpr, SUMS: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one chunk of one head, BU columns of out [B,T,H,U].

    For o, x [B,T,H,X] is q, y [B,T,G,X] k, u [B,T,G,U] v, and states is [B,H,N,X,U]. For dq, with GRADIENT, x is do, y
    is v, u is k, and states is [B,H,N,U,X].
    With NORM, BU covers U and each row of o is normalised over its numbers, (o - mean) · inverse, inverse =
    1 / sqrt(variance + least); row [B,T,H] takes inverse. With SUMS, o is divided as above and row takes d.
    """
    tiles_u = tl.cdiv(U, BU)
    pid = tl.program_id(0)
    i_u, n, i_bh = pid % tiles_u * BU, pid // tiles_u % N, pid // tiles_u // N
    i_b, i_h = (i_bh // H).to(tl.int64), i_bh % H
    i_g = i_h // (H // G)
    i_state, start = i_bh.to(tl.int64) * N + n, n * C
    number, real, entering, last = load_documents(p_code, i_b, start, T, C, PACKED)
    rate = load_rate(p_g, i_h, DECAY)
    count, rest, all_count, all_rest = load_decay(p_count, p_rest, i_b, i_h, start, T, H, C, DECAY, PACKED)
    from_start, _, _ = edge_weights(rate, count, rest, all_count, all_rest, number, real, entering, last)

    scores = tl.zeros([C, C], tl.float32)
    b_out = tl.zeros([C, BU], tl.float32)
    b_d = tl.zeros([C], tl.float32)
    for i_x in range(0, X, BX):
        b_x = load_rows(p_x, i_b, i_h, start, T, H, X, i_x, C, BX, OPERAND)
        b_y = load_columns(p_y, i_b, i_g, start, T, G, X, i_x, C, BX, OPERAND)
        if GRADIENT:
            b_S = load_state(p_states, i_state, U, X, i_u, i_x, BU, BX, True, OPERAND)
        else:
            b_S = load_state(p_states, i_state, X, U, i_x, i_u, BX, BU, False, OPERAND)
        scores += tl.dot(b_x, b_y, input_precision=PRECISION)
        b_out += tl.dot(b_x, b_S, input_precision=PRECISION)
        if SUMS and not GRADIENT:
            b_d += tl.sum(b_x.to(tl.float32) * load_z(p_z, i_state, X, i_x, BX)[None, :], 1)
    if SUMS and GRADIENT:
        b_dd = load_numbers(p_dd, i_bh.to(tl.int64) * T + start, T - start, C)
        scores += b_dd[:, None]
        b_out += b_dd[:, None] * load_z(p_z, i_state, U, i_u, BU)[None, :]
    scores *= inner_weights(rate, count, rest, number, real, C, False)
    b_u = load_rows(p_u, i_b, i_g, start, T, G, U, i_u, C, BU, OPERAND)
    b_out = b_out * from_start[:, None] + tl.dot(scores.to(OPERAND), b_u, input_precision=PRECISION)
    b_out *= scale
    o_t = start + tl.arange(0, C)
    o_row = (i_b * T + o_t) * H + i_h
    if NORM:
        inside = (tl.arange(0, BU) < U)[None, :]
        centred = tl.where(inside, b_out - (tl.sum(b_out, 1) / U)[:, None], 0.0)
        inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / U + least)
        b_out = centred * inverse[:, None]
        tl.store(p_row + o_row, inverse, mask=o_t < T)
    if SUMS and not GRADIENT:
        b_d = (b_d * from_start + tl.sum(scores, 1)) * scale
        b_out /= tl.maximum(b_d, least)[:, None]
        if i_u == 0:
            tl.store(p_row + o_row, b_d, mask=o_t < T)
    store_rows(p_out, b_out, i_b, i_h, start, T, H, U, i_u, C, BU)
