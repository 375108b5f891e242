"""A softmax window and a recurrent branch for what has left it, under one denominator: LoLCATs (Zhang et al. 2024)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from supra_cli.core.errors import UsageError
from supra_cli.core.layout import HeadSpec, Layout, Rotate
from supra_cli.core.mixers import mixers
from supra_cli.core.mixers.parts import HedgehogMap, ReluMap, nearly_none, wide
from supra_cli.core.mixers.window import Window, WindowState
from supra_cli.core.ops import linear_attention


class LolcatsState(NamedTuple):
    """A `WindowState` with one token more, the next to leave, and the branch's memory of what has left before it."""

    sink_k: Tensor
    sink_v: Tensor
    recent_k: Tensor
    """[B, window, G, K] fp32, the newest last."""
    recent_v: Tensor
    seen: Tensor
    S: Tensor
    """[B, H, K', V + 1] fp32, its last column the branch's denominator."""


@mixers.register("lolcats")
class Lolcats(Window):
    """o_i = ( Σ_{j in W_i} e_ij v_j + f_h Σ_{j in P_i} a_ij v_j ) / ( Σ_{j in W_i} e_ij + f_h Σ_{j in P_i} a_ij )

    W_i are i's window and sinks, as in `window`, and P_i all other tokens of its document before them: every token is
    in one of the two. e_ij = exp(s_ij - max_{j in W_i} s_ij) of the scores s_ij = c(q_i·k_j · scale); f_h > 0 is
    learned and 0.1 at the start. q and k are rotated. By `branch`, with maps of their own for query heads and kv heads:

    hedgehog    a_ij = φ(q_i)·φ(k_j),   φ(x)_h = [softmax(W_h x_h + b_h), softmax(-W_h x_h - b_h)]
    t2r         a_ij = φ(q_i)·φ(k_j),   φ(x)_h = ReLU(W_h x_h + b_h)
    gated       a_ij = (Π_t γ_t) φ(q_i)·φ(k_j) over the tokens t ≤ i since k_j left the window, φ Hedgehog's,
                γ_t = σ(w_h·x_t + b_h)

    They begin at W = 1 and b = 0, and γ at 0.9975.

    A token enters the branch when it leaves the window, `window` tokens after it was read: the keys and values of the
    branch are the layer's own, later. o is computed as (1 - p) o_W + p o_P of the answers of both, p the branch's part
    of the denominator.

    The branch is easily bypassed: a trained hybrid may answer from its window alone (arXiv:2510.05901). So the two are
    named in `branches`, and `window_dropout` makes the branch answer alone in training.

    Source: arXiv:2410.10254, section 3.2, and the authors' code; they have neither sinks nor decay.
    """

    @dataclass(frozen=True)
    class Options(Window.Options):
        branch: Literal["hedgehog", "t2r", "gated"] = "hedgehog"
        """The recurrent branch: its feature map, and whether it decays."""
        window_dropout: float = 0.0
        """Part of the rows in training whose window is silent at tokens that have something in the branch: so many
        where a stage begins, falling evenly to none where it ends."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 0 <= self.window_dropout <= 1:
                raise UsageError(f"mixer.window_dropout is {self.window_dropout}, expected a number from 0 to 1")

    beyond = 1
    branches = ("window", "recurrence")
    variants = (
        {"window": 5, "sinks": 2},
        {"window": 3, "sinks": 0, "branch": "t2r"},
        {"window": 1, "sinks": 1, "branch": "gated"},
    )
    progress: float = 0.0
    """Part of its stage's steps that a run has taken, set by the training loop."""

    def __init__(self, spec: HeadSpec, options: Options):
        super().__init__(spec, options)
        kind = ReluMap if options.branch == "t2r" else HedgehogMap
        self.phi_q, self.phi_k = (kind(heads, spec.head_dim) for heads in (spec.heads, spec.kv_heads))
        self.decay = nn.Linear(spec.model_dim, spec.heads) if options.branch == "gated" else None
        self.log_f = nn.Parameter(torch.empty(spec.heads))

    def reset_parameters(self) -> None:
        for phi in (self.phi_q, self.phi_k):
            phi.reset_parameters()
        nn.init.constant_(self.log_f, math.log(0.1))
        if self.decay is not None:
            nearly_none(self.decay)

    def init_state(self, batch: int, device: torch.device | str) -> LolcatsState:
        shape = (batch, self.spec.heads, self.phi_k.width * self.spec.head_dim, self.spec.v_dim + 1)
        S = torch.zeros(shape, dtype=torch.float32, device=device)
        return LolcatsState(*super().init_state(batch, device), S)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor,
        rope: Rotate,
        state: LolcatsState | None,
        layout: Layout | None,
    ) -> tuple[Tensor, LolcatsState]:
        batch, tokens = x.shape[:2]
        *seen, S = self.init_state(batch, x.device) if state is None else state
        q, window = rope(q), self.options.window
        sight = self.look(q, rope(k), v, WindowState(*seen), layout)

        # What leaves the window with token i is token i - window, which the call and its state have at place i.
        leaving_k, leaving_v = (sight.rows.scatter(part[:, :-window], tokens) for part in (sight.kept_k, sight.kept_v))
        left = sight.rows.scatter(sight.rows.position >= window + self.options.sinks, tokens)
        keys = self.phi_k(leaving_k).masked_fill(~left[..., None, None], 0)
        g = None if self.decay is None else nn.functional.logsigmoid(wide(self.decay(x)))
        asked = {"denominator_min": 1e-6, "denominators": True}
        past, S, d = linear_attention(self.phi_q(q), keys, leaving_v, g, state=S, layout=layout, **asked)

        share = self._share(sight.denominator(), d, left).unsqueeze(-1).to(past.dtype)
        return torch.lerp(sight.o.to(past.dtype), past, share), LolcatsState(*sight.state, S)

    def _share(self, window: Tensor, d: Tensor, left: Tensor) -> Tensor:
        """The branch's part p of the denominator [B,T,H] that the window's sum of weights and its own, d, make up."""
        if self.only is not None:
            return torch.full_like(d, self.only == "recurrence")
        recurrence = wide(self.log_f).exp() * d
        share = recurrence / (window + recurrence)
        silenced = self.options.window_dropout * (1 - self.progress) if self.training else 0
        if silenced:
            silent = torch.rand(len(left), 1, device=left.device) < silenced
            share = share.masked_fill((silent & left)[..., None], 1)
        return share
