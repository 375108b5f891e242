"""Mamba-2: a state space whose decay and step width are one number that the data choose (Dao and Gu 2024)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from supra_cli.core.layout import HeadSpec, Layout, Rotate
from supra_cli.core.mixers import mixers
from supra_cli.core.mixers.parts import HeadNorm, MatrixMixer, MatrixState, gain_moments, in_fp32, wide
from supra_cli.core.ops import linear_attention

SLOWEST, FASTEST = 1e-3, 1e-1
"""exp(A_log) of the first and the last head at the start, those between in even ratios: at a step of 1 the memory of a
head fades to 1/e in 1,000 to 10 tokens."""


@mixers.register("mamba2")
class Mamba2(MatrixMixer):
    """S_t = a_t S_{t-1} + Δ_t B_t x_tᵀ,   y_t = d^{-1/2} C_tᵀ S_t + D_h x_t,   o_t = GroupNorm(y_t) s_h 2 σ(U u_t)

    a_t = exp(-exp(A_log_h) Δ_t),   Δ_t = softplus(W u_t + b)_h, with u the layer's input, and of the teacher C = q and
    B = k after the rotation and x = v; with fewer kv heads than heads, B and x are repeated, as Δ and a belong to each
    query head. It starts with W = 0, Δ = 1, D = 0, s = 1, U = 0: the teacher's q, k and v, forgotten slowly; attention
    transfer then sets s in closed form. A per-head GroupNorm takes the place of the paper's RMSNorm over all heads.

    Left out of Mamba-2's block: the short convolution and SiLU on x, B and C, which would spoil the v that the output
    projection was trained for; its own input and output projections, since the base's serve; a gate through SiLU before
    the norm, since 2 σ starts at 1.

    Source: arXiv:2405.21060, sections 6 and 7; from attention's weights as in arXiv:2408.15237.
    """

    @dataclass(frozen=True)
    class Options:
        output_gate: bool = True
        """Multiply the heads by 2 σ(U u), which starts at 1."""

    fitted = ("norm.gain",)

    def __init__(self, spec: HeadSpec, options: Options):
        super().__init__(spec, options)
        self.step = nn.Linear(spec.model_dim, spec.heads)
        self.A_log = nn.Parameter(torch.empty(spec.heads))
        self.D = nn.Parameter(torch.empty(spec.heads, 1))
        self.norm = HeadNorm(spec.heads, "head")
        self.gate = nn.Linear(spec.model_dim, spec.heads * spec.v_dim, bias=False) if options.output_gate else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.zeros_(self.step.weight)
        nn.init.constant_(self.step.bias, 0.5413)  # softplus of it is 1
        self.A_log.copy_(torch.logspace(0, 1, self.spec.heads, base=FASTEST / SLOWEST).mul(SLOWEST).log())
        nn.init.zeros_(self.D)
        self.norm.reset_parameters()
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, rope: Rotate, state: MatrixState | None, layout: Layout | None
    ) -> tuple[Tensor, MatrixState]:
        k, v = (heads.repeat_interleave(self.spec.heads // self.spec.kv_heads, dim=2) for heads in (rope(k), v))
        step = softplus(in_fp32(self.step, x))
        g, scaled = -wide(self.A_log).exp() * step, v * step.unsqueeze(-1).to(v.dtype)
        S, scale = None if state is None else state.S, self.spec.head_dim**-0.5
        o, S = linear_attention(rope(q), k, scaled, g, scale=scale, state=S, layout=layout, wide=True)
        o = self.norm(o + wide(self.D) * v, v.dtype)
        if self.gate is not None:
            o = o * 2 * self.gate(x).sigmoid().view(o.shape)
        return o, MatrixState(S)

    def target(self, o: Tensor) -> Tensor:
        return self.norm.target(o)

    def moments(self, o: Tensor, taught: Tensor, attention: Callable[[], Tensor]) -> Tensor:
        return gain_moments(o, taught)

    def fit(self, moments: Tensor) -> None:
        self.norm.fit(moments)
