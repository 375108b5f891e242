"""Tensors in, kernels launched, tensors out: forward, backward, decode step, rotation. No autograd here.

Tile sizes are pinned by K and V, never tuned at run time and never by B or T: so results do not vary between
processes.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from supra_kernels.around import finished, with_ones
from supra_kernels.boundaries import DECAY_FLOOR, documents
from supra_kernels.gpu.gradients import decay_kernel, query_key_kernel, value_kernel
from supra_kernels.gpu.output import output_kernel
from supra_kernels.gpu.rotary import rotary_backward_kernel, rotary_kernel
from supra_kernels.gpu.states import states_kernel
from supra_kernels.gpu.step import step_kernel
from supra_kernels.gpu.tiles import FIXED_DECAY, NO_DECAY, TOKEN_DECAY

CHUNK = 64
STEP_NUMBERS = 1 << 14
"""Of a head's state, the most that one program of the decode step holds: 64 registers in each of 256 threads."""
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
        segment: Tensor | None,
        scale: float,
        sums: bool = False,
    ):
        self.q, self.k, self.v = (_operand(x) for x in (q, k, v))
        self.g = None if g is None else g.float().clamp(min=DECAY_FLOOR).contiguous()
        self.code, self.scale = None if segment is None else _document_code(segment), scale
        self.batch, self.length, self.heads, self.key_dim = q.shape
        self.kv_heads, self.v_dim = v.shape[2:]
        self.chunks, self.sums = triton.cdiv(self.length, CHUNK), sums
        half = not INTERPRETED and all(x.dtype == torch.bfloat16 for x in (q, k, v))
        self.state_dtype = torch.bfloat16 if half else torch.float32
        self.shared = {
            "C": CHUNK,
            "DECAY": (NO_DECAY if g is None else FIXED_DECAY if g.dim() == 1 else TOKEN_DECAY).value,
            "PACKED": segment is not None,
            "OPERAND": tl.bfloat16 if half else tl.float32,
            "PRECISION": _precision(),
        }

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.length, self.chunks, self.heads, self.kv_heads, self.key_dim, self.v_dim

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.q.device)


def _precision() -> str:
    """Of fp32 products: three tf32 ones keep fp32's digits on tensor cores; one where PyTorch's own may be tf32."""
    if torch.version.hip or INTERPRETED:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def _document_code(segment: Tensor) -> Tensor:
    """[B,T] int32: 2 · document number + (1 on a real token)."""
    layout = documents(segment)
    return (layout.number.clamp(max=2**30 - 1) * 2 + layout.real).int().contiguous()


def _operand(x: Tensor) -> Tensor:
    return (x.float() if INTERPRETED and x.dtype != torch.float32 else x).contiguous()


def _tile(width: int, most: int = 64) -> int:
    """A power of two from 16, the least that tl.dot takes."""
    return min(most, max(16, triton.next_power_of_2(width)))


def _on(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _spans(problem: Problem, programs: int) -> int:
    """Into how many spans the walk over chunks is cut, so that the processors are busy when B · H is small."""
    if not problem.q.is_cuda or problem.chunks < 32:
        return 1
    processors = torch.cuda.get_device_properties(problem.q.device).multi_processor_count
    return max(1, min(triton.cdiv(2 * processors, programs), problem.chunks // 8)) if programs < processors else 1


class Walk(NamedTuple):
    """What a walk met at every chunk, S [B,H,N,K,V] and z [B,H,N,K] fp32 (None without sums), and its end
    [B,H,K,V or V+1] fp32."""

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
    BK, BV = _tile(problem.key_dim), _tile(problem.v_dim)
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
            x, y, dd, problem.g, problem.code, start, states, z, end, through,
            problem.length, problem.chunks, span, spans, problem.heads, x.shape[2], y.shape[2], *width, problem.scale,
            **problem.shared, BK=BK, BV=BV, SUMS=problem.sums, REVERSE=reverse, STORE=store,
            INITIAL=start is not None, num_warps=4, num_stages=3,
        )  # fmt: skip

    with _on(problem.q):
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
    BK = _tile(problem.key_dim)
    BV = _tile(problem.v_dim, 128) if norm_eps is None else _tile(problem.v_dim, 1 << 20)
    lead = (problem.batch, problem.length, problem.heads)
    o = problem.empty(*lead, problem.v_dim, dtype=torch.float32 if INTERPRETED else out_dtype)
    least = norm_eps if denominator_min is None else denominator_min
    row = problem.empty(0) if least is None else problem.empty(*lead)
    grid = (problem.batch * problem.heads * problem.chunks * triton.cdiv(problem.v_dim, BV),)
    with _on(problem.q):
        output_kernel[grid](
            problem.q, problem.k, problem.v, problem.g, problem.code, met.states, met.z, o, row,
            *problem.sizes, problem.scale, least or 0.0,
            **problem.shared, BK=BK, BV=BV, NORM=norm_eps is not None, SUMS=problem.sums,
            num_warps=4 if BV <= 64 else 8, num_stages=2,
        )  # fmt: skip
    return o.to(out_dtype), met.end, row


def backward(
    problem: Problem,
    state: Tensor | None,
    do: Tensor,
    dd: Tensor | None,
    d_end: Tensor | None,
    *,
    decays: bool,
    spans: int | None = None,
) -> Gradients:
    """Gradients in fp32 of q, k, v, the per-token decay [B,T,H] where `decays`, and the initial state.

    do [B,T,H,V] and, with sums, dd [B,T,H] are the gradients of what was divided and of what it was divided by.
    """
    do, dd = _operand(do), None if dd is None else dd.float().contiguous()
    met = walk(problem, problem.k, problem.v, state, reverse=False, spans=spans)
    d_met = walk(problem, problem.q, do, d_end, reverse=True, dd=dd, spans=spans)
    BK, BV = _tile(problem.key_dim), _tile(problem.v_dim)
    dq, dk, dv = (torch.empty_like(x) for x in (problem.q, problem.k, problem.v))
    dg = problem.empty(problem.batch, problem.length, problem.heads) if decays else None
    options = {**problem.shared, "BK": BK, "BV": BV, "num_warps": 8, "num_stages": 2}
    rest = (*problem.sizes, problem.scale)
    per_kv_head = problem.batch * problem.kv_heads * problem.chunks
    q, k, v, g, code = problem.q, problem.k, problem.v, problem.g, problem.code
    inputs = (q, k, v, do, dd, g, code)
    with _on(q):
        query_key_kernel[(per_kv_head * triton.cdiv(problem.key_dim, BK),)](
            *inputs, met.states, met.z, d_met.states, d_met.z, dq, dk, *rest, SUMS=problem.sums, **options
        )
        value_kernel[(per_kv_head * triton.cdiv(problem.v_dim, BV),)](
            q, k, do, g, code, d_met.states, dv, *rest, **options
        )
        if decays:
            grid = (problem.batch * problem.heads * problem.chunks,)
            decay_kernel[grid](
                *inputs, met.states, met.z, d_met.states, d_met.z, dg, *rest, SUMS=problem.sums, **options
            )
    return Gradients(dq, dk, dv, dg, d_met.end)


def step(
    problem: Problem,
    state: Tensor,
    out_dtype: torch.dtype,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    relu: bool = False,
    norm_eps: float | None = None,
    denominator_min: float | None = None,
) -> Tensor:
    """-> o; `state` [B,H,K,V or V+1], fp32 and contiguous, is overwritten, in one launch.

    q and k go through the ReLU with `relu`, then turn by cos, sin [B or 1,T,R] where given. A norm or denominator needs
    a head's whole state in one program; where that is too large they follow by themselves.
    """
    least = norm_eps if denominator_min is None else denominator_min
    BK = _tile(problem.key_dim, 1 << 20)
    BV = min(16, _tile(problem.v_dim)) if least is None else _tile(problem.v_dim, 1 << 20)
    if least is not None and BK * BV > STEP_NUMBERS:
        values = problem.v if denominator_min is None else with_ones(problem.v)
        plain = Problem(problem.q, problem.k, values, problem.g, None, problem.scale)
        o = step(plain, state, torch.float32, cos=cos, sin=sin, relu=relu)
        return finished(o, norm_eps, denominator_min).to(out_dtype)
    o = problem.empty(
        problem.batch, problem.length, problem.heads, problem.v_dim, dtype=torch.float32 if INTERPRETED else out_dtype
    )
    tables = (None, None, 0, 0) if cos is None else _tables(cos, sin)
    with _on(problem.q):
        step_kernel[(problem.batch * problem.heads * triton.cdiv(problem.v_dim, BV),)](
            problem.q, problem.k, problem.v, problem.g, state, o, *tables,
            problem.length, problem.heads, problem.kv_heads, problem.key_dim, problem.v_dim, problem.scale,
            least or 0.0,
            BK=BK, BV=BV, DECAY=problem.shared["DECAY"], NORM=norm_eps is not None, SUMS=problem.sums,
            ROTARY=cos is not None, RELU=relu,
            num_warps=max(4, BK * BV // 2048),
        )  # fmt: skip
    return o.to(out_dtype)


def _tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """cos, sin [B or 1,T,R] -> both as operands, R, and the numbers from one sequence to the next."""
    return _operand(cos), _operand(sin), cos.shape[-1], 0 if len(cos) == 1 else cos[0].numel()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, relu: bool) -> Tensor:
    """See rotary_kernel; x [B,T,H,K], cos and sin [B or 1,T,R]."""
    inside = _operand(x)
    y = torch.empty_like(inside)
    _turn(rotary_kernel, (inside,), cos, sin, y, relu)
    return y.to(x.dtype)


def rotate_backward(dy: Tensor, x: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
    """Gradient of x, which is given where it went through the ReLU."""
    inside = _operand(dy)
    dx = torch.empty_like(inside)
    _turn(rotary_backward_kernel, (inside, None if x is None else _operand(x)), cos, sin, dx, x is not None)
    return dx.to(dy.dtype)


def _turn(kernel, given: tuple, cos: Tensor, sin: Tensor, out: Tensor, relu: bool) -> None:
    batch, length, heads, width = out.shape
    cos, sin, rotated, stride = _tables(cos, sin)
    BH = min(16, triton.next_power_of_2(heads))
    with _on(out):
        kernel[(batch * length * triton.cdiv(heads, BH),)](
            *given, cos, sin, out, length, heads, width, rotated, stride,
            BH=BH, BK=triton.next_power_of_2(width), RELU=relu, num_warps=4,
        )  # fmt: skip
