"""Hedgehog: linear attention whose learned map is as spiky and as monotone as softmax (Zhang et al. 2024)."""

from __future__ import annotations

from torch import Tensor

from supra_cli.core.layout import HeadSpec, Layout, Rotate
from supra_cli.core.mixers import Mixer, mixers
from supra_cli.core.mixers.parts import HedgehogMap, MatrixMixer, MatrixState
from supra_cli.core.ops import linear_attention


@mixers.register("hedgehog")
class Hedgehog(MatrixMixer):
    """o_i = Σ_{j≤i} φ(q_i)·φ(k_j) v_j / max(Σ_{j≤i} φ(q_i)·φ(k_j), 1e-6)

    φ(x)_h = [softmax(W_h x_h + b_h), softmax(-W_h x_h - b_h)] after the rotation, with maps of their own for the query
    heads and the kv heads, each W_h = 1 and b_h = 0 at the start. No decay: `gated` is this with one. The state's last
    column is z = Σ φ(k), what the denominator needs.

    Source: arXiv:2402.04347, section 4. The paper first trains φ by the cross entropy between its attention weights and
    softmax's, which takes all T² of them; attention transfer asks for the heads instead, as LoLCATs does
    (arXiv:2410.10254), in time linear in T on the student's side.
    """

    def __init__(self, spec: HeadSpec, options: Mixer.Options):
        super().__init__(spec, options)
        self.phi_q = HedgehogMap(spec.heads, spec.head_dim)
        self.phi_k = HedgehogMap(spec.kv_heads, spec.head_dim)

    def state_shape(self) -> tuple[int, int]:
        return HedgehogMap.width * self.spec.head_dim, self.spec.v_dim + 1

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, rope: Rotate, state: MatrixState | None, layout: Layout | None
    ) -> tuple[Tensor, MatrixState]:
        S = None if state is None else state.S
        q, k = self.phi_q(rope(q)), self.phi_k(rope(k))
        o, S = linear_attention(q, k, v, state=S, layout=layout, denominator_min=1e-6)
        return o, MatrixState(S)
