"""What every kernel reads of a chunk: decay sums, documents, weights, tiles.

The log decay from the chunk's start up to and including token i is rate · count_i + rest_i. A fixed decay has rate g
and counts real tokens; a per-token decay has rate 1, its sum in multiples of 1/256 in `count` (exact in fp32) and what
remains in `rest`. So a difference of two sums is as exact as fp32 allows, also after gates near -88. Where the sums are
not known from the token's place, sums_kernel has made them.
"""

import triton
import triton.language as tl

NO_DECAY = tl.constexpr(0)
FIXED_DECAY = tl.constexpr(1)
TOKEN_DECAY = tl.constexpr(2)


@triton.jit
def load_documents(p_code, i_b, start, T, C: tl.constexpr, PACKED: tl.constexpr):
    """-> number [C], real [C], number of the entering state's document, number at the end. code = 2 · number + real."""
    o_t = start + tl.arange(0, C)
    inside = o_t < T
    if PACKED:
        code = tl.load(p_code + i_b * T + o_t, mask=inside, other=0)
        number = code >> 1
        real = ((code & 1) != 0) & inside
        entering = tl.load(p_code + i_b * T + tl.maximum(start - 1, 0)) >> 1
        last = tl.load(p_code + i_b * T + tl.minimum(start + C, T) - 1) >> 1
    else:
        number = tl.zeros([C], tl.int32)
        real = inside
        entering = 0
        last = 0
    return number, real, entering, last


@triton.jit
def load_rate(p_g, i_h, DECAY: tl.constexpr):
    rate = 1.0
    if DECAY == FIXED_DECAY:
        rate = tl.load(p_g + i_h)
    return rate


@triton.jit
def load_decay(p_count, p_rest, i_b, i_h, start, T, H, C: tl.constexpr, DECAY: tl.constexpr, PACKED: tl.constexpr):
    """-> count [C], rest [C], and both at the chunk's end."""
    o_c, last = tl.arange(0, C), tl.minimum(start + C, T) - 1
    count, rest = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    all_count, all_rest = 0.0, 0.0
    if DECAY == TOKEN_DECAY:
        row = (i_b * H + i_h) * T
        count, rest = load_numbers(p_count, row + start, T - start, C), load_numbers(p_rest, row + start, T - start, C)
        all_count, all_rest = tl.load(p_count + row + last), tl.load(p_rest + row + last)
    elif DECAY == FIXED_DECAY:
        if PACKED:
            count, all_count = load_numbers(p_count, i_b * T + start, T - start, C), tl.load(p_count + i_b * T + last)
        else:
            tokens = last - start + 1
            count, all_count = tl.minimum(o_c + 1, tokens).to(tl.float32), tokens.to(tl.float32)
    return count, rest, all_count, all_rest


@triton.jit
def edge_weights(rate, count, rest, all_count, all_rest, number, real, entering, last):
    """-> decay of the incoming state at each token [C], of each token in the outgoing state [C], of state to state."""
    from_start = tl.where(number == entering, tl.exp(rate * count + rest), 0.0)
    to_end = tl.where((number == last) & real, tl.exp(rate * (all_count - count) + (all_rest - rest)), 0.0)
    through = tl.where(entering == last, tl.exp(rate * all_count + all_rest), 0.0)
    return from_start, to_end, through


@triton.jit
def inner_weights(rate, count, rest, number, real, C: tl.constexpr, TRANSPOSED: tl.constexpr):
    """exp(b_i - b_j) for j ≤ i within a document, from real tokens j; [i,j], or [j,i] transposed."""
    o_c = tl.arange(0, C)
    if TRANSPOSED:
        distance = rate * (count[None, :] - count[:, None]) + (rest[None, :] - rest[:, None])
        seen = (o_c[None, :] >= o_c[:, None]) & (number[None, :] == number[:, None]) & real[:, None]
    else:
        distance = rate * (count[:, None] - count[None, :]) + (rest[:, None] - rest[None, :])
        seen = (o_c[:, None] >= o_c[None, :]) & (number[:, None] == number[None, :]) & real[None, :]
    return tl.where(seen, tl.exp(tl.minimum(distance, 0.0)), 0.0)


# A tile's place in memory is one 64-bit number and 32-bit distances from it, which keeps registers for the tile.


@triton.jit
def load_rows(p_x, i_b, i_h, start, T, HEADS, WIDTH, first, C: tl.constexpr, W: tl.constexpr, OPERAND: tl.constexpr):
    """x [B,T,HEADS,WIDTH] -> [C, W]: tokens from `start`, columns from `first`; 0 outside."""
    o_t, o_w = tl.arange(0, C)[:, None], first + tl.arange(0, W)[None, :]
    p_tile = p_x + ((i_b * T + start) * HEADS + i_h) * WIDTH
    mask = (o_t < T - start) & (o_w < WIDTH)
    return tl.load(p_tile + o_t * (HEADS * WIDTH) + o_w, mask=mask, other=0.0).to(OPERAND)


@triton.jit
def load_columns(p_x, i_b, i_h, start, T, HEADS, WIDTH, first, C: tl.constexpr, W: tl.constexpr, OPERAND: tl.constexpr):
    """As `load_rows`, transposed: [W, C]."""
    o_t, o_w = tl.arange(0, C)[None, :], first + tl.arange(0, W)[:, None]
    p_tile = p_x + ((i_b * T + start) * HEADS + i_h) * WIDTH
    mask = (o_t < T - start) & (o_w < WIDTH)
    return tl.load(p_tile + o_t * (HEADS * WIDTH) + o_w, mask=mask, other=0.0).to(OPERAND)


@triton.jit
def load_numbers(p_x, first, count, C: tl.constexpr):
    """[C] numbers from the place `first` on; 0 from the count-th on."""
    o_c = tl.arange(0, C)
    return tl.load(p_x + first + o_c, mask=o_c < count, other=0.0)


@triton.jit
def store_rows(p_x, value, i_b, i_h, start, T, HEADS, WIDTH, first, C: tl.constexpr, W: tl.constexpr):
    o_t, o_w = tl.arange(0, C)[:, None], first + tl.arange(0, W)[None, :]
    p_tile = p_x + ((i_b * T + start) * HEADS + i_h) * WIDTH
    mask = (o_t < T - start) & (o_w < WIDTH)
    tl.store(p_tile + o_t * (HEADS * WIDTH) + o_w, value.to(p_x.dtype.element_ty), mask=mask)


@triton.jit
def state_offsets(K, V, W, first_k, first_v, BK: tl.constexpr, BV: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Offsets and mask of a tile of one state [K,W], within V columns; [BK,BV] or transposed [BV,BK]."""
    o_k = first_k + tl.arange(0, BK)
    o_v = first_v + tl.arange(0, BV)
    if TRANSPOSED:
        offsets, mask = o_k[None, :] * W + o_v[:, None], (o_k < K)[None, :] & (o_v < V)[:, None]
    else:
        offsets, mask = o_k[:, None] * W + o_v[None, :], (o_k < K)[:, None] & (o_v < V)[None, :]
    return offsets, mask


@triton.jit
def load_state(
    p_states, i_state, K, V, first_k, first_v, BK: tl.constexpr, BV: tl.constexpr, TRANSPOSED: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """A tile of state number i_state [K,V]: [BK,BV] or transposed [BV,BK]; 0 outside."""
    o_S, m_S = state_offsets(K, V, V, first_k, first_v, BK, BV, TRANSPOSED)
    return tl.load(p_states + i_state * K * V + o_S, mask=m_S, other=0.0).to(OPERAND)


@triton.jit
def load_z(p_z, i_state, K, first_k, BK: tl.constexpr):
    """z [BK] that belongs to state number i_state; 0 outside."""
    o_k = first_k + tl.arange(0, BK)
    return tl.load(p_z + i_state * K + o_k, mask=o_k < K, other=0.0)
