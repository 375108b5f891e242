"""Gradient of what ends query_side_kernel: the norm over a head's V numbers, or the division by the sum of weights.

Norm      y = (o - mean(o)) · r, r = 1 / sqrt(variance + eps):   do = r · (dy - mean(dy) - y · mean(dy∘y))
Division  y = o / D, D = max(d, least):                          do = dy / D,   dd = -[d ≥ least] (dy·y) / D
"""

import triton
import triton.language as tl


@triton.jit
def finish_backward_kernel(
    p_dy, p_y, p_row, p_do, p_dd, T, H, ROWS, least,
    V: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """dy, y [B,T,H,V] and row [B,T,H], which is r or d, to do and, without NORM, dd [B,H,T]. One program: BR of the
    ROWS = B · T · H rows, each whole."""
    first = tl.program_id(0).to(tl.int64) * BR
    o_r, o_v = first + tl.arange(0, BR), tl.arange(0, BV)
    m_r, m_v = o_r < ROWS, (o_v < V)[None, :]
    o_x, mask = tl.arange(0, BR)[:, None] * V + o_v[None, :], m_r[:, None] & m_v
    b_dy = tl.load(p_dy + first * V + o_x, mask=mask, other=0.0).to(tl.float32)
    b_y = tl.load(p_y + first * V + o_x, mask=mask, other=0.0).to(tl.float32)
    b_row = tl.load(p_row + o_r, mask=m_r, other=1.0)
    along = tl.sum(b_dy * b_y, 1)
    if NORM:
        b_do = b_row[:, None] * (b_dy - (tl.sum(b_dy, 1) / V)[:, None] - b_y * (along / V)[:, None])
    else:
        inverse = 1.0 / tl.maximum(b_row, least)
        b_do = b_dy * inverse[:, None]
        o_bt, o_h = o_r // H, o_r % H
        o_dd = (o_bt // T * H + o_h) * T + o_bt % T
        tl.store(p_dd + o_dd, tl.where(b_row >= least, -along * inverse, 0.0), mask=m_r)
    tl.store(p_do + first * V + o_x, b_do.to(p_do.dtype.element_ty), mask=mask)
