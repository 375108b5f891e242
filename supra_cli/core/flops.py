"""FLOPs of softmax attention by operation, from shapes: PyTorch 2.11 counts neither the CPU's nor grouped queries."""

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
