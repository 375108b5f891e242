"""Retention: linear attention without a map, with a fixed decay and normalised heads (Sun et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from supra_cli.core.layout import HeadSpec, Layout
from supra_cli.core.mixers import Rotate, mixers
from supra_cli.core.mixers.parts import Gain, HeadNorm, MatrixMixer, MatrixState, SlopeRule, log_decay
from supra_cli.core.ops import linear_attention


@mixers.register("retention")
class Retention(MatrixMixer):
    """o_i = GroupNorm( Σ_{j≤i} γ_h^{i-j} (RoPE(q_i) · RoPE(k_j)) d^{-1/2} v_j )

    SUPRA without its map, so without new parameters: the plain linear-attention control. The base's own rotation
    stands in for xPos, and RetNet's output gate is left out.

    Source: arXiv:2307.08621, section 2.1.
    """

    @dataclass(frozen=True)
    class Options:
        slopes: SlopeRule = "retnet"
        """Decay: retnet (the paper), γ_h = 1 - 2^{-5-h}; alibi, γ_h = exp(-2^{-8(h+1)/H}); none, γ_h = 1."""
        gain: Gain = "none"
        """head: a learned scale for each normalised head."""

    def __init__(self, spec: HeadSpec, options: Options):
        super().__init__(spec, options)
        self.norm = HeadNorm(spec.heads, options.gain)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor,
        rope: Rotate,
        state: MatrixState | None,
        layout: Layout | None,
    ) -> tuple[Tensor, MatrixState]:
        g = log_decay(self.options.slopes, self.spec.heads, q.device)
        S = None if state is None else state.S
        scale, eps = self.spec.head_dim**-0.5, self.norm.eps
        o, S = linear_attention(rope(q), rope(k), v, g, scale=scale, state=S, layout=layout, norm_eps=eps)
        return self.norm.scaled(o), MatrixState(S)

    def target(self, o: Tensor) -> Tensor:
        return self.norm.target(o)
