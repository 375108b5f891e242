"""Gated DeltaNet: a state that is corrected towards each value; the data choose strength and decay."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from supra_cli.core.errors import UsageError
from supra_cli.core.layout import HeadSpec, Layout, Rotate
from supra_cli.core.mixers import entries, mixers
from supra_cli.core.mixers.parts import (
    HeadMap,
    MatrixMixer,
    MatrixState,
    ShortConv,
    fit_gain,
    gain_moments,
    in_fp32,
    wide,
)
from supra_cli.core.ops import delta_rule

RMS_EPS = 1e-5
_MOST = 1 << 10


class DeltaState(NamedTuple):
    S: Tensor
    """[B, N, K', V] fp32, of N states."""
    q: Tensor
    """The last short_conv - 1 tokens' q [B,·,H,K] as they were before the convolution, fp32; k and v likewise."""
    k: Tensor
    v: Tensor


def check_width(given: float | Sequence[float]) -> None:
    """UsageError for an option key_width that is out of bounds, or none."""
    for width in entries(given):
        if not 1 <= width <= _MOST:
            raise UsageError(f"mixer.key_width is {width}, expected a number from 1 to {_MOST}")


@mixers.register("gated_delta")
class GatedDelta(MatrixMixer):
    """S ← e^{g_t} S,   S ← S + β_t k'_t (v_t - Sᵀ k'_t)ᵀ,   o_t = s_h · Sᵀ q'_t

    x' = act(E_h x̃) / |act(E_h x̃)| of q and k, with maps of their own, β_t = σ(w_β·x_t + b_β), or twice that with
    `negative_eigenvalues`, and g_t = -exp(A_n) softplus(w_g·x_t + b_g), one number a state n. E starts as the
    identity and, below it, key_width - 1 random orthogonal maps that q and k share (the last of them cut off where
    key_width is no whole number); w starts at 0, so that β = σ(0) and the decays of the states lie between 0.999 and
    0.9 a token; the gain s_h starts at 1 and is fitted. As |k'| = 1, a value that was written with β = 1 is what its
    own key reads: q' is not scaled by K^-1/2, which s_h would have to undo. v has no activation.

    x̃ = x + Σ_i w_i ⊙ x_{t-i} of q, k and v, ṽ in place of v above: `ShortConv`, whose w starts at 0, so that it changes
    nothing at first. By it a head can see the token before, which softmax heads do by position and which finding a
    passage again needs.

    Source: Yang, Kautz, Hatamizadeh 2024, arXiv:2412.06464, whose convolutions have an activation.
    """

    variants = ({"key_width": 2.5}, {"short_conv": 0, "rotary": True})

    @dataclass(frozen=True)
    class Options:
        key_width: float | tuple[float, ...] = 1
        """Rows of the state, in multiples of the base's head width, in all layers alike or for each: they bound how
        many keys can be told apart."""
        state_per: Literal["head", "kv_head"] = "head"
        """Under grouped queries: a state, a decay and a β for each query head, or for each kv head, whose query heads
        read one state. With r of these, the same rows take 1/r of the bytes, and r times the rows take the same."""
        activation: Literal["silu", "none"] = "silu"
        """Of the mapped q and k, before they are brought to length 1."""
        rotary: bool = False
        """Whether q and k get the base's positions before the map; without, a key is found at any distance alike."""
        short_conv: int = 4
        """Tokens that q, k and v are each a sum of, the newest included; 0 is none."""
        negative_eigenvalues: bool = False
        """β in (0,2): a transition may then flip the sign of what lies along k (arXiv:2411.12537)."""
        calibrate: bool = False
        """Begin attention transfer with decays that halve the state over a head's mean distance of attention, but by
        e^-0.001 to e^-5 a token, and with β = 0.3 + 0.4 c, where c = Σ_j p_ij² is how concentrated that attention is
        (arXiv:2606.16429); of a shared state by the means of its heads."""
        norm: Literal["none", "rms"] = "none"
        """rms: each head divided by its root mean square, before the gain."""
        output_gate: bool = False
        """Multiply the heads by 2 σ(U x), which starts at 1."""

        def __post_init__(self) -> None:
            check_width(self.key_width)
            if self.short_conv != 0 and not 2 <= self.short_conv <= _MOST:
                raise UsageError(f"mixer.short_conv is {self.short_conv}, expected 0 for none, or from 2 to {_MOST}")

        @property
        def most_written(self) -> int:
            """The least upper bound of β."""
            return 2 if self.negative_eigenvalues else 1

    fitted = ("gain",)

    def __init__(self, spec: HeadSpec, options: Options):
        super().__init__(spec, options)
        # The gain is fitted again to the decays and the β that were fitted first.
        self.fits = 2 if options.calibrate else 1
        rows = options.key_width * spec.head_dim
        if rows != int(rows):
            raise UsageError(
                f"mixer.key_width is {options.key_width}, which is {rows} rows for heads of {spec.head_dim}"
            )
        self.phi_q = HeadMap(spec.heads, spec.head_dim, self.state_shape()[0])
        self.phi_k = HeadMap(spec.kv_heads, spec.head_dim, self.state_shape()[0])
        self.write = nn.Linear(spec.model_dim, self.states)
        self.decay = self.decay_map()
        self.A_log = nn.Parameter(torch.empty(self.states))
        self.gate = nn.Linear(spec.model_dim, spec.heads * spec.v_dim, bias=False) if options.output_gate else None
        self.gain = nn.Parameter(torch.empty(spec.heads, 1))
        shapes = ((spec.heads, spec.head_dim), (spec.kv_heads, spec.head_dim), (spec.kv_heads, spec.v_dim))
        convolved = (ShortConv(*shape, options.short_conv) for shape in shapes if options.short_conv)
        self.convolutions = nn.ModuleList(convolved)

    def decay_map(self) -> nn.Module:
        """x [B,T,D] -> a number a state, or a row of a state, before the softplus; its last bias sets the start."""
        return nn.Linear(self.spec.model_dim, self.states)

    @property
    def states(self) -> int:
        return self.spec.kv_heads if self.options.state_per == "kv_head" else self.spec.heads

    def state_shape(self) -> tuple[int, int]:
        return int(self.options.key_width * self.spec.head_dim), self.spec.v_dim

    def init_state(self, batch: int, device: torch.device | str) -> MatrixState | DeltaState:
        (S,) = super().init_state(batch, device)
        past = [S.new_zeros(batch, *conv.weight.shape) for conv in self.convolutions]
        return DeltaState(S, *past) if past else MatrixState(S)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        width, group = self.spec.head_dim, self.spec.heads // self.spec.kv_heads
        for head in range(self.spec.kv_heads):
            for part in range(math.ceil(self.options.key_width)):
                rows = self.phi_k.weight[head, part * width : (part + 1) * width]
                nn.init.eye_(rows) if part == 0 else nn.init.orthogonal_(rows)
        self.phi_q.weight.copy_(self.phi_k.weight.repeat_interleave(group, 0))
        for zero in (self.phi_q.bias, self.phi_k.bias, self.write.weight, self.write.bias):
            nn.init.zeros_(zero)
        self._begin_with(torch.logspace(-3, -1, self.states, dtype=torch.float64))
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)
        nn.init.ones_(self.gain)
        for conv in self.convolutions:
            conv.reset_parameters()

    def _begin_with(self, rates: Tensor) -> None:
        """Begin with g = -rates [N], whatever x is."""
        last = self.decay if isinstance(self.decay, nn.Linear) else self.decay[-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(self.A_log)
        # The inverse of the softplus.
        last.bias.copy_(rates.double().expm1().log().repeat_interleave(last.out_features // self.states))

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor,
        rope: Rotate,
        state: MatrixState | DeltaState | None,
        layout: Layout | None,
    ) -> tuple[Tensor, MatrixState | DeltaState]:
        S, *past = (None, None, None, None) if state is None else state
        if self.convolutions:
            convolved = zip(self.convolutions, (q, k, v), past, strict=True)
            (q, k, v), past = zip(*(conv(*given, layout) for conv, *given in convolved), strict=True)
        if self.options.rotary:
            q, k = rope(q), rope(k)
        q, k = self._feature(self.phi_q(q)), self._feature(self.phi_k(k))
        beta = in_fp32(self.write, x).sigmoid() * self.options.most_written
        g = self._log_decay(x)
        o, S = delta_rule(q, k, v, g, beta, state=S, layout=layout)
        if self.options.norm == "rms":
            o = nn.functional.rms_norm(wide(o), o.shape[-1:], eps=RMS_EPS).to(o.dtype)
        o = o * self.gain
        if self.gate is not None:
            o = o * 2 * self.gate(x).sigmoid().view(o.shape)
        return o, DeltaState(S, *past) if self.convolutions else MatrixState(S)

    def _feature(self, x: Tensor) -> Tensor:
        x = wide(x)
        return nn.functional.normalize(nn.functional.silu(x) if self.options.activation == "silu" else x, dim=-1)

    def _log_decay(self, x: Tensor) -> Tensor:
        """[B,T,N], or [B,T,N,·] with a number a row."""
        rate = nn.functional.softplus(in_fp32(self.decay, x)).unflatten(-1, (self.states, -1))
        g = -wide(self.A_log).exp().unsqueeze(-1) * rate
        return g.squeeze(-1)

    def moments(self, o: Tensor, taught: Tensor, attention: Callable[[], Tensor]) -> Tensor:
        gains = gain_moments(o, taught)
        return torch.cat((gains, attention())) if self.options.calibrate else gains

    def fit(self, moments: Tensor) -> None:
        fit_gain(self.gain, moments[:2])
        if self.options.calibrate:
            # Of the query heads that read a state, all together.
            distance, concentration, tokens = moments[2:].unflatten(1, (self.states, -1)).sum(2)
            self._begin_with((math.log(2) * tokens / distance).clamp(1e-3, 5))
            nn.init.zeros_(self.write.weight)
            beta = 0.3 + 0.4 * concentration / tokens
            self.write.bias.copy_((beta / self.options.most_written).logit())
