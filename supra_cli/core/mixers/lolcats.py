"""A softmax window beside a recurrent branch, LoLCATs (Zhang et al. 2024), and the same with the delta rule."""

from __future__ import annotations

import math
from collections import namedtuple
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from supra_cli.core.errors import UsageError
from supra_cli.core.layout import HeadSpec, Layout, Rotate
from supra_cli.core.mixers import mixers
from supra_cli.core.mixers.gated_delta import DeltaState, GatedDelta, check_width
from supra_cli.core.mixers.parts import HedgehogMap, ReluMap, in_fp32, nearly_none, wide
from supra_cli.core.mixers.window import Sight, Window, WindowState
from supra_cli.core.ops import linear_attention

LolcatsState = namedtuple("LolcatsState", (*WindowState._fields, "S"))
"""A `WindowState` with one token more, the next to leave, and the branch's memory of what has left before it, S
[B, H, K', V + 1] fp32, its last column the branch's denominator."""

GatedState = namedtuple("GatedState", (*WindowState._fields, *DeltaState._fields))
"""A `WindowState` and a `DeltaState`, with branch gated_delta."""


class Inputs(NamedTuple):
    """What a mixer is called with, but for its state."""

    q: Tensor
    k: Tensor
    v: Tensor
    x: Tensor
    rope: Rotate
    layout: Layout | None


Answer = tuple[Tensor, Tensor, tuple[Tensor, ...]]
"""Of a branch: its heads [B,T,H,V], its part p of the answer [B,T,H], and its memory after the call."""


class Attended(nn.Module):
    """Attention by a feature map over what has left the window, under the window's own denominator."""

    State = LolcatsState
    beyond = 1

    def __init__(self, spec: HeadSpec, options: Lolcats.Options):
        super().__init__()
        self.window = options.window
        kind = ReluMap if options.branch == "t2r" else HedgehogMap
        self.phi_q, self.phi_k = (kind(heads, spec.head_dim) for heads in (spec.heads, spec.kv_heads))
        self.decay = nn.Linear(spec.model_dim, spec.heads) if options.branch == "gated" else None
        self.log_f = nn.Parameter(torch.empty(spec.heads))
        self.state_shape = spec.heads, self.phi_k.width * spec.head_dim, spec.v_dim + 1

    def reset_parameters(self) -> None:
        for phi in (self.phi_q, self.phi_k):
            phi.reset_parameters()
        nn.init.constant_(self.log_f, math.log(0.1))
        if self.decay is not None:
            nearly_none(self.decay)

    def init_state(self, batch: int, device: torch.device | str) -> tuple[Tensor, ...]:
        return (torch.zeros((batch, *self.state_shape), dtype=torch.float32, device=device),)

    def forward(self, inputs: Inputs, sight: Sight, left: Tensor, memory: tuple[Tensor, ...]) -> Answer:
        x, (S,), tokens = inputs.x, memory, inputs.x.shape[1]
        # What leaves the window with token i is token i - window, which the call and its state have at place i.
        kept = (part[:, : -self.window] for part in (sight.kept_k, sight.kept_v))
        leaving_k, leaving_v = (sight.rows.scatter(part, tokens) for part in kept)
        keys = self.phi_k(leaving_k).masked_fill(~left[..., None, None], 0)
        g = None if self.decay is None else nn.functional.logsigmoid(in_fp32(self.decay, x))
        asked = {"layout": inputs.layout, "denominator_min": 1e-6, "denominators": True}
        past, S, d = linear_attention(self.phi_q(sight.q), keys, leaving_v, g, state=S, **asked)
        recurrence = wide(self.log_f).exp() * d
        return past, recurrence / (sight.denominator() + recurrence), (S,)


class Corrected(nn.Module):
    """The delta rule over every token, and a gate that knows how much the window has found."""

    State = GatedState
    beyond = 0

    def __init__(self, spec: HeadSpec, options: Lolcats.Options):
        super().__init__()
        self.delta = GatedDelta(spec, GatedDelta.Options(key_width=options.key_width, state_per=options.state_per))
        self.mix = nn.Linear(spec.model_dim, spec.heads)
        self.mass = nn.Parameter(torch.empty(spec.heads))

    def reset_parameters(self) -> None:
        self.delta.reset_parameters()
        for part in (self.mix.weight, self.mix.bias, self.mass):
            nn.init.zeros_(part)

    def init_state(self, batch: int, device: torch.device | str) -> tuple[Tensor, ...]:
        return self.delta.init_state(batch, device)

    def forward(self, inputs: Inputs, sight: Sight, left: Tensor, memory: tuple[Tensor, ...]) -> Answer:
        *call, layout = inputs
        past, memory = self.delta(*call, DeltaState(*memory), layout)
        return past, (in_fp32(self.mix, inputs.x) - wide(self.mass) * sight.log_mass()).sigmoid(), memory


@mixers.register("lolcats")
class Lolcats(Window):
    """o_i = (1 - p_i) o_W + p_i o_P, the answer o_W of a softmax window, as in `window`, and a recurrent branch's, o_P

    By `branch`:

    hedgehog      a_ij = φ(q_i)·φ(k_j),   φ(x)_h = [softmax(W_h x_h + b_h), softmax(-W_h x_h - b_h)]
    t2r           a_ij = φ(q_i)·φ(k_j),   φ(x)_h = ReLU(W_h x_h + b_h)
    gated         a_ij = (Π_t γ_t) φ(q_i)·φ(k_j) over the tokens t ≤ i since k_j left the window, φ Hedgehog's,
                  γ_t = σ(w_h·x_t + b_h)
    gated_delta   o_P is what the mixer `gated_delta` answers, with `key_width`, `state_per` and a short convolution

    The first three are one attention with the window, under one denominator:

    o_i = ( Σ_{j in W_i} e_ij v_j + f_h Σ_{j in P_i} a_ij v_j ) / ( Σ_{j in W_i} e_ij + f_h Σ_{j in P_i} a_ij )

    W_i are i's window and sinks, and P_i all other tokens of its document before them: every token is in one of the
    two. e_ij = exp(s_ij - max_{j in W_i} s_ij) of the scores s_ij = c(q_i·k_j · scale); f_h > 0 is learned and 0.1 at
    the start. q and k are rotated; query heads and kv heads have maps of their own, which begin at W = 1 and b = 0, and
    γ at 0.9975. A token enters the branch when it leaves the window, `window` tokens after it was read: the keys and
    values of the branch are the layer's own, later. p is the branch's part of the denominator.

    The delta rule has no denominator, and what it writes depends on all that was written before: its branch sees every
    token of the document, and p_i = σ(w_h·x_i + b_h - m_h log Σ_{j in W_i} exp(s_ij)), with w, b and m at 0 in the
    beginning. With m_h = 1 that is one denominator again, in which exp(w_h·x_i + b_h) stands for all that the window
    does not see; without m, the gate could not know whether the window holds what the query looks for.

    The branch is easily bypassed: a trained hybrid may answer from its window alone (arXiv:2510.05901). So the two are
    named in `branches`, and `window_dropout` makes the branch learn to answer alone.

    Source: arXiv:2410.10254, section 3.2, and the authors' code; they have neither sinks nor decay nor delta rule.
    """

    @dataclass(frozen=True)
    class Options(Window.Options):
        branch: Literal["hedgehog", "t2r", "gated", "gated_delta"] = "hedgehog"
        """The recurrent branch: its feature map, and what it forgets."""
        key_width: float | tuple[float, ...] = 1
        """Of branch gated_delta: rows of its state, in multiples of the base's head width, alike in all layers or for
        each."""
        state_per: Literal["head", "kv_head"] = "head"
        """Of branch gated_delta: as that mixer's own option."""
        window_dropout: float = 0.0
        """Part of the rows of attention transfer whose window is silent at tokens that it does not see all before: so
        many where the stage begins, falling evenly to none where it ends. In later stages, where a silent window would
        pull at the rest of the model, none."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 0 <= self.window_dropout <= 1:
                raise UsageError(f"mixer.window_dropout is {self.window_dropout}, expected a number from 0 to 1")
            check_width(self.key_width)
            for key, default in (("key_width", 1), ("state_per", "head")):
                if self.branch != "gated_delta" and getattr(self, key) != default:
                    raise UsageError(f"mixer.{key} is of branch 'gated_delta', and mixer.branch is '{self.branch}'")

    branches = ("window", "recurrence")
    variants = (
        {"window": 5, "sinks": 2},
        {"window": 3, "sinks": 0, "branch": "t2r"},
        {"window": 1, "sinks": 1, "branch": "gated"},
        {"window": 4, "sinks": 1, "branch": "gated_delta", "key_width": 2, "state_per": "kv_head"},
    )

    def __init__(self, spec: HeadSpec, options: Options):
        super().__init__(spec, options)
        self.recurrence = (Corrected if options.branch == "gated_delta" else Attended)(spec, options)
        self.beyond = self.recurrence.beyond

    def reset_parameters(self) -> None:
        self.recurrence.reset_parameters()

    def init_state(self, batch: int, device: torch.device | str) -> NamedTuple:
        return self.recurrence.State(*super().init_state(batch, device), *self.recurrence.init_state(batch, device))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, rope: Rotate, state: NamedTuple | None, layout: Layout | None
    ) -> tuple[Tensor, NamedTuple]:
        state = self.init_state(len(x), x.device) if state is None else state
        parts = len(WindowState._fields)
        sight = self.look(rope(q), rope(k), v, WindowState(*state[:parts]), layout)
        left = sight.rows.position >= self.options.window + self.options.sinks
        left = sight.rows.scatter(left, x.shape[1])
        past, share, memory = self.recurrence(Inputs(q, k, v, x, rope, layout), sight, left, state[parts:])
        share = self._heard(share, left).unsqueeze(-1).to(past.dtype)
        return torch.lerp(sight.o.to(past.dtype), past, share), self.recurrence.State(*sight.state, *memory)

    def _heard(self, share: Tensor, left: Tensor) -> Tensor:
        """The branch's part p [B,T,H], where one of the two is silent."""
        if self.only is not None:
            return torch.full_like(share, self.only == "recurrence")
        silenced = self.options.window_dropout * (1 - self.progress) if self.training else 0
        if silenced:
            silent = torch.rand(len(left), 1, device=left.device) < silenced
            share = share.masked_fill((silent & left)[..., None], 1)
        return share
