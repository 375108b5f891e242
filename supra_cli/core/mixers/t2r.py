"""T2R: linear attention with a learned map and a denominator (Kasai et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from supra_cli.core.errors import UsageError
from supra_cli.core.layout import HeadSpec, Layout, Rotate
from supra_cli.core.mixers import mixers
from supra_cli.core.mixers.parts import HeadMap, MatrixMixer, MatrixState
from supra_cli.core.ops import linear_attention

_MOST = 1 << 16


@mixers.register("t2r")
class T2R(MatrixMixer):
    """a_i = Σ_{j≤i} φ(q_i)·φ(k_j) v_j / max(Σ_{j≤i} φ(q_i)·φ(k_j), 0.01),   φ(x)_h = ReLU(W_h x_h + b_h)

    The same W_h, b_h serve q (scaled by d^{-1/2} first) and k; with fewer kv heads than heads, k is repeated and mapped
    by each query head's. The paper's bases have absolute positions; rotary ones are put in before the map. No decay.
    The state's last column is z = Σ φ(k), what the denominator needs.

    Source: arXiv:2103.13076, section 3, and the authors' code.
    """

    @dataclass(frozen=True)
    class Options:
        feature_size: int = 256
        """Width K' of φ; the paper's language models have 256."""

        def __post_init__(self) -> None:
            if not 1 <= self.feature_size <= _MOST:
                raise UsageError(f"mixer.feature_size is {self.feature_size}, expected a number from 1 to {_MOST}")

    variants = ({"feature_size": 3},)

    def __init__(self, spec: HeadSpec, options: Options):
        super().__init__(spec, options)
        self.phi = HeadMap(spec.heads, spec.head_dim, options.feature_size)

    def state_shape(self) -> tuple[int, int]:
        return self.options.feature_size, self.spec.v_dim + 1

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, rope: Rotate, state: MatrixState | None, layout: Layout | None
    ) -> tuple[Tensor, MatrixState]:
        k, v = (heads.repeat_interleave(self.spec.heads // self.spec.kv_heads, dim=2) for heads in (k, v))
        q, k = self.phi(rope(q) * self.spec.scale), self.phi(rope(k))
        S = None if state is None else state.S
        o, S = linear_attention(q, k, v, state=S, layout=layout, relu=True, denominator_min=0.01)
        return o, MatrixState(S)
