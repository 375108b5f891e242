"""OPT: separate projections, learned positions; its blocks are run by a decoder inside the base model."""

from __future__ import annotations

from supra_cli.core.archs import Arch, archs, head_spec, plain_head, unrotated
from supra_cli.core.archs.llama import qkv

OPT = Arch(
    layers=lambda model: model.base_model.decoder.layers,
    slot="self_attn",
    spec=lambda attention: head_spec(attention, head_dim=attention.head_dim),
    qkv=qkv,
    rotation=unrotated,
    out=lambda attention, o: attention.out_proj(o),
    head=plain_head,
    decoder="decoder",
    limit=lambda config: config.max_position_embeddings,
)

archs.register("opt")(OPT)
