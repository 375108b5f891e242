"""FLOPs from shapes, as PyTorch counts them, and of what it has no formula for: softmax attention on a CPU and with
grouped queries (2.11), and the operators in chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from supra_cli.core import ops

Shape = Sequence[int]


def _forward(q: Shape, k: Shape, v: Shape, *_, **__) -> int:
    return sdpa_flop_count(q, _repeated(q, k), _repeated(q, v))


def _backward(do: Shape, q: Shape, k: Shape, v: Shape, *_, **__) -> int:
    return sdpa_backward_flop_count(do, q, _repeated(q, k), _repeated(q, v))


def _repeated(q: Shape, grouped: Shape) -> Shape:
    return (*q[:2], *grouped[2:])


def _operator(device: str, backward: bool, *shapes: Shape, **_) -> int:
    (batch, tokens, heads, K), V = shapes[2 * backward], shapes[2 + 2 * backward][-1]
    return operator_flops(batch * tokens * heads, K, V, ops.chunk_tokens(device, K, V))[backward]


def _operator_step(q: Shape, k: Shape, v: Shape, *_, **__) -> int:
    return 4 * q[0] * q[1] * q[2] * q[3] * v[3]


def _delta(backward: bool, *shapes: Shape | None, **_) -> int:
    q, (batch, tokens, states, K), (*_, V), g = shapes[2 * backward : 4 + 2 * backward]
    chunk = ops.delta_chunk_tokens(g is not None and len(g) == 4)
    return delta_flops(batch * tokens * states, q[2] // states, K, V, chunk)[backward]


_aten, _own = torch.ops.aten, torch.ops.supra
_FORMULAS = {
    _aten.baddbmm_: flop_registry[_aten.baddbmm],
    _aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    _aten._scaled_dot_product_flash_attention: _forward,
    _aten._scaled_dot_product_efficient_attention: _forward,
    _aten._scaled_dot_product_cudnn_attention: _forward,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
    _aten._scaled_dot_product_flash_attention_backward: _backward,
    _aten._scaled_dot_product_efficient_attention_backward: _backward,
    _aten._scaled_dot_product_cudnn_attention_backward: _backward,
    _own.chunk: partial(_operator, "cpu", False),
    _own.chunk_backward: partial(_operator, "cpu", True),
    _own.triton: partial(_operator, "cuda", False),
    _own.triton_backward: partial(_operator, "cuda", True),
    _own.triton_step: _operator_step,
    _own.delta_chunk: partial(_delta, False),
    _own.delta_chunk_backward: partial(_delta, True),
}


def counter() -> FlopCounterMode:
    """A context in which `get_total_flops()` counts; causal softmax attention by whole squares, as PyTorch does."""
    return FlopCounterMode(display=False, custom_mapping=_FORMULAS)


def operator_flops(rows: int, key_dim: int, v_dim: int, chunk: int) -> tuple[int, int]:
    """Of the matrix products over `rows` = B · T · H, a multiplication and an addition counted as two: (forward,
    backward).

    Forward: q k^T and its product with v inside a chunk, q S, k v^T. Backward: five products inside a chunk, k v^T
    again, and four with the state or its gradient.
    """
    forward = chunk * (key_dim + v_dim) + 2 * key_dim * v_dim
    backward = chunk * (3 * key_dim + 2 * v_dim) + 5 * key_dim * v_dim
    return 2 * rows * forward, 2 * rows * backward


def delta_flops(rows: int, readers: int, key_dim: int, v_dim: int, chunk: int) -> tuple[int, int]:
    """The same of the delta rule over `rows` = B · T · N, N states with so many query heads each; its triangular
    systems are no matrix products and not counted.

    Forward: k k^T, the inverse's product with v and k, and two with the state; for each reader q k^T, the scores'
    product with what is written, and q S. Backward: what of it is needed again, and the gradient of each.
    """
    forward = chunk * (2 * key_dim + v_dim) + 2 * key_dim * v_dim
    forward += readers * (chunk * (key_dim + v_dim) + key_dim * v_dim)
    backward = chunk * (4 * key_dim + 3 * v_dim) + 7 * key_dim * v_dim
    backward += readers * (chunk * (3 * key_dim + 2 * v_dim) + 2 * key_dim * v_dim)
    return 2 * rows * forward, 2 * rows * backward
