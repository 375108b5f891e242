"""Gemma: Llama's layout; the second generation caps scores and logits, the third norms queries and keys head by head.
Sliding and full layers of the third have rotary tables of their own, which the base hands to each.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from supra_cli.core.archs import SLIDING, archs, by_kind
from supra_cli.core.archs.llama import LLAMA, normed_qkv, spec
from supra_cli.core.layout import HeadSpec


def capped_spec(attention: nn.Module) -> HeadSpec:
    return replace(spec(attention), softcap=attention.attn_logit_softcapping)


def capped_head(model: nn.Module, hidden: Tensor) -> Tensor:
    logits, cap = model.lm_head(hidden), model.config.final_logit_softcapping
    return logits if cap is None else cap * (logits / cap).tanh()


archs.register("gemma")(LLAMA)
ODD = SLIDING | {"query_pre_attn_scalar": 20, "final_logit_softcapping": 2.0}
archs.register("gemma2")(
    replace(
        LLAMA,
        spec=capped_spec,
        head=capped_head,
        window=by_kind,
        oddities=ODD | {"attn_logit_softcapping": 1.5},
    )
)
# The third generation's attention has the key of a cap too, and does not use it.
archs.register("gemma3_text")(replace(LLAMA, qkv=normed_qkv, head=capped_head, window=by_kind, oddities=ODD))
