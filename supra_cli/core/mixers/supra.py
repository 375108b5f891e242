"""SUPRA: linear attention with a learned map, a fixed decay and normalised heads (Mercat et al. 2024,
arXiv:2405.06640).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from supra_cli.core.layout import HeadSpec, Layout
from supra_cli.core.mixers import Mixer, Rotate, mixers
from supra_cli.core.mixers.parts import DenseMap, HeadMap, SlopeRule, log_decay, normalise
from supra_cli.core.ops import linear_attention


@mixers.register("supra")
class Supra(Mixer):
    """o_i = GroupNorm( Σ_{j≤i} γ_h^{i-j} (q'_i · k'_j) d^{-1/2} v_j )

    q' = RoPE(ReLU(E q + b)),  k' = RoPE(ReLU(E k + b)):  the map comes before the positions and sees all heads at
    once. With fewer kv heads than heads, k has its own E_kv, b_kv. As a recurrence: S ← γ_h S + k' vᵀ, o =
    GroupNorm(d^{-1/2} S q').

    There is no denominator; GroupNorm (one group a head, no affine) sets the scale. Source: section 3 and the
    authors' code.
    """

    @dataclass(frozen=True)
    class Options:
        map: Literal["dense", "head"] = "dense"
        """dense: E mixes all heads (the paper); head: each head has its own."""
        slopes: SlopeRule = "alibi"
        """Rule of the decays: alibi (the paper), γ_h = exp(-2^{-8(h+1)/H}), or retnet, γ_h = 1 - 2^{-5-h}."""
        gain: Literal["none", "head"] = "none"
        """head: a learned scale for each normalised head; none is the paper."""
        qk_norm: bool = False
        """Layer norm of q' and k' over all heads, after the ReLU (the paper's 1B models)."""

    class State(NamedTuple):
        S: Tensor
        """[B, H, K, V] fp32."""

    def __init__(self, spec: HeadSpec, options: Options):
        super().__init__(spec, options)
        feature_map = {"dense": DenseMap, "head": HeadMap}[options.map]
        grouped = spec.kv_heads != spec.heads
        self.E = feature_map(spec.heads, spec.head_dim)
        self.E_kv = feature_map(spec.kv_heads, spec.head_dim) if grouped else None
        self.q_norm = nn.LayerNorm(spec.heads * spec.head_dim, bias=False) if options.qk_norm else None
        self.k_norm = nn.LayerNorm(spec.kv_heads * spec.head_dim, bias=False) if options.qk_norm else None
        self.gain = nn.Parameter(torch.empty(spec.heads, 1)) if options.gain == "head" else None

    def reset_parameters(self) -> None:
        for part in (self.E, self.E_kv, self.q_norm, self.k_norm):
            if part is not None:
                part.reset_parameters()
        if self.gain is not None:
            nn.init.ones_(self.gain)

    def init_state(self, batch: int, device: torch.device | str) -> State:
        shape = (batch, self.spec.heads, self.spec.head_dim, self.spec.v_dim)
        return self.State(torch.zeros(shape, dtype=torch.float32, device=device))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, rope: Rotate, state: State | None, layout: Layout | None
    ) -> tuple[Tensor, State]:
        q = rope(_norm(self.q_norm, self.E(q).relu()))
        k = rope(_norm(self.k_norm, (self.E_kv or self.E)(k).relu()))
        g = torch.tensor(log_decay(self.options.slopes, self.spec.heads), dtype=torch.float32, device=q.device)
        S = None if state is None else state.S
        o, S = linear_attention(q, k, v, g, scale=self.spec.head_dim**-0.5, state=S, layout=layout)
        o = normalise(o)
        return (o if self.gain is None else o * self.gain), self.State(S)

    def target(self, o: Tensor) -> Tensor:
        return normalise(o) if self.gain is None else o


def _norm(norm: nn.LayerNorm | None, x: Tensor) -> Tensor:
    """`norm` over the concatenated heads of x, if there is one."""
    return x if norm is None else norm(x.flatten(-2)).view(x.shape)
