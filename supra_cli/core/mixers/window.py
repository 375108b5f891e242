"""A sliding window of softmax attention with sinks, in a state of fixed size: the baseline that needs no training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from supra_cli.core.errors import UsageError
from supra_cli.core.layout import Layout, Rotate
from supra_cli.core.mixers import Mixer, entries, mixers
from supra_cli.core.mixers.parts import capped, wide
from supra_cli.core.ops import without_autocast

BLOCK = 16
"""Fewest queries in a block, unless there are fewer tokens."""
_MOST = 1 << 20


class WindowState(NamedTuple):
    """The current document's first and last tokens, keys rotated; places that `seen` has not reached hold anything."""

    sink_k: Tensor
    """[B, sinks, G, K] fp32."""
    sink_v: Tensor
    recent_k: Tensor
    """[B, window - 1 + beyond, G, K] fp32, the newest last."""
    recent_v: Tensor
    seen: Tensor
    """[B] int64: tokens of the current document so far."""


@mixers.register("window")
class Window(Mixer):
    """o_i = Σ_j softmax_j(c(q_i·k_j · scale)) v_j  over  i - window < j ≤ i  and  j < sinks,  within i's document

    c is the base's soft cap, if it has one. No parameters; positions stay the base's own. Time and memory are linear in
    T: each block of queries meets the band of keys that its window reaches, and each query its document's sinks.

    Source: StreamingLLM (Xiao et al. 2024, arXiv:2309.17453), without its renumbering of positions inside the cache.
    """

    @dataclass(frozen=True)
    class Options:
        window: int | tuple[int, ...] = 64
        """Tokens that a query sees, itself included, in all layers alike or for each."""
        sinks: int = 4
        """First tokens of the document, which every query sees."""

        def __post_init__(self) -> None:
            for window in entries(self.window):
                if not 1 <= window <= _MOST:
                    raise UsageError(f"mixer.window is {window}, expected a number from 1 to {_MOST}")
            if not 0 <= self.sinks <= _MOST:
                raise UsageError(f"mixer.sinks is {self.sinks}, expected a number from 0 to {_MOST}")

    beyond: int = 0
    """Tokens that the state keeps besides those that the next query sees."""
    softens = True
    variants = ({"window": 5, "sinks": 2}, {"window": 3, "sinks": 0})

    def init_state(self, batch: int, device: torch.device | str) -> WindowState:
        def zeros(tokens: int, width: int) -> Tensor:
            return torch.zeros((batch, tokens, self.spec.kv_heads, width), dtype=torch.float32, device=device)

        k, v, sinks = self.spec.head_dim, self.spec.v_dim, self.options.sinks
        recent = self.options.window - 1 + self.beyond
        seen = torch.zeros(batch, dtype=torch.int64, device=device)
        return WindowState(zeros(sinks, k), zeros(sinks, v), zeros(recent, k), zeros(recent, v), seen)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, rope: Rotate, state: WindowState | None, layout: Layout | None
    ) -> tuple[Tensor, WindowState]:
        state = self.init_state(len(x), x.device) if state is None else state
        sight = self.look(rope(q), rope(k), v, state, layout)
        return sight.o, sight.state

    def look(self, q: Tensor, k: Tensor, v: Tensor, state: WindowState, layout: Layout | None) -> Sight:
        """What the window shows of rotated q and k."""
        tokens, window, sinks = q.shape[1], self.options.window, self.options.sinks
        block = min(tokens, max(window - 1, BLOCK))
        rows, asked = read_rows(layout, state.seen, tokens, block), q
        q, k, v = (rows.gather(heads) for heads in (wide(q) * self.spec.scale, k, v))
        kept_k, kept_v = join(state.recent_k, k), join(state.recent_v, v)
        near_k, near_v = kept_k[:, self.beyond :], kept_v[:, self.beyond :]
        far_k, far_v = join(state.sink_k, k), join(state.sink_v, v)
        sink_at = rows.sinks(state.seen, sinks)

        q = q.unflatten(2, (self.spec.kv_heads, -1)).unflatten(1, (-1, block))
        with without_autocast(q.device.type):  # a score of 40 in bf16 is off by up to 1/8, its weight by an eighth
            near = torch.einsum("bncgrk,bnlgk->bncgrl", q, bands(wide(near_k), window, block))
            far = torch.einsum("bncgrk,bncsgk->bncgrs", q, take(wide(far_k), sink_at).unflatten(1, (-1, block)))
        near = hide(capped(near, self.spec.softcap), rows.in_window(state.seen, window, block))
        # A sink inside the window is in the band already.
        beyond = torch.arange(sinks, device=q.device) <= rows.position[..., None] - window
        far = hide(capped(far, self.spec.softcap), beyond.unflatten(1, (-1, block)))

        scores = torch.cat((near, far), dim=-1)
        weights = scores.softmax(-1)
        near, far = weights.to(v.dtype).split((near.shape[-1], sinks), dim=-1)
        o = torch.einsum("bncgrl,bnlgv->bncgrv", near, bands(near_v, window, block))
        o = o + torch.einsum("bncgrs,bncsgv->bncgrv", far, take(far_v, sink_at).unflatten(1, (-1, block)))

        real = (rows.document >= 0).sum(-1)
        newest = real[:, None] + torch.arange(window - 1 + self.beyond, device=q.device)
        last = (real - 1).clamp(min=0)[:, None]
        first = take(sink_at, last)[:, 0]
        seen = torch.where(real > 0, take(rows.position, last)[:, 0] + 1, state.seen)
        kept = (take(far_k, first), take(far_v, first), take(kept_k, newest), take(kept_v, newest))
        after = WindowState(*(part.float() for part in kept), seen)
        return Sight(rows, asked, rows.scatter(by_token(o), tokens), scores, weights, kept_k, kept_v, after)


class Sight(NamedTuple):
    """What a call of a window showed."""

    rows: Rows
    q: Tensor
    """[B, T, H, K], rotated."""
    o: Tensor
    """[B, T, H, V]."""
    scores: Tensor
    """[B, blocks, queries of a block, G, H / G, ·] in fp32 or finer, of the window and the sinks; the format's least
    number where a key is not seen."""
    weights: Tensor
    """Their softmax."""
    kept_k: Tensor
    """[B, window - 1 + beyond + T, G, K], the state's recent tokens and the call's, each row's real ones first."""
    kept_v: Tensor
    state: WindowState

    def log_mass(self) -> Tensor:
        """log Σ_j exp(s_ij) of every query's scores s_ij, [B, T, H]."""
        return self._by_query(self.scores.amax(-1, keepdim=True)) + self.denominator().log()

    def denominator(self) -> Tensor:
        """Σ_j exp(s_ij - max_j s_ij) of every query's scores s_ij, [B, T, H]: the inverse of the largest weight."""
        return self._by_query(1 / self.weights.amax(-1, keepdim=True))

    def _by_query(self, x: Tensor) -> Tensor:
        return self.rows.scatter(by_token(x), self.o.shape[1]).squeeze(-1)


class Rows(NamedTuple):
    """A batch with each row's real tokens first, then padding up to whole blocks; all [B, T]."""

    order: Tensor | None
    """Where each token was; None if nothing moved."""
    document: Tensor
    """Number of its document, -1 on padding."""
    start: Tensor
    """Where that document starts in the row."""
    goes_on: Tensor
    """Whether that document is the one that the state belongs to."""
    position: Tensor
    """Tokens of the document before this one."""

    def gather(self, x: Tensor) -> Tensor:
        x = x if self.order is None else take(x, self.order)
        return pad(x, (0, 0, 0, 0, 0, self.document.shape[1] - x.shape[1]))

    def scatter(self, x: Tensor, tokens: int) -> Tensor:
        x = x[:, :tokens]
        return x if self.order is None else take(x, self.order.argsort(-1))

    def sinks(self, seen: Tensor, sinks: int) -> Tensor:
        """[B, T, sinks]: where in [the state's sinks | the tokens] each token's document has its first ones."""
        number = torch.arange(sinks, device=seen.device)
        before = (self.goes_on * seen[:, None])[..., None]
        here = sinks + self.start[..., None] + number - before
        return torch.where(number < before, number, here).clamp(max=sinks + self.document.shape[1] - 1)

    def in_window(self, seen: Tensor, window: int, block: int) -> Tensor:
        """[B, blocks, queries of a block, keys of its band]: whether the key is in the query's window and document."""
        age = torch.arange(window - 1, 0, -1, device=seen.device)
        recent = torch.where(age <= seen[:, None], self.document[:, :1], -2)
        keys = bands(torch.cat((recent, self.document), dim=1), window, block)[:, :, None]
        queries = self.document.unflatten(1, (-1, block))[..., None]
        distance = window - 1 + torch.arange(block, device=seen.device)[:, None]
        distance = distance - torch.arange(keys.shape[-1], device=seen.device)
        return (keys == queries) & (distance >= 0) & (distance < window)


def read_rows(layout: Layout | None, seen: Tensor, tokens: int, block: int) -> Rows:
    if layout is None:
        order, document = None, torch.zeros((len(seen), tokens), dtype=torch.int64, device=seen.device)
    else:
        order = None if tokens == 1 else (layout.segment < 0).long().argsort(dim=-1, stable=True)
        document = layout.segment if order is None else layout.segment.gather(1, order)
    document = pad(document, (0, -tokens % block), value=-1)
    index = torch.arange(document.shape[1], device=seen.device)
    begins = document != torch.cat((document[:, :1], document[:, :-1]), dim=1)
    start = (index * begins).cummax(-1).values
    goes_on = document == document[:, :1]
    return Rows(order, document, start, goes_on, index - start + goes_on * seen[:, None])


def take(x: Tensor, index: Tensor) -> Tensor:
    """x[b, index[b, ...]] for x [B, S, ...] and index [B, ...]."""
    batch = torch.arange(len(x), device=x.device).view(-1, *[1] * (index.ndim - 1))
    return x[batch, index]


def by_token(x: Tensor) -> Tensor:
    """[B, blocks, queries of a block, G, H / G, ·] -> [B, T, H, ·]."""
    return x.flatten(3, 4).flatten(1, 2)


def join(old: Tensor, new: Tensor) -> Tensor:
    return torch.cat((old.to(new.dtype), new), dim=1)


def bands(x: Tensor, window: int, block: int) -> Tensor:
    """[B, window - 1 + T, ...] -> [B, T / block, window - 1 + block, ...]: what each block of queries can reach."""
    return x.unfold(1, window - 1 + block, block).movedim(-1, 2)


def hide(scores: Tensor, visible: Tensor) -> Tensor:
    """The scores [B,N,C,G,R,·] with the dtype's minimum where `visible` [B,N,C,·] is false."""
    return scores.masked_fill(~visible[:, :, :, None, None], torch.finfo(scores.dtype).min)
