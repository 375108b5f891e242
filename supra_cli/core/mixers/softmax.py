"""Softmax attention itself: the identity swap, and the teacher of every other mixer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from supra_cli.core.layout import Layout, Rotate, softmax_mask
from supra_cli.core.mixers import Mixer, mixers
from supra_cli.core.mixers.parts import capped


@mixers.register("softmax")
class Softmax(Mixer):
    """o_i = Σ_{j≤i} softmax_j(c(q_i·k_j · scale)) v_j over rotated q and k, c being the base's soft cap, if any.

    A layer of this kind keeps the base's own attention, bit for bit, so this class runs only where a swapped layer is
    compared with what it replaced. It has no state of fixed size, so it takes none.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, rope: Rotate, state: NamedTuple | None, layout: Layout | None
    ) -> tuple[Tensor, None]:
        mask = softmax_mask(layout, x.shape[1], window=self.spec.window, dtype=q.dtype, device=q.device)
        q, k, v = (heads.transpose(1, 2) for heads in (rope(q), rope(k), v))
        cap, grouped = self.spec.softcap, q.shape[1] != k.shape[1]
        if grouped and (mask is not None or cap is not None):
            # With a mask and enable_gqa, CUDA has the math kernel alone, which keeps [B,H,T,T] scores in fp32.
            k, v = (heads.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for heads in (k, v))
            grouped = False
        if cap is not None:  # which no fused kernel of PyTorch takes
            scores = capped(q @ k.transpose(-1, -2) * self.spec.scale, cap)
            if mask is None:
                mask = scores.new_full(scores.shape[-2:], torch.finfo(scores.dtype).min).triu(1)
            in_fp32 = torch.promote_types(v.dtype, torch.float32)  # or finer
            return ((scores + mask).softmax(-1, dtype=in_fp32).to(v.dtype) @ v).transpose(1, 2), None
        o = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.spec.scale, enable_gqa=grouped
        )
        return o.transpose(1, 2), None
