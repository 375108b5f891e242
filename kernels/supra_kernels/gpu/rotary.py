"""ReLU, then positions: y₁ = x₁ cos₁ - x₂ sin₁,   y₂ = x₂ cos₂ + x₁ sin₂, with ₁ and ₂ the halves of what turns.

Transposed, which is the gradient of the turn:   y₁ = x₁ cos₁ + x₂ sin₂,   y₂ = x₂ cos₂ - x₁ sin₁.
"""

import triton
import triton.language as tl


@triton.jit
def relu(x):
    """Not tl.maximum, which makes 0 of NaN."""
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def load_turned(
    p_x, o_x, mask, o_k, p_cos, p_sin, o_table, R,
    ROTARY: tl.constexpr, RELU: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """x at o_x, column o_k of its head, in fp32, after the ReLU and turned. The first R columns of a head turn, by the
    rows of cos and sin that begin at o_table; the others stay."""
    x = tl.load(p_x + o_x, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        x = relu(x)
    if ROTARY:
        half = R // 2
        first, turns = o_k < half, o_k < R
        across = tl.where(first, half, -half)
        other = tl.load(p_x + o_x + across, mask=mask & turns, other=0.0).to(tl.float32)
        if RELU:
            other = relu(other)
        cos = tl.load(p_cos + o_table + o_k, mask=turns, other=1.0).to(tl.float32)
        if TRANSPOSED:
            sin = tl.load(p_sin + o_table + o_k + across, mask=turns, other=0.0).to(tl.float32)
            x = x * cos + tl.where(first, other, -other) * sin
        else:
            sin = tl.load(p_sin + o_table + o_k, mask=turns, other=0.0).to(tl.float32)
            x = x * cos + tl.where(first, -other, other) * sin
    return x


@triton.jit
def rotary_kernel(
    p_x, p_cos, p_sin, p_y, T, H, K, R, STRIDE,
    BH: tl.constexpr, BK: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """One program: BH heads of one token of x, y [B,T,H,K]. cos, sin [B,T,R] or, with STRIDE 0, [1,T,R]; R is even."""
    o_k, o_x, mask, o_table = _places(T, H, K, R, STRIDE, BH, BK)
    y = load_turned(p_x, o_x, mask, o_k, p_cos, p_sin, o_table, R, ROTARY=True, RELU=RELU, TRANSPOSED=False)
    tl.store(p_y + o_x, y.to(p_y.dtype.element_ty), mask=mask)


@triton.jit
def rotary_backward_kernel(
    p_dy, p_x, p_cos, p_sin, p_dx, T, H, K, R, STRIDE,
    BH: tl.constexpr, BK: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """As rotary_kernel, from dy to dx; x, what went into the ReLU, is read only with RELU."""
    o_k, o_x, mask, o_table = _places(T, H, K, R, STRIDE, BH, BK)
    dx = load_turned(p_dy, o_x, mask, o_k, p_cos, p_sin, o_table, R, ROTARY=True, RELU=False, TRANSPOSED=True)
    if RELU:
        dx = tl.where(tl.load(p_x + o_x, mask=mask, other=0.0).to(tl.float32) <= 0.0, 0.0, dx)
    tl.store(p_dx + o_x, dx.to(p_dx.dtype.element_ty), mask=mask)


@triton.jit
def _places(T, H, K, R, STRIDE, BH: tl.constexpr, BK: tl.constexpr):
    """-> columns [1,BK], offsets [BH,BK] and their mask, and where the token's rows of cos and sin begin."""
    tiles_h = tl.cdiv(H, BH)
    pid = tl.program_id(0).to(tl.int64)
    i_bt = pid // tiles_h
    o_h, o_k = (pid % tiles_h * BH + tl.arange(0, BH))[:, None], tl.arange(0, BK)[None, :]
    return o_k, (i_bt * H + o_h) * K + o_k, (o_h < H) & (o_k < K), i_bt // T * STRIDE + i_bt % T * R
