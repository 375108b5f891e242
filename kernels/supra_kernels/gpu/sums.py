"""count_i + rest_i = Σ_{j≤i} g_j within a chunk, or of a fixed decay count_i alone, the real tokens up to i.

Once a call for all kernels: a walk that summed at every chunk would wait for its own sum.
"""

import triton
import triton.language as tl

from supra_kernels.gpu.tiles import TOKEN_DECAY, load_documents


@triton.jit
def sums_kernel(
    p_g, p_code, p_count, p_rest, T, N, H,
    C: tl.constexpr, BH: tl.constexpr, DECAY: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """count [B,H,T] and, with a per-token decay, rest [B,H,T] of g [B,T,H]; see supra_kernels.gpu.tiles.

    A fixed decay counts for all heads alike, so H is 1. One program: BH heads of one chunk.
    """
    tiles_h = tl.cdiv(H, BH)
    pid = tl.program_id(0)
    i_h, n, i_b = pid % tiles_h * BH, pid // tiles_h % N, (pid // tiles_h // N).to(tl.int64)
    _, real, _, _ = load_documents(p_code, i_b, n * C, T, C, PACKED)
    o_t, o_h = (n * C + tl.arange(0, C))[:, None], (i_h + tl.arange(0, BH))[None, :]
    inside = (o_t < T) & (o_h < H)
    o_sum = (i_b * H + o_h) * T + o_t
    step = tl.zeros([C, BH], tl.float32) + real.to(tl.float32)[:, None]
    if DECAY == TOKEN_DECAY:
        b_g = tl.load(p_g + (i_b * T + o_t) * H + o_h, mask=inside & real[:, None], other=0.0)
        step = tl.floor(b_g * 256.0) / 256.0
        tl.store(p_rest + o_sum, tl.cumsum(b_g - step, 0), mask=inside)
    tl.store(p_count + o_sum, tl.cumsum(step, 0), mask=inside)
