"""FLOPs of attention from shapes: of softmax by operation, as PyTorch 2.11 counts neither the CPU's nor grouped
queries, and of the linear operator in chunks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

Shape = Sequence[int]


def _forward(q: Shape, k: Shape, v: Shape, *_, **__) -> int:
    return sdpa_flop_count(q, _repeated(q, k), _repeated(q, v))


def _backward(do: Shape, q: Shape, k: Shape, v: Shape, *_, **__) -> int:
    return sdpa_backward_flop_count(do, q, _repeated(q, k), _repeated(q, v))


def _repeated(q: Shape, grouped: Shape) -> Shape:
    return (*q[:2], *grouped[2:])


_aten = torch.ops.aten
SDPA_FLOPS = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    _aten._scaled_dot_product_flash_attention: _forward,
    _aten._scaled_dot_product_efficient_attention: _forward,
    _aten._scaled_dot_product_cudnn_attention: _forward,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
    _aten._scaled_dot_product_flash_attention_backward: _backward,
    _aten._scaled_dot_product_efficient_attention_backward: _backward,
    _aten._scaled_dot_product_cudnn_attention_backward: _backward,
}


def operator_flops(rows: int, key_dim: int, v_dim: int, chunk: int) -> tuple[int, int]:
    """Of the matrix products over `rows` = B · T · H, a multiplication and an addition counted as two: (forward,
    backward).

    Forward: q k^T and its product with v inside a chunk, q S, k v^T. Backward: five products inside a chunk, k v^T
    again, and four with the state or its gradient.
    """
    forward = chunk * (key_dim + v_dim) + 2 * key_dim * v_dim
    backward = chunk * (3 * key_dim + 2 * v_dim) + 5 * key_dim * v_dim
    return 2 * rows * forward, 2 * rows * backward
