"""Softmax attention itself: the identity swap, and the teacher of every other mixer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from supra_cli.core.layout import HeadSpec, Layout, Rotate, softmax_mask
from supra_cli.core.mixers import Mixer, mixers
from supra_cli.core.mixers.parts import capped, wide


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


def attention_moments(
    spec: HeadSpec, q: Tensor, k: Tensor, x: Tensor, rope: Rotate, layout: Layout | None, counts: Tensor
) -> Tensor:
    """[3, H] in fp32 or finer: Σ_i Σ_j p_ij (i - j), Σ_i Σ_j p_ij² and Σ_i 1 over the tokens i that `counts` [B,T] has.

    p are the weights of softmax attention. They are never made: attention over values which are the tokens' numbers
    gives Σ_j p_ij j, and over values e that are 1 or -1 at random, in each of many channels, the mean of
    (Σ_j p_ij e_j)², which Σ_j p_ij² is the expectation of. The signs are the same at every call.
    """
    batch, tokens, channels = *x.shape[:2], max(spec.v_dim, 64)
    q, k = wide(q), wide(k)
    signs = torch.randint(0, 2, (tokens, channels), generator=torch.Generator().manual_seed(0)) * 2 - 1
    number = torch.arange(tokens, dtype=q.dtype, device=q.device)
    values = torch.cat((number[:, None], signs.to(q)), dim=-1)[None, :, None].expand(batch, -1, k.shape[2], -1)
    with torch.autocast(q.device.type, enabled=False):  # bf16 cannot tell the tokens 511 and 512 from each other
        seen, _ = Softmax(spec, Softmax.Options())(q, k, values, x, lambda heads: wide(rope(heads)), None, layout)
    distance = number[:, None] - seen[..., 0]
    sums = torch.stack((distance, seen[..., 1:].square().mean(-1), torch.ones_like(distance)))
    return sums.masked_fill(~counts[..., None], 0).sum((1, 2))
