"""The GPT-NeoX layout: one projection, q, k, v interleaved head by head, rotary positions over part of a head."""

from __future__ import annotations

from torch import Tensor, nn

from supra_cli.core.archs import Arch, Positions, archs, head_spec, plain_head, rotary


def qkv(attention: nn.Module, x: Tensor, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
    heads = attention.query_key_value(x).view(*x.shape[:-1], -1, 3 * attention.head_size)
    q, k, v = heads.chunk(3, dim=-1)
    return q, k, v


GPT_NEOX = Arch(
    layers=lambda model: model.base_model.layers,
    slot="attention",
    spec=lambda attention: head_spec(attention, head_dim=attention.head_size),
    qkv=qkv,
    rotation=rotary,
    out=lambda attention, o: attention.dense(o),
    head=plain_head,
)

archs.register("gpt_neox")(GPT_NEOX)
