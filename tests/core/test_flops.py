"""FLOPs that are told from shapes are those of the products that are made."""

from __future__ import annotations

import pytest
import torch
from supra_kernels import delta_chunk
from torch.utils.flop_counter import FlopCounterMode

from supra_cli.core.flops import counter, delta_flops


@pytest.mark.parametrize("readers", [1, 3])
@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize(("key_dim", "v_dim"), [(16, 16), (32, 16), (16, 64)])
def test_the_delta_rule(key_dim, v_dim, channels, readers):
    q, k, v = (torch.randn(2, 64, *width) for width in ((3 * readers, key_dim), (3, key_dim), (3, v_dim)))
    g, beta = -torch.rand(2, 64, 3, *([key_dim] * channels)), torch.rand(2, 64, 3)
    with FlopCounterMode(display=False) as forward:
        o, S, starts = delta_chunk.forward(q, k, v, g, beta, None, None, 1.0, True)
    with FlopCounterMode(display=False) as backward:
        delta_chunk.backward(o, S, q, k, v, g, beta, None, starts, 1.0, True)
    made = forward.get_total_flops(), backward.get_total_flops()
    chunk = delta_chunk.CHANNEL_CHUNK if channels else delta_chunk.HEAD_CHUNK
    assert delta_flops(2 * 64 * 3, readers, key_dim, v_dim, chunk) == made
    inputs = [x.requires_grad_() for x in (q, k, v, g, beta)]
    with counter() as counted:
        (o, S, _) = torch.ops.supra.delta_chunk(*inputs, None, None, 1.0, True)
        torch.autograd.backward((o, S), (o, S))
    assert counted.get_total_flops() == sum(made)
