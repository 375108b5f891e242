"""The one entry point: checks shapes, settles dtypes, hands over to a form."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from supra_kernels.around import Around, with_ones
from supra_kernels.boundaries import compute_dtype, triton_runs_on
from supra_kernels.boundaries import documents as coded
from supra_kernels.library import STEP_LENGTH, chunk, triton
from supra_kernels.naive import naive
from supra_kernels.step import step

FORMS = {"naive": naive, "chunk": chunk, "step": step, "triton": triton}


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    scale: float = 1.0,
    state: Tensor | None = None,
    segment: Tensor | None = None,
    documents: Tensor | None = None,
    form: str | None = None,
    **around: Any,
) -> tuple[Tensor, ...]:
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T,   o_t = scale · q_t^T S_t.

    Backward, from do_t and the gradient dS_{T+1} of the state returned, with g_{T+1} = 0:
        dS_t = exp(g_{t+1}) dS_{t+1} + scale · q_t do_t^T
        dq_t = scale · S_t do_t     dk_t = dS_t v_t     dv_t = dS_t^T k_t     dg_t = exp(g_t) <S_{t-1}, dS_t>

    q [B,T,H,K], k [B,T,G,K], v [B,T,G,V]; query head h reads kv head h // (H/G).
    g is a log decay ≤ 0: None, [H] or [B,T,H].
    state [B,H,K,V] is S_0 (None: zeros) and belongs to the document of the row's first real token.
    segment [B,T] numbers the documents of a row, non-decreasing over real tokens, -1 on padding. S is zeroed where a
    document starts; a padding token changes nothing, and the output there is finite and meaningless.
    documents is what `supra_kernels.documents` made of the segment, for callers of several layers with the same one.
    around is what surrounds the sum, relu, rotation, norm_eps, denominator_min, denominators and wide: see `Around`.
    The rotation is `rotary`'s, and norm_eps normalises as GroupNorm with H groups and no affine does.
    Returns o [B,T,H,V], rounded once, to v's dtype, or with wide not at all, and the state after each row's last real
    token, fp32 (float64 for float64 inputs); after them d [B,T,H] if denominators are asked for.
    With denominator_min, o_t is divided by the sum of its weights, o_t / max(d_t, denominator_min), where d_t = scale ·
    q_t·z_t and z_t = exp(g_t) z_{t-1} + k_t. The state is then [B,H,K,V+1], its last column z.
    Without gradients the step form overwrites `state` and returns it.
    Under autocast to bf16 the Triton form takes q, k and v in bf16, as PyTorch's own attention does: a feature map may
    leave them in fp32, whose products take several times as long. Nothing else heeds autocast.
    The Triton form normalises or divides in the kernel that makes o, and decodes in one kernel from raw q and k; the
    others do what comes before and after by itself.
    Raises ValueError for shapes that do not fit, for an unknown form, for norm_eps beside denominator_min, and for
    denominators without.
    """
    around = Around(**around)
    around.check()
    check_shapes(q, k, v, state, segment, documents, around.sums)
    if g is not None and g.shape != q.shape[2:3] and g.shape != q.shape[:3]:
        raise ValueError(f"g is None, {list(q.shape[2:3])} or {list(q.shape[:3])}, got {tuple(g.shape)}")
    if form is None:
        form = default_form(q, segment)
    if form not in FORMS:
        raise ValueError(f"form is one of {', '.join(FORMS)}, got '{form}'")
    if form == "naive":
        layout = {"segment": segment}  # the specification reads it by itself
    else:
        if segment is not None and q.shape[1] == 1:
            k, g = passing_over(segment >= 0, k, g)
            segment = documents = None
        layout = {"documents": coded(segment) if documents is None and segment is not None else documents}
    q, k, v = (x.to(operand_dtype(x, form)) for x in (q, k, v))
    with without_autocast(q.device.type):
        if form == "triton":
            o, S, d = triton(q, k, v, g, scale=scale, state=state, **layout, around=around)
        else:
            q, k = (around.prepared(x, form="chunk") for x in (q, k))
            values = v.to(compute_dtype(q, k, v)) if around.widens else v  # a form's o is in its values' dtype
            values = with_ones(values) if around.sums else values
            o, S = FORMS[form](q, k, values, g, scale=scale, state=state, **layout)
            o, d = around.finished(o)
        o = o if around.wide else o.to(v.dtype)
        return (o, S, d) if around.denominators else (o, S)


def default_form(q: Tensor, segment: Tensor | None) -> str:
    """Triton on a GPU that it compiles for, where its failure is an error, never a slow path; PyTorch elsewhere and for
    float64."""
    if q.is_cuda and q.dtype != torch.float64 and triton_runs_on(q.device):
        return "triton"
    most = STEP_LENGTH if segment is None else 1
    return "step" if q.shape[1] <= most else "chunk"


def passing_over(real: Tensor, k: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """k and g of one token a row with which S stays as it is, to the bit, where `real` [B,1] is false.

    One token starts no document, since the state belongs to that of the first real one: padding is all that a segment
    can say of it. So a padded decode step is a decode step, and nothing of the segment is read from the device.
    """
    k = k.masked_fill(~real[:, :, None, None], 0)
    return k, None if g is None else torch.where(real[..., None, None] if g.dim() == 4 else real[..., None], g, 0)


def operand_dtype(x: Tensor, form: str) -> torch.dtype:
    """What `form` takes of x, which is q, k or v: bf16 in the Triton form under autocast to it, else as it comes."""
    narrowed = form == "triton" and x.dtype != torch.float64 and _autocast_dtype(x.device.type) == torch.bfloat16
    return torch.bfloat16 if narrowed else x.dtype


def _autocast_dtype(device: str) -> torch.dtype | None:
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(device: str) -> AbstractContextManager:
    """The forms settle their dtypes themselves; autocast would round the fp32 state's products to half precision.

    Not by torch.amp.is_autocast_available, which torch.compile cannot trace in PyTorch 2.11.
    """
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def check_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    segment: Tensor | None,
    documents: Tensor | None,
    sums: bool = False,
) -> None:
    """ValueError for what of these does not fit; with `sums` the state has one column more."""
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q, k, v are [B, T, heads, dim], got {[tuple(x.shape) for x in (q, k, v)]}")
    batch, length, heads, key_dim = q.shape
    kv_heads, v_dim = v.shape[2:]
    if length == 0:
        raise ValueError("a sequence has at least one token, got T = 0")
    if k.shape != (batch, length, kv_heads, key_dim) or v.shape[:2] != (batch, length) or heads % kv_heads:
        raise ValueError(
            f"q [B,T,H,K], k [B,T,G,K], v [B,T,G,V] with H a multiple of G, got {[tuple(x.shape) for x in (q, k, v)]}"
        )
    state_dim = v_dim + int(sums)
    if state is not None and state.shape != (batch, heads, key_dim, state_dim):
        raise ValueError(f"state is [{batch}, {heads}, {key_dim}, {state_dim}], got {tuple(state.shape)}")
    if segment is not None and segment.shape != (batch, length):
        raise ValueError(f"segment is [{batch}, {length}], got {tuple(segment.shape)}")
    if documents is None:
        return
    if segment is None or documents.shape != segment.shape or documents.dtype != torch.int32:
        shape = tuple(documents.shape)
        raise ValueError(f"documents is [{batch}, {length}] int32 beside a segment, got {shape} {documents.dtype}")
