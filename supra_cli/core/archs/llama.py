"""The Llama layout: separate projections, rotary positions, grouped queries. What other bases share of it is here."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from supra_cli.core.archs import SLIDING, Arch, Positions, archs, by_kind, everywhere, head_spec, plain_head, rotary
from supra_cli.core.layout import HeadSpec


def spec(attention: nn.Module) -> HeadSpec:
    return head_spec(attention, head_dim=attention.head_dim, kv_heads=attention.config.num_key_value_heads)


def qkv(attention: nn.Module, x: Tensor, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
    heads = (*x.shape[:-1], -1, attention.head_dim)
    return attention.q_proj(x).view(heads), attention.k_proj(x).view(heads), attention.v_proj(x).view(heads)


def normed_qkv(attention: nn.Module, x: Tensor, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys normed head by head."""
    q, k, v = qkv(attention, x, positions)
    return attention.q_norm(q), attention.k_norm(k), v


LLAMA = Arch(
    layers=lambda model: model.base_model.layers,
    slot="self_attn",
    spec=spec,
    qkv=qkv,
    rotation=rotary,
    out=lambda attention, o: attention.o_proj(o),
    head=plain_head,
)

archs.register("mistral")(replace(LLAMA, window=everywhere, oddities={"sliding_window": 7}))
archs.register("ministral")(replace(LLAMA, window=by_kind, oddities=SLIDING))
archs.register("qwen2")(replace(LLAMA, window=by_kind, oddities=SLIDING | {"use_sliding_window": True}))
archs.register("qwen3")(replace(LLAMA, qkv=normed_qkv, window=by_kind, oddities=SLIDING | {"use_sliding_window": True}))

archs.register("mixtral")(replace(LLAMA, window=everywhere, oddities={"sliding_window": 7, "num_local_experts": 4}))
FEW_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
archs.register("qwen3_moe")(
    replace(
        LLAMA,
        qkv=normed_qkv,
        window=everywhere,
        oddities=FEW_EXPERTS | {"sliding_window": 7, "use_sliding_window": True},
    )
)

# Bases that are Llama's layout and nothing else.
archs.register("llama")(LLAMA)
