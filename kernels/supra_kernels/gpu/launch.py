"""Tensors in, kernels launched, tensors out: forward and backward in chunks. No autograd here.

Tile sizes are pinned by K, V, the dtype and the card (supra_kernels.gpu.fit), never tuned at run time, so results do
not vary between processes. By B · H, T and the card's processors it is chosen into how many spans a long walk is cut
(`_spans`): there the last bits of a row may depend on how many rows are beside it.
"""

from __future__ import annotations

import contextlib
from functools import cached_property
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from supra_kernels.boundaries import DECAY_FLOOR
from supra_kernels.gpu import fit
from supra_kernels.gpu.decay import decay_kernel
from supra_kernels.gpu.finish import finish_backward_kernel
from supra_kernels.gpu.fit import CHUNK
from supra_kernels.gpu.key_side import key_side_kernel
from supra_kernels.gpu.query_side import query_side_kernel
from supra_kernels.gpu.states import states_kernel
from supra_kernels.gpu.sums import sums_kernel
from supra_kernels.gpu.tiles import FIXED_DECAY, NO_DECAY, TOKEN_DECAY

INTERPRETED = not isinstance(states_kernel, triton.JITFunction)
"""True under TRITON_INTERPRET=1, where bf16 arithmetic is wrong: operands are widened to fp32 before the launch."""


class Gradients(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    state: Tensor


class Problem:
    """One call: operands made contiguous, sizes, and the compile-time arguments that all kernels share.

    With `sums` a state is [B,H,K,V+1] wherever it comes in or goes out, its last column z = Σ k, for a denominator.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        documents: Tensor | None,
        scale: float,
        sums: bool = False,
    ):
        self.q, self.k, self.v = (operand(x) for x in (q, k, v))
        self.g = None if g is None else g.float().clamp(min=DECAY_FLOOR).contiguous()
        self.documents, self.scale = documents, scale
        self.batch, self.length, self.heads, self.key_dim = q.shape
        self.kv_heads, self.v_dim = v.shape[2:]
        self.chunks, self.sums = triton.cdiv(self.length, CHUNK), sums
        self.half = not INTERPRETED and all(x.dtype == torch.bfloat16 for x in (q, k, v))
        self.card = fit.card_of(q.device)
        self.size = 2 if self.half else 4
        """Bytes of a number that enters a product."""
        self.state_dtype = torch.bfloat16 if self.half else torch.float32
        self.shared = {
            "C": CHUNK,
            "DECAY": (NO_DECAY if g is None else FIXED_DECAY if g.dim() == 1 else TOKEN_DECAY).value,
            "PACKED": documents is not None,
            "OPERAND": tl.bfloat16 if self.half else tl.float32,
            "PRECISION": _precision(),
        }

    @cached_property
    def weighing(self) -> tuple[Tensor | None, ...]:
        """What every kernel over chunks makes its weights of: g, count and rest of sums_kernel, the documents' code."""
        by_token = self.g is not None and self.g.dim() == 3
        if not by_token and (self.g is None or self.documents is None):
            return self.g, None, None, self.documents
        heads = self.heads if by_token else 1
        count = self.empty(self.batch, heads, self.length)
        rest = torch.empty_like(count) if by_token else None
        BH = min(16, triton.next_power_of_2(heads))
        with on_device(self.q):
            sums_kernel[(self.batch * self.chunks * triton.cdiv(heads, BH),)](
                self.g, self.documents, count, rest, self.length, self.chunks, heads,
                C=CHUNK, BH=BH, DECAY=self.shared["DECAY"], PACKED=self.shared["PACKED"], num_warps=4,
            )  # fmt: skip
        return self.g, count, rest, self.documents

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.q.device)


def resident(programs: int, warps: int) -> dict[str, int]:
    """The options that let `programs` of so many warps reside on one multiprocessor of 2^16 registers: while one waits
    for memory another computes."""
    limit = {} if INTERPRETED or torch.version.hip else {"maxnreg": 2**16 // (programs * warps * 32) // 8 * 8}
    return {"num_warps": warps, **limit}


def _precision() -> str:
    """Of fp32 products: three tf32 ones keep fp32's digits on tensor cores; one where PyTorch's own may be tf32."""
    if torch.version.hip or INTERPRETED:
        return "ieee"
    # Not allow_tf32, which raises where a process has set this newer name; setting either sets this one.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def operand(x: Tensor) -> Tensor:
    return (x.float() if INTERPRETED and x.dtype != torch.float32 else x).contiguous()


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _spans(problem: Problem, programs: int) -> int:
    """Into how many spans the walk over chunks is cut, so that the processors are busy when B · H is small."""
    processors = problem.card.processors
    if not problem.q.is_cuda or problem.chunks < 32 or programs >= processors:
        return 1
    return max(1, min(triton.cdiv(2 * processors, programs), problem.chunks // 8))


class Walk(NamedTuple):
    """What a walk met at every chunk, S [B,H,N,K,V] in the state's dtype and z [B,H,N,K] fp32 (None without sums), and
    its end [B,H,K,V or V+1] fp32."""

    states: Tensor
    z: Tensor | None
    end: Tensor


def walk(
    problem: Problem,
    x: Tensor,
    y: Tensor,
    initial: Tensor | None,
    *,
    reverse: bool,
    dd: Tensor | None = None,
    spans: int | None = None,
) -> Walk:
    """Forwards with x = k and y = v, backwards with x = q, y = do and, with sums, dd; see states_kernel.

    In more than one span, a first walk over each from zero gives what it adds; the starts follow from these in order.
    """
    tiles = fit.walk(
        problem.card, problem.key_dim, problem.v_dim, size=problem.size, stages=3,
        programs=_together(problem, 3 if problem.sums else 4),
    )  # fmt: skip
    BK, BV = tiles.inner, tiles.outer
    programs = problem.batch * problem.heads * triton.cdiv(problem.key_dim, BK) * triton.cdiv(problem.v_dim, BV)
    spans = spans or _spans(problem, programs)
    span = triton.cdiv(problem.chunks, spans)
    spans = triton.cdiv(problem.chunks, span)
    lead = (problem.batch, problem.heads)
    width = (problem.key_dim, problem.v_dim)
    states = problem.empty(*lead, problem.chunks, *width, dtype=problem.state_dtype)
    z = problem.empty(*lead, problem.chunks, problem.key_dim) if problem.sums else None
    end = problem.empty(*lead, spans, problem.key_dim, problem.v_dim + problem.sums)
    through = problem.empty(*lead, spans)

    def launch(start: Tensor | None, store: bool) -> None:
        states_kernel[(programs * spans,)](
            x, y, dd, *problem.weighing, start, states, z, end, through,
            problem.length, problem.chunks, span, spans, problem.heads, x.shape[2], y.shape[2], problem.scale,
            **problem.shared, K=problem.key_dim, V=problem.v_dim, BK=BK, BV=BV, SUMS=problem.sums,
            REVERSE=reverse, STORE=store, INITIAL=start is not None,
            **_options(tiles, warps=4),
        )  # fmt: skip

    with on_device(problem.q):
        if spans > 1:
            launch(None, store=False)
            initial = _span_starts(end, through, initial, reverse)
        launch(None if initial is None else initial.float().contiguous(), store=True)
    return Walk(states, z, end[:, :, 0 if reverse else -1].contiguous())


def _span_starts(end: Tensor, through: Tensor, initial: Tensor | None, reverse: bool) -> Tensor:
    order = range(end.shape[2])
    S = torch.zeros_like(end[:, :, 0]) if initial is None else initial.float()
    starts: list[Tensor] = [S] * end.shape[2]
    for i in reversed(order) if reverse else order:
        starts[i] = S
        S = torch.addcmul(end[:, :, i], through[:, :, i, None, None], S)
    return torch.stack(starts, dim=2)


def forward(
    problem: Problem,
    state: Tensor | None,
    out_dtype: torch.dtype,
    *,
    norm_eps: float | None = None,
    denominator_min: float | None = None,
    spans: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> o [B,T,H,V], the final state, and [B,T,H] fp32: with norm_eps, which normalises every head's output before it
    is stored, the factors by which it did; with sums the denominators; empty otherwise."""
    met = walk(problem, problem.k, problem.v, state, reverse=False, spans=spans)
    lead = (problem.batch, problem.length, problem.heads)
    o = problem.empty(*lead, problem.v_dim, dtype=torch.float32 if INTERPRETED else out_dtype)
    least = norm_eps if denominator_min is None else denominator_min
    row = problem.empty(0) if least is None else problem.empty(*lead)
    norm = norm_eps is not None
    _query_side(problem, problem.q, problem.k, problem.v, met, o, row=row, least=least or 0.0, norm=norm)
    return o.to(out_dtype), met.end, row


def _query_side(
    problem: Problem,
    x: Tensor,
    y: Tensor,
    u: Tensor,
    met: Walk,
    out: Tensor,
    *,
    gradient: bool = False,
    dd: Tensor | None = None,
    row: Tensor | None = None,
    least: float = 0.0,
    norm: bool = False,
) -> None:
    """Writes o, or the gradient dq; see query_side_kernel."""
    tiles, warps = _side(problem, x, u, whole=norm)
    with on_device(x):
        query_side_kernel[(problem.batch * problem.heads * problem.chunks * triton.cdiv(u.shape[-1], tiles.outer),)](
            x, y, u, dd, *problem.weighing, met.states, met.z, out, row,
            problem.length, problem.chunks, problem.heads, problem.kv_heads, problem.scale, least,
            **problem.shared, X=x.shape[-1], U=u.shape[-1], BX=tiles.inner, BU=tiles.outer,
            GRADIENT=gradient, NORM=norm, SUMS=problem.sums, **_options(tiles, warps),
        )  # fmt: skip


def _key_side(
    problem: Problem, x: Tensor, y: Tensor, u: Tensor, met: Walk, out: Tensor, *, transposed: bool, dd: Tensor | None
) -> None:
    """Writes dv, or `transposed` dk, which a denominator's dd has a part in; see key_side_kernel."""
    tiles, warps = _side(problem, x, u, whole=False)
    with on_device(x):
        key_side_kernel[(problem.batch * problem.kv_heads * problem.chunks * triton.cdiv(u.shape[-1], tiles.outer),)](
            x, y, u, dd, *problem.weighing, met.states, met.z, out,
            problem.length, problem.chunks, problem.heads, problem.scale,
            **problem.shared, X=x.shape[-1], U=u.shape[-1], BX=tiles.inner, BU=tiles.outer,
            GROUP=problem.heads // problem.kv_heads, TRANSPOSED=transposed, SUMS=dd is not None,
            **_options(tiles, warps),
        )  # fmt: skip


def _side(problem: Problem, x: Tensor, u: Tensor, *, whole: bool) -> tuple[fit.Fit, int]:
    """-> tiles and warps of query_side and key_side."""
    width = fit.tile(u.shape[-1], 1 << 20 if whole else 128)
    if width > 128:
        programs, warps, stages = 1, 8, 2
    else:
        programs, warps = (2, 8) if width > 64 else (3, 4)
        programs, stages = _together(problem, programs), 3 if problem.half else 2
    asked = {"size": problem.size, "whole": whole, "programs": programs, "stages": stages}
    return fit.side(problem.card, x.shape[-1], u.shape[-1], **asked), warps


def _together(problem: Problem, programs: int) -> int:
    """So many programs are made to fit on a multiprocessor where tiles move in pieces of 16 bytes: bf16, in widths that
    allow it. Others need the registers."""
    return programs if problem.half and (problem.key_dim | problem.v_dim) % 8 == 0 else 1


def _options(tiles: fit.Fit, warps: int) -> dict[str, int]:
    limits = resident(tiles.programs, warps) if tiles.programs > 1 else {"num_warps": warps}
    return {**limits, "num_stages": tiles.stages}


class Finish(NamedTuple):
    """How the output ended: o [B,T,H,V] as it was returned, and the row [B,T,H] beside it; see `forward`."""

    o: Tensor
    row: Tensor
    denominator_min: float | None
    d_row: Tensor | None = None
    """Gradient of the row, where it is a denominator that was returned."""


def backward(
    problem: Problem,
    state: Tensor | None,
    do: Tensor,
    finish: Finish | None,
    d_end: Tensor | None,
    *,
    decays: bool,
    spans: int | None = None,
) -> Gradients:
    """Gradients of q, k, v, in fp32 of the per-token decay [B,T,H] where `decays`, and in fp32 of the initial state.
    `do` is that of the output as `forward` returned it, which `finish` tells of where it was normed or divided.

    The state before every chunk and its gradient are held one after the other, but where `decays` needs both.
    """
    do, dd = (operand(do), None) if finish is None else _before_finish(problem, operand(do), finish)
    q, k, v = problem.q, problem.k, problem.v
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    met = walk(problem, k, v, state, reverse=False, spans=spans)
    _query_side(problem, do, v, k, met, dq, gradient=True, dd=dd)
    if not decays:
        del met
    d_met = walk(problem, q, do, d_end, reverse=True, dd=dd, spans=spans)
    _key_side(problem, q, k, do, d_met, dv, transposed=False, dd=None)
    _key_side(problem, do, v, q, d_met, dk, transposed=True, dd=dd)
    dg = _decay(problem, do, dd, met, d_met) if decays else None
    return Gradients(dq, dk, dv, dg, d_met.end)


def _before_finish(problem: Problem, dy: Tensor, finish: Finish) -> tuple[Tensor, Tensor | None]:
    """-> do [B,T,H,V] and, for a denominator, dd [B,H,T]; see finish_backward_kernel."""
    y, least = operand(finish.o), finish.denominator_min
    rows, BV = dy[..., 0].numel(), triton.next_power_of_2(problem.v_dim)
    BR = max(1, 4096 // BV)
    do = torch.empty_like(dy, dtype=problem.state_dtype)
    dd = None if least is None else problem.empty(problem.batch, problem.heads, problem.length)
    with on_device(dy):
        finish_backward_kernel[(triton.cdiv(rows, BR),)](
            dy, y, finish.row, do, dd, problem.length, problem.heads, rows, least or 0.0, V=problem.v_dim,
            BR=BR, BV=BV, NORM=least is None, num_warps=4,
        )  # fmt: skip
    if finish.d_row is not None:
        dd += finish.d_row.transpose(1, 2)
    return do, dd


def _decay(problem: Problem, do: Tensor, dd: Tensor | None, met: Walk, d_met: Walk) -> Tensor:
    """-> dg [B,T,H]; see decay_kernel."""
    dg = problem.empty(problem.batch, problem.length, problem.heads)
    tiles = fit.decay(
        problem.card, problem.key_dim, problem.v_dim, size=problem.size, stages=2, programs=_together(problem, 2)
    )
    with on_device(do):
        decay_kernel[(problem.batch * problem.heads * problem.chunks,)](
            problem.q, problem.k, problem.v, do, dd, *problem.weighing, met.states, met.z, d_met.states, d_met.z, dg,
            problem.length, problem.chunks, problem.heads, problem.kv_heads, problem.scale,
            **problem.shared, K=problem.key_dim, V=problem.v_dim, BK=tiles.inner, BV=tiles.outer,
            SUMS=problem.sums, **_options(tiles, warps=8),
        )  # fmt: skip
    return dg
