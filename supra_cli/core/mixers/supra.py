"""SUPRA: linear attention with a learned map, a fixed decay and normalised heads (Mercat et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from supra_cli.core.layout import HeadSpec, Layout, Rotate
from supra_cli.core.mixers import mixers
from supra_cli.core.mixers.parts import Gain, HeadMap, MatrixState, Retaining, SlopeRule, over_heads


@mixers.register("supra")
class Supra(Retaining):
    """o_i = GroupNorm( Σ_{j≤i} γ_h^{i-j} (q'_i · k'_j) d^{-1/2} v_j )

    q' = RoPE(ReLU(E q + b)),  k' = RoPE(ReLU(E k + b)):  the map comes before the positions and mixes all heads. With
    fewer kv heads than heads, k has its own E_kv, b_kv. As a recurrence: S ← γ_h S + k' vᵀ, o = GroupNorm(d^{-1/2} Sᵀ
    q'). There is no denominator: GroupNorm, one group a head, sets the scale.

    Source: arXiv:2405.06640, section 3, and the authors' code.
    """

    @dataclass(frozen=True)
    class Options:
        map: Literal["dense", "head"] = "dense"
        """dense: E mixes all heads (the paper); head: each head has its own."""
        slopes: SlopeRule = "alibi"
        """Decay: alibi (the paper), γ_h = exp(-2^{-8(h+1)/H}); retnet, γ_h = 1 - 2^{-5-h}; none, γ_h = 1."""
        gain: Gain = "none"
        """head: a learned scale for each normalised head; none is the paper."""
        qk_norm: bool = False
        """Layer norm of q' and k' over all heads, after the ReLU (the paper's 1B models)."""

    def __init__(self, spec: HeadSpec, options: Options):
        super().__init__(spec, options)
        grouped = spec.kv_heads != spec.heads
        self.E = self._map(spec.heads)
        self.E_kv = self._map(spec.kv_heads) if grouped else None
        self.q_norm = nn.LayerNorm(spec.heads * spec.head_dim, bias=False) if options.qk_norm else None
        self.k_norm = nn.LayerNorm(spec.kv_heads * spec.head_dim, bias=False) if options.qk_norm else None

    def _map(self, heads: int) -> nn.Module:
        width = heads * self.spec.head_dim
        return HeadMap(heads, self.spec.head_dim) if self.options.map == "head" else nn.Linear(width, width)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, rope: Rotate, state: MatrixState | None, layout: Layout | None
    ) -> tuple[Tensor, MatrixState]:
        E, E_kv = self.E, self.E if self.E_kv is None else self.E_kv
        q, k = (E(q), E_kv(k)) if self.options.map == "head" else (over_heads(E, q), over_heads(E_kv, k))
        if self.q_norm is None:
            return self.retain(q, k, v, rope, state, layout, relu=True)
        q, k = over_heads(self.q_norm, q.relu()), over_heads(self.k_norm, k.relu())
        return self.retain(q, k, v, rope, state, layout)
