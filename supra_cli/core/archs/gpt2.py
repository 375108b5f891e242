"""GPT-2: one projection for queries, keys and values, learned positions, dropout behind the output projection."""

from __future__ import annotations

from torch import Tensor, nn

from supra_cli.core.archs import Arch, Positions, archs, head_spec, plain_head, unrotated


def qkv(attention: nn.Module, x: Tensor, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
    fused = attention.c_attn(x).view(*x.shape[:-1], 3, attention.num_heads, attention.head_dim)
    q, k, v = fused.unbind(-3)
    return q, k, v


GPT2 = Arch(
    layers=lambda model: model.base_model.h,
    slot="attn",
    spec=lambda attention: head_spec(attention, head_dim=attention.head_dim),
    qkv=qkv,
    rotation=unrotated,
    out=lambda attention, o: attention.resid_dropout(attention.c_proj(o.contiguous())),
    head=plain_head,
    limit=lambda config: config.max_position_embeddings,
    oddities={"resid_pdrop": 0.5},
)

archs.register("gpt2")(GPT2)
