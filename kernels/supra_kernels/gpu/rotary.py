"""y₁ = x₁ cos₁ - x₂ sin₁,   y₂ = x₂ cos₂ + x₁ sin₂, with ₁ and ₂ the halves of a head.

Transposed, which is the gradient:   y₁ = x₁ cos₁ + x₂ sin₂,   y₂ = x₂ cos₂ - x₁ sin₁.
"""

import triton
import triton.language as tl


@triton.jit
def rotary_kernel(
    p_x, p_cos, p_sin, p_y,
    T, H, K, STRIDE,
    BH: tl.constexpr, BK: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """One program: BH heads of one token of x, y [B,T,H,K]. cos, sin [B,T,K] or, with STRIDE 0, [1,T,K]; K is even."""
    tiles_h = tl.cdiv(H, BH)
    pid = tl.program_id(0).to(tl.int64)
    i_bt, i_h = pid // tiles_h, pid % tiles_h * BH
    half = K // 2
    o_h, o_k = i_h + tl.arange(0, BH), tl.arange(0, BK)
    m_k = o_k < half
    o_table = i_bt // T * STRIDE + i_bt % T * K + o_k
    cos1 = tl.load(p_cos + o_table, mask=m_k, other=0.0).to(tl.float32)
    cos2 = tl.load(p_cos + o_table + half, mask=m_k, other=0.0).to(tl.float32)
    sin1 = tl.load(p_sin + o_table, mask=m_k, other=0.0).to(tl.float32)
    sin2 = tl.load(p_sin + o_table + half, mask=m_k, other=0.0).to(tl.float32)
    o_x = (i_bt * H + o_h)[:, None] * K + o_k[None, :]
    m_x = (o_h < H)[:, None] & m_k[None, :]
    x1 = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
    x2 = tl.load(p_x + o_x + half, mask=m_x, other=0.0).to(tl.float32)
    if TRANSPOSED:
        y1 = x1 * cos1[None, :] + x2 * sin2[None, :]
        y2 = x2 * cos2[None, :] - x1 * sin1[None, :]
    else:
        y1 = x1 * cos1[None, :] - x2 * sin1[None, :]
        y2 = x2 * cos2[None, :] + x1 * sin2[None, :]
    tl.store(p_y + o_x, y1.to(p_y.dtype.element_ty), mask=m_x)
    tl.store(p_y + o_x + half, y2.to(p_y.dtype.element_ty), mask=m_x)
