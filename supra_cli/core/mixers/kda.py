"""Kimi delta attention: Gated DeltaNet with a decay for each channel of a key."""

from __future__ import annotations

from torch import nn

from supra_cli.core.mixers import mixers
from supra_cli.core.mixers.gated_delta import GatedDelta


@mixers.register("kda")
class KDA(GatedDelta):
    """S ← diag(e^{g_t}) S,   S ← S + β_t k'_t (v_t - Sᵀ k'_t)ᵀ,   o_t = s_h · Sᵀ q'_t

    g_t = -exp(A_n) softplus(W₂ W₁ x_t + b), a number a row of S, W₂ W₁ of rank V. The rest, start included, is
    `gated_delta`'s: W₂ starts at 0.

    Source: Kimi Linear, arXiv:2510.26692, section 3.
    """

    def decay_map(self) -> nn.Module:
        spec = self.spec
        down = nn.Linear(spec.model_dim, spec.v_dim, bias=False)
        return nn.Sequential(down, nn.Linear(spec.v_dim, self.states * self.state_shape()[0]))

    def reset_parameters(self) -> None:
        self.decay[0].reset_parameters()
        super().reset_parameters()
