"""Gated linear attention: a learned positive map and a decay that the data choose, one number a head and token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from supra_cli.core.layout import HeadSpec, Layout, Rotate
from supra_cli.core.mixers import mixers
from supra_cli.core.mixers.parts import HeadNorm, HedgehogMap, MatrixMixer, MatrixState, in_fp32, nearly_none
from supra_cli.core.ops import linear_attention


@mixers.register("gated")
class Gated(MatrixMixer):
    """o_i = Σ_{j≤i} a_ij v_j / max(Σ_{j≤i} a_ij, 1e-6),   a_ij = (Π_{j<t≤i} γ_t) φ(q_i)·φ(k_j),   γ_t = σ(w_h·x_t +
    b_h)

    φ(x)_h = [softmax(W_h x_h + c_h), softmax(-W_h x_h - c_h)] after the rotation, with maps of their own for q and k.
    It starts with W = 1, c = 0, w = 0, b = 6: a decay of 0.9975 a token, near none. The state's last column is the
    denominator's sum. With normaliser = "norm", GroupNorm of the numerator takes the place of the division.

    Source: the map is Hedgehog's (Zhang et al. 2024, arXiv:2402.04347), the scalar decay as in Mamba-2
    (arXiv:2405.21060) and Lizard (arXiv:2507.09025).
    """

    @dataclass(frozen=True)
    class Options:
        normaliser: Literal["denominator", "norm"] = "denominator"
        """What sets the scale of a head: division by the summed weights, or GroupNorm."""
        output_gate: bool = False
        """Multiply the heads by 2 σ(U x), which starts at 1."""

    def __init__(self, spec: HeadSpec, options: Options):
        super().__init__(spec, options)
        self.phi_q = HedgehogMap(spec.heads, spec.head_dim)
        self.phi_k = HedgehogMap(spec.kv_heads, spec.head_dim)
        self.decay = nn.Linear(spec.model_dim, spec.heads)
        self.gate = nn.Linear(spec.model_dim, spec.heads * spec.v_dim, bias=False) if options.output_gate else None
        self.norm = HeadNorm(spec.heads, "none") if options.normaliser == "norm" else None

    def reset_parameters(self) -> None:
        for phi in (self.phi_q, self.phi_k):
            phi.reset_parameters()
        nearly_none(self.decay)
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)

    def state_shape(self) -> tuple[int, int]:
        return 2 * self.spec.head_dim, self.spec.v_dim + (self.norm is None)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, rope: Rotate, state: MatrixState | None, layout: Layout | None
    ) -> tuple[Tensor, MatrixState]:
        q, k = self.phi_q(rope(q)), self.phi_k(rope(k))
        g = nn.functional.logsigmoid(in_fp32(self.decay, x))
        S = None if state is None else state.S
        if self.norm is not None:
            o, S = linear_attention(q, k, v, g, state=S, layout=layout, norm_eps=self.norm.eps)
        else:
            o, S = linear_attention(q, k, v, g, state=S, layout=layout, denominator_min=1e-6)
        if self.gate is not None:
            o = o * 2 * self.gate(x).sigmoid().view(o.shape)
        return o, MatrixState(S)

    def target(self, o: Tensor) -> Tensor:
        return o if self.norm is None or self.gate is not None else self.norm.target(o)
