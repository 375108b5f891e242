"""T2R: linear attention with a learned map and a denominator (Kasai et al. 2021, arXiv:2103.13076)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from supra_cli.core.errors import UsageError
from supra_cli.core.layout import HeadSpec, Layout
from supra_cli.core.mixers import Mixer, Rotate, mixers
from supra_cli.core.mixers.parts import HeadMap
from supra_cli.core.ops import linear_attention


@mixers.register("t2r")
class T2R(Mixer):
    """a_i = Σ_{j≤i} φ(q_i)·φ(k_j) v_j / max(Σ_{j≤i} φ(q_i)·φ(k_j), 0.01),   φ(x)_h = ReLU(W_h x_h + b_h)

    The same W_h, b_h serve q (scaled by d^{-1/2} first) and k; with fewer kv heads than heads, k is repeated and
    mapped by each query head's. The paper's bases have absolute positions; rotary ones are put in before the map. No
    decay. Source: section 3 and the authors' code.
    """

    @dataclass(frozen=True)
    class Options:
        feature_size: int = 256
        """Width K' of φ; the paper's language models have 256."""

        def __post_init__(self) -> None:
            if self.feature_size < 1:
                raise UsageError(f"mixer.feature_size is {self.feature_size}, expected at least 1")

    class State(NamedTuple):
        S: Tensor
        """[B, H, K', V + 1] fp32: Σ φ(k) vᵀ and, in the last column, z = Σ φ(k)."""

    def __init__(self, spec: HeadSpec, options: Options):
        super().__init__(spec, options)
        self.phi = HeadMap(spec.heads, spec.head_dim, options.feature_size)

    def reset_parameters(self) -> None:
        self.phi.reset_parameters()

    def init_state(self, batch: int, device: torch.device | str) -> State:
        shape = (batch, self.spec.heads, self.options.feature_size, self.spec.v_dim + 1)
        return self.State(torch.zeros(shape, dtype=torch.float32, device=device))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, rope: Rotate, state: State | None, layout: Layout | None
    ) -> tuple[Tensor, State]:
        group = self.spec.heads // self.spec.kv_heads
        q = self.phi(rope(q) * self.spec.scale).relu()
        k = self.phi(rope(k).repeat_interleave(group, dim=2)).relu()
        # A value of 1 beside v makes the denominator one more column of the numerator.
        v1 = torch.cat((v, torch.ones_like(v[..., :1])), dim=-1).repeat_interleave(group, dim=2)
        o, S = linear_attention(q, k, v1, state=None if state is None else state.S, layout=layout)
        return o[..., :-1] / o[..., -1:].clamp(min=0.01), self.State(S)
