"""What a key token is given by a chunk, dS' being the gradient of the state after it: dv and dk. Every chunk for
itself, and both by one kernel, since they are one formula. With W_ij = exp(b_i - b_j) [j≤i], and summed over the query
heads of a kv head:

    dv_j = scale · Σ_i W_ij (q_i·k_j) do_i + exp(b_C - b_j) dS'^T k_j
    dk_j = scale · Σ_i W_ij (do_i·v_j) q_i + exp(b_C - b_j) dS' v_j

With a denominator, whose gradient is dd_i, do_i·v_j gains dd_i and dS' v_j gains dz'.
A program owns what it writes: no atomics.
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
def key_side_kernel(
    p_x, p_y, p_u, p_dd, p_g, p_count, p_rest, p_code, p_d_states, p_dz, p_out,
    T, N, H, scale,
    X: tl.constexpr, U: tl.constexpr, C: tl.constexpr, BX: tl.constexpr, BU: tl.constexpr, GROUP: tl.constexpr,
    DECAY: tl.constexpr, PACKED: tl.constexpr, TRANSPOSED: tl.constexpr, SUMS: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one chunk of one kv head, BU columns of out [B,T,G,U], all its query heads one after the other.

    For dv, x [B,T,H,X] is q, y [B,T,G,X] k, u [B,T,H,U] do, and d_states is [B,H,N,X,U]. For dk, with TRANSPOSED and
    where there is a denominator with SUMS, x is do, y is v, u is q, and d_states is [B,H,N,U,X].
    """
    G = H // GROUP
    tiles_u = tl.cdiv(U, BU)
    pid = tl.program_id(0)
    i_u, n, i_bg = pid % tiles_u * BU, pid // tiles_u % N, pid // tiles_u // N
    i_b, i_g = (i_bg // G).to(tl.int64), i_bg % G
    start = n * C
    number, real, entering, last = load_documents(p_code, i_b, start, T, C, PACKED)
    b_out = tl.zeros([C, BU], tl.float32)
    # What no head changes, masks and places of [C, C] and [C, BU], would take half of the registers if kept; and not
    # this loop is to be pipelined but the one inside, also where that runs once.
    for head in tl.range(0, GROUP, num_stages=1, disable_licm=True):
        i_h = i_g * GROUP + head
        i_state = (i_b * H + i_h) * N + n
        rate = load_rate(p_g, i_h, DECAY)
        count, rest, all_count, all_rest = load_decay(p_count, p_rest, i_b, i_h, start, T, H, C, DECAY, PACKED)
        _, to_end, _ = edge_weights(rate, count, rest, all_count, all_rest, number, real, entering, last)
        scores = tl.zeros([C, C], tl.float32)
        b_end = tl.zeros([C, BU], tl.float32)
        for i_x in range(0, X, BX):
            b_y = load_rows(p_y, i_b, i_g, start, T, G, X, i_x, C, BX, OPERAND)
            b_x = load_columns(p_x, i_b, i_h, start, T, H, X, i_x, C, BX, OPERAND)
            if TRANSPOSED:
                b_dS = load_state(p_d_states, i_state, U, X, i_u, i_x, BU, BX, True, OPERAND)
            else:
                b_dS = load_state(p_d_states, i_state, X, U, i_x, i_u, BX, BU, False, OPERAND)
            scores += tl.dot(b_y, b_x, input_precision=PRECISION)
            b_end += tl.dot(b_y, b_dS, input_precision=PRECISION)
        if SUMS:
            scores += load_numbers(p_dd, (i_b * H + i_h) * T + start, T - start, C)[None, :]
            b_end += load_z(p_dz, i_state, U, i_u, BU)[None, :]
        scores *= inner_weights(rate, count, rest, number, real, C, True) * scale
        b_u = load_rows(p_u, i_b, i_h, start, T, H, U, i_u, C, BU, OPERAND)
        b_out += b_end * to_end[:, None]
        b_out += tl.dot(scores.to(OPERAND), b_u, input_precision=PRECISION)
    store_rows(p_out, b_out, i_b, i_g, start, T, G, U, i_u, C, BU)
