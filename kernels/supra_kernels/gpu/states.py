"""States before every chunk, and the gradients of the states after them: one kernel, walked forwards or backwards.

Forwards   S_{n+1} = exp(b_C) S_n + Σ_j exp(b_C - b_j) k_j v_j^T          stored: S_n
Backwards  dS_n    = exp(b_C) dS_{n+1} + scale · Σ_i exp(b_i) q_i do_i^T  stored: dS_{n+1}
The sums z of the denominator are one more column: in place of v_j 1, in place of do_i the number dd_i.
"""

import triton
import triton.language as tl

from supra_kernels.gpu.tiles import (
    edge_weights,
    load_columns,
    load_decay,
    load_documents,
    load_numbers,
    load_rate,
    load_rows,
    state_offsets,
)


@triton.jit
def states_kernel(
    p_x, p_y, p_dd, p_g, p_count, p_rest, p_code, p_initial, p_states, p_z, p_end, p_through,
    T, N, SPAN, SPANS, H, XH, YH, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, PACKED: tl.constexpr, SUMS: tl.constexpr, REVERSE: tl.constexpr, STORE: tl.constexpr,
    INITIAL: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program walks the SPAN chunks of one span, for one tile of one head's state.

    x is k or q [B,T,XH,K], y is v or do [B,T,YH,V]; initial, end [B,H,SPANS,K,V], through [B,H,SPANS], states
    [B,H,N,K,V]. With SUMS, initial and end have one column more, z, and what the walk meets of it goes to z [B,H,N,K];
    dd [B,H,T] is read backwards.
    """
    W = V + 1 if SUMS else V
    tiles_k, tiles_v = tl.cdiv(K, BK), tl.cdiv(V, BV)
    pid = tl.program_id(0)
    i_k, i_v = pid % tiles_k * BK, pid // tiles_k % tiles_v * BV
    i_end = pid // (tiles_k * tiles_v)
    i_span, i_bh = i_end % SPANS, (i_end // SPANS).to(tl.int64)
    i_b, i_h = i_bh // H, (i_bh % H).to(tl.int32)
    first, stop = i_span * SPAN, tl.minimum((i_span + 1) * SPAN, N)

    b_S = tl.zeros([BK, BV], tl.float32)
    b_z = tl.zeros([BK], tl.float32)
    whole = 1.0
    o_k = i_k + tl.arange(0, BK)
    o_end, m_S = state_offsets(K, V, W, i_k, i_v, BK, BV, False)
    o_S, _ = state_offsets(K, V, V, i_k, i_v, BK, BV, False)
    o_z = o_k * W + V
    p_end += i_end.to(tl.int64) * K * W
    if INITIAL:
        p_initial += i_end.to(tl.int64) * K * W
        b_S += tl.load(p_initial + o_end, mask=m_S, other=0.0)
        if SUMS:
            b_z += tl.load(p_initial + o_z, mask=o_k < K, other=0.0)
    rate = load_rate(p_g, i_h, DECAY)
    for step in range(stop - first):
        n = stop - 1 - step if REVERSE else first + step
        start = n * C
        if STORE:
            tl.store(p_states + (i_bh * N + n) * K * V + o_S, b_S.to(p_states.dtype.element_ty), mask=m_S)
            if SUMS:  # noqa: SIM102 (without sums there is no z to name)
                if i_v == 0:
                    tl.store(p_z + (i_bh * N + n) * K + o_k, b_z, mask=o_k < K)
        number, real, entering, last = load_documents(p_code, i_b, start, T, C, PACKED)
        count, rest, all_count, all_rest = load_decay(p_count, p_rest, i_b, i_h, start, T, H, C, DECAY, PACKED)
        from_start, to_end, through = edge_weights(rate, count, rest, all_count, all_rest, number, real, entering, last)
        weight = from_start * scale if REVERSE else to_end
        b_x = load_columns(p_x, i_b, i_h // (H // XH), start, T, XH, K, i_k, C, BK, OPERAND)
        b_y = load_rows(p_y, i_b, i_h // (H // YH), start, T, YH, V, i_v, C, BV, tl.float32)
        b_y = (b_y * weight[:, None]).to(OPERAND)
        b_S = b_S * through + tl.dot(b_x, b_y, input_precision=PRECISION)
        if SUMS:
            if REVERSE:
                weight *= load_numbers(p_dd, i_bh * T + start, T - start, C)
            b_z = b_z * through + tl.sum(b_x.to(tl.float32) * weight[None, :], 1)
        whole *= through
    tl.store(p_end + o_end, b_S, mask=m_S)
    if SUMS:  # noqa: SIM102
        if i_v == 0:
            tl.store(p_end + o_z, b_z, mask=o_k < K)
    if (i_k == 0) & (i_v == 0):
        tl.store(p_through + i_end, whole)
