"""Retention: linear attention without a map, with a fixed decay and normalised heads (Sun et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from supra_cli.core.layout import Layout, Rotate
from supra_cli.core.mixers import mixers
from supra_cli.core.mixers.parts import Gain, MatrixState, Retaining, SlopeRule


@mixers.register("retention")
class Retention(Retaining):
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

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, rope: Rotate, state: MatrixState | None, layout: Layout | None
    ) -> tuple[Tensor, MatrixState]:
        return self.retain(q, k, v, rope, state, layout)
