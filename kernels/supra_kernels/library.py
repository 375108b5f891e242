"""The forms as operators of torch.library, so that torch.compile keeps them whole: schemas, shapes, gradients.

`supra::chunk` runs on any device; `supra::triton` and `supra::triton_step` on CUDA, and on a CPU in Triton's
interpreter. Triton is imported by the first call of an operator that needs it.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from supra_kernels import chunk as chunked
from supra_kernels.around import Around
from supra_kernels.boundaries import NAMESPACE, OPERATORS, compute_dtype, writable

STEP_LENGTH = 4
"""Tokens up to which one step after another is quicker than a chunk (measured on a CPU)."""

library = torch.library.Library(NAMESPACE, "DEF")
library.define(
    "chunk(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? state, Tensor? documents, float scale, bool keep)"
    " -> (Tensor, Tensor, Tensor)"
)
library.define(
    "chunk_backward(Tensor do, Tensor? dS, Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? documents, Tensor starts,"
    " float scale, bool decays) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    "triton(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? state, Tensor? documents, float scale, float? norm_eps,"
    " float? denominator_min, bool wide) -> (Tensor, Tensor, Tensor)"
)
library.define(
    "triton_backward(Tensor do, Tensor? dS, Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? state, Tensor? documents,"
    " float scale, Tensor? o, Tensor? row, Tensor? d_row, float? denominator_min, bool decays)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    "triton_step(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor(a!) state, Tensor? cos, Tensor? sin, bool relu,"
    " float scale, float? norm_eps, float? denominator_min, bool wide) -> (Tensor, Tensor)"
)

library.define("rotary(Tensor x, Tensor cos, Tensor sin, bool relu) -> Tensor")
library.define("rotary_backward(Tensor dy, Tensor? x, Tensor cos, Tensor sin) -> Tensor")

library.impl("chunk", chunked.forward, "CompositeExplicitAutograd")
library.impl("chunk_backward", chunked.backward, "CompositeExplicitAutograd")


def gpu(module: str) -> ModuleType:
    """`launch` or `tokens` of supra_kernels.gpu; importing them needs triton."""
    try:
        return importlib.import_module(f"supra_kernels.gpu.{module}")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise RuntimeError(
            "the form triton needs the package triton, which is not installed; form chunk does not"
        ) from error


def _triton(q, k, v, g, state, documents, scale, norm_eps, denominator_min, wide=False):
    launch = gpu("launch")
    problem = launch.Problem(q, k, v, g, documents, scale, sums=denominator_min is not None)
    out_dtype = torch.float32 if wide else v.dtype
    return launch.forward(problem, state, out_dtype, norm_eps=norm_eps, denominator_min=denominator_min)


def _triton_backward(do, dS, q, k, v, g, state, documents, scale, o, row, d_row, denominator_min, decays):
    launch = gpu("launch")
    problem = launch.Problem(q, k, v, g, documents, scale, sums=denominator_min is not None)
    finish = None if row is None else launch.Finish(o, row, denominator_min, d_row)
    if finish is None and problem.half:
        do = do.bfloat16()  # of a wide o it comes in fp32, and enters bf16 products next
    grads = launch.backward(problem, state, do, finish, dS, decays=decays)
    dg = q.new_empty(0, dtype=torch.float32) if grads.g is None else grads.g
    if decays:
        dg = (dg.sum((0, 1)) if g.dim() == 1 else dg).to(g.dtype)
    return grads.q.to(q.dtype), grads.k.to(k.dtype), grads.v.to(v.dtype), dg, grads.state


def _triton_step(q, k, v, g, state, cos, sin, relu, scale, norm_eps, denominator_min, wide=False):
    problem = gpu("launch").Problem(q, k, v, g, None, scale, sums=denominator_min is not None)
    before, after = {"cos": cos, "sin": sin, "relu": relu}, {"norm_eps": norm_eps, "denominator_min": denominator_min}
    return gpu("tokens").step(problem, state, torch.float32 if wide else v.dtype, **before, **after)


def _rotary(x, cos, sin, relu):
    return gpu("tokens").rotate(x, cos, sin, relu)


def _rotary_backward(dy, x, cos, sin):
    return gpu("tokens").rotate_backward(dy, x, cos, sin)


for _key in ("CUDA", "CPU"):
    library.impl("rotary", _rotary, _key)
    library.impl("rotary_backward", _rotary_backward, _key)
    library.impl("triton", _triton, _key)
    library.impl("triton_backward", _triton_backward, _key)
    library.impl("triton_step", _triton_step, _key)


def _output(q: Tensor, v: Tensor, wide: bool = False) -> Tensor:
    return v.new_empty(*q.shape[:3], v.shape[-1], dtype=torch.float32 if wide else v.dtype)


def _state(q: Tensor, k: Tensor, v: Tensor, sums: bool = False) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[3], v.shape[3] + int(sums), dtype=compute_dtype(q, k, v))


@torch.library.register_fake(f"{NAMESPACE}::chunk", lib=library)
def _(q, k, v, g, state, documents, scale, keep):
    S = _state(q, k, v)
    batch, length, heads, key_dim = q.shape
    size, most = chunked.block_sizes(batch, heads, key_dim, v.shape[-1])
    blocks = (length // size + most - 1) // most + (length % size + size - 1) // size
    return _output(q, v), S, S.new_empty(blocks if keep else 0, *S.shape)


@torch.library.register_fake(f"{NAMESPACE}::triton", lib=library)
def _(q, k, v, g, state, documents, scale, norm_eps, denominator_min, wide):
    S = _state(q, k, v, denominator_min is not None)
    return _output(q, v, wide), S, S.new_empty(0 if norm_eps is None and denominator_min is None else q.shape[:3])


@torch.library.register_fake(f"{NAMESPACE}::triton_step", lib=library)
def _(q, k, v, g, state, cos, sin, relu, scale, norm_eps, denominator_min, wide):
    return _output(q, v, wide), state.new_empty(0 if denominator_min is None else q.shape[:3])


def _fake_gradients(q, k, v, g, decays, sums=False):
    S = _state(q, k, v, sums)
    dg = torch.empty_like(g, memory_format=torch.contiguous_format) if decays else S.new_empty(0)
    return *(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)), dg, S


@torch.library.register_fake(f"{NAMESPACE}::chunk_backward", lib=library)
def _(do, dS, q, k, v, g, documents, starts, scale, decays):
    return _fake_gradients(q, k, v, g, decays)


@torch.library.register_fake(f"{NAMESPACE}::triton_backward", lib=library)
def _(do, dS, q, k, v, g, state, documents, scale, o, row, d_row, denominator_min, decays):
    return _fake_gradients(q, k, v, g, decays, denominator_min is not None)


@torch.library.register_fake(f"{NAMESPACE}::rotary", lib=library)
def _(x, cos, sin, relu):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake(f"{NAMESPACE}::rotary_backward", lib=library)
def _(dy, x, cos, sin):
    return torch.empty_like(dy, memory_format=torch.contiguous_format)


def _rotary_setup(ctx, inputs, output):
    x, cos, sin, relu = inputs
    ctx.save_for_backward(x if relu else None, cos, sin)


def _rotary_gradients(ctx, dy):
    return OPERATORS.rotary_backward(dy, *ctx.saved_tensors), None, None, None


def _chunk_setup(ctx, inputs, output):
    q, k, v, g, state, documents, ctx.scale, _ = inputs
    starts = output[2]
    ctx.mark_non_differentiable(starts)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, g, state, documents, starts)


def _triton_setup(ctx, inputs, output):
    q, k, v, g, state, documents, ctx.scale, norm_eps, ctx.denominator_min, _ = inputs
    o, _, row = output
    if ctx.denominator_min is None:
        ctx.mark_non_differentiable(row)
    ctx.set_materialize_grads(False)
    plain = norm_eps is None and ctx.denominator_min is None
    ctx.save_for_backward(q, k, v, g, state, documents, *((None, None) if plain else (o, row)))


def _chunk_gradients(ctx, do, dS, _):
    q, k, v, g, state, documents, starts = ctx.saved_tensors
    do, decays = _output(q, v).zero_() if do is None else do, ctx.needs_input_grad[3]
    grads = OPERATORS.chunk_backward(do, dS, q, k, v, g, documents, starts, ctx.scale, decays)
    return *_for_inputs(grads, state, decays), None, None, None


def _triton_gradients(ctx, do, dS, d_row):
    q, k, v, g, state, documents, o, row = ctx.saved_tensors
    do, decays = _output(q, v).zero_() if do is None else do, ctx.needs_input_grad[3]
    given = (q, k, v, g, state, documents, ctx.scale, o, row, d_row, ctx.denominator_min)
    return *_for_inputs(OPERATORS.triton_backward(do, dS, *given, decays), state, decays), *[None] * 5


def _for_inputs(grads, state, decays):
    dq, dk, dv, dg, d_state = grads
    return dq, dk, dv, dg if decays else None, None if state is None else d_state.to(state.dtype)


torch.library.register_autograd(f"{NAMESPACE}::rotary", _rotary_gradients, setup_context=_rotary_setup, lib=library)
torch.library.register_autograd(f"{NAMESPACE}::chunk", _chunk_gradients, setup_context=_chunk_setup, lib=library)
torch.library.register_autograd(f"{NAMESPACE}::triton", _triton_gradients, setup_context=_triton_setup, lib=library)


def chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    scale: float = 1.0,
    state: Tensor | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The chunked PyTorch form (supra_kernels.chunk). Its gradient is written by hand and not itself differentiable."""
    o, S, _ = OPERATORS.chunk(q, k, v, g, state, documents, scale, _needs_gradient(q, k, v, g, state))
    return o, S


def triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    scale: float = 1.0,
    state: Tensor | None = None,
    documents: Tensor | None = None,
    around: Around = Around(),
) -> tuple[Tensor, Tensor, Tensor]:
    """The Triton form (supra_kernels.gpu): chunks in parallel, or without gradients and for few tokens the decode step.
    The third tensor is d where there is a denominator.

    ReLU and rotation are done within the step, and in a kernel of their own, once for q and once for k, before the
    chunks, whose kernels read q four times and k five.
    fp32 inputs are multiplied in tf32 where torch.backends.cuda.matmul.fp32_precision says so, or the older allow_tf32;
    float64 is refused.
    """
    if compute_dtype(q, k, v) == torch.float64:
        raise ValueError("the triton form computes in fp32, got float64: use the form chunk")
    after = around.norm_eps, around.denominator_min, around.wide
    if q.shape[1] > STEP_LENGTH or documents is not None or _needs_gradient(q, k, v, g, state):
        q, k = (around.prepared(x, form="triton") for x in (q, k))
        # Here and saved so, or the launcher would copy once forward and once more backward.
        q, k, v = (x.contiguous() for x in (q, k, v))
        return OPERATORS.triton(q, k, v, g, state, documents, scale, *after)
    if state is None:
        S = _state(q, k, v, around.sums).zero_()
    else:
        S = writable(state.to(torch.float32).contiguous())
    before = (*(around.rotation or (None, None)), around.relu)
    o, d = OPERATORS.triton_step(q, k, v, g, S, *before, scale, *after)
    return o, S, d


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
