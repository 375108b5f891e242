"""The operators that mixers are made of. `supra_kernels`, which no mixer imports, picks the form by device and length.

The environment variable SUPRA_KERNEL = naive | torch | triton forces one for debugging.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import supra_kernels
import torch
from supra_kernels.chunk import chunk_length
from supra_kernels.delta_chunk import CHANNEL_CHUNK, HEAD_CHUNK
from supra_kernels.operator import without_autocast as without_autocast
from torch import Tensor

from supra_cli.core.errors import UsageError, near_miss
from supra_cli.core.layout import Layout, Rotate

_log = logging.getLogger(__name__)

_VARIABLE = "SUPRA_KERNEL"
_FORMS = {"naive": "naive", "torch": "chunk", "triton": "triton"}
"""What the variable may say, and the form of supra_kernels that it means."""
_planned: str | None = None
"""The path that `planning` asks for. A plain variable: torch.compile reads no other through."""


class Rotation(NamedTuple):
    """Rotary positions as a function of x [B,T,·,K], from cos and sin [B or 1,T,R], of which the first R ≤ K turn."""

    cos: Tensor
    sin: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """x cos + (-x₂, x₁) sin, x₁ and x₂ the halves of what turns. On a GPU one kernel."""
        return supra_kernels.rotary(x, self.cos, self.sin, form=_FORMS.get(_forced(x.device)))


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    scale: float = 1.0,
    state: Tensor | None = None,
    layout: Layout | None = None,
    relu: bool = False,
    rope: Rotate | None = None,
    norm_eps: float | None = None,
    denominator_min: float | None = None,
    denominators: bool = False,
    wide: bool = False,
    path: str | None = None,
) -> tuple[Tensor, ...]:
    """S_t = exp(g_t) S_{t-1} + k_t v_tᵀ,  o_t = scale · q_tᵀ S_t,  with S = 0 where a document starts and S kept over
    padding.

    Backward, from do_t and the gradient dS_{T+1} of the state returned, with g_{T+1} = 0:
        dS_t = exp(g_{t+1}) dS_{t+1} + scale · q_t do_tᵀ
        dq_t = scale · S_t do_t     dk_t = dS_t v_t     dv_t = dS_tᵀ k_t     dg_t = exp(g_t) <S_{t-1}, dS_t>

    q [B,T,H,K], k [B,T,G,K], v [B,T,G,V] with G dividing H; g is None, [H] or [B,T,H], a log decay ≤ 0; state
    [B,H,K,V] or None for zeros. With norm_eps, o is (o - mean) / √(variance + norm_eps) over each head's V
    numbers. With denominator_min, o_t is divided by max(d_t, denominator_min), d_t = scale · q_t·z_t and z_t = exp(g_t)
    z_{t-1} + k_t; the state is then [B,H,K,V+1], its last column z. With denominators = True, d [B,T,H] comes third.
    With relu and rope, q and k are φ(q), φ(k) of what is given, φ(x) = rope(ReLU(x)) or what of it is asked for: on a
    GPU in one kernel for a `Rotation`, and within the step when decoding.
    Returns o [B,T,H,V], rounded once, to v's dtype, and the state after each row's last real token, in fp32. With wide
    = True o stays in fp32, for a mixer that norms or adds to it.
    `path` is a word of SUPRA_KERNEL and stands above it. Which path ran is logged once for each device and dtype.
    Raises UsageError for a SUPRA_KERNEL that is unknown, or triton where it cannot run; a failing kernel is an error,
    never another path.
    """
    segment, documents = (None, None) if layout is None else layout
    forced = path or _forced(q.device)
    form = supra_kernels.default_form(q, segment) if forced is None else _FORMS[forced]
    if not torch.compiler.is_compiling() and _planned is None:
        ran = forced or ("triton" if form == "triton" else "torch")
        slower = forced is None and q.device.type == "cuda" and form != "triton" and q.dtype != torch.float64
        _tell_once(ran, q.device.type, supra_kernels.operand_dtype(q, form), slower)
    if rope is not None and not isinstance(rope, Rotation):
        q, k = (rope(x.relu() if relu else x) for x in (q, k))
        relu, rope = False, None
    return supra_kernels.linear_attention(
        q,
        k,
        v,
        g,
        scale=scale,
        state=state,
        segment=segment,
        documents=documents,
        form=form,
        relu=relu,
        rotation=rope,
        norm_eps=norm_eps,
        denominator_min=denominator_min,
        denominators=denominators,
        wide=wide,
    )


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    *,
    scale: float = 1.0,
    state: Tensor | None = None,
    layout: Layout | None = None,
) -> tuple[Tensor, Tensor]:
    """S ← exp(g_t) S,  S ← S + β_t k_t (v_t - Sᵀ k_t)ᵀ,  o_t = scale · Sᵀ q_t,  with S = 0 where a document starts and
    S kept over padding.

    q [B,T,H,K], k [B,T,G,K], v [B,T,G,V]; g a log decay ≤ 0, None, [B,T,N] or, one a channel, [B,T,N,K]; β [B,T,N] in
    (0,2); state [B,N,K,V] or None for zeros: N states, G dividing N and N dividing H. Keys are to be of length 1.
    Returns o [B,T,H,V] in v's dtype and the state after each row's last real token, in fp32.
    It runs in PyTorch's operations on every device: SUPRA_KERNEL = naive is heeded, triton stands for those.
    """
    segment, documents = (None, None) if layout is None else layout
    forced = _forced(q.device)
    if not torch.compiler.is_compiling() and _planned is None:
        _tell_once("naive" if forced == "naive" else "torch", q.device.type, q.dtype, operator="delta rule")
    here = {"state": state, "segment": segment, "documents": documents}
    return supra_kernels.delta_rule(q, k, v, g, beta, scale=scale, form="naive" if forced == "naive" else None, **here)


def chunk_tokens(device: str, key_dim: int, v_dim: int) -> int:
    """Tokens in a chunk, by which FLOPs and traffic are counted."""
    return 64 if device == "cuda" else chunk_length(key_dim, v_dim)


def delta_chunk_tokens(channels: bool) -> int:
    """The same of `delta_rule`, with a decay per channel or one a head."""
    return CHANNEL_CHUNK if channels else HEAD_CHUNK


@contextmanager
def planning(path: str | None) -> Iterator[None]:
    """While this lasts, what SUPRA_KERNEL leaves open takes `path`, a word of it, whatever the device.

    For tensors without storage, which show what a path would allocate where it cannot run.
    """
    global _planned
    before, _planned = _planned, path
    try:
        yield
    finally:
        _planned = before


def _forced(device: torch.device) -> str | None:
    path = os.environ.get(_VARIABLE)
    if not path:
        return _planned
    if path not in _FORMS:
        raise UsageError(f"{_VARIABLE} is '{path}', expected one of {', '.join(_FORMS)}{near_miss(path, _FORMS)}")
    if path != "triton" or _planned is not None:
        return path
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UsageError(f"{_VARIABLE} is 'triton', which needs a CUDA device, got {device}; unset it or say 'torch'")
    if device.type == "cuda" and not supra_kernels.triton_compiles_for(device):
        raise UsageError(
            f"{_VARIABLE} is 'triton', which needs compute capability 8.0 or more, got an older GPU as {device}; "
            "unset it or say 'torch'"
        )
    return path


@cache
def _tell_once(
    path: str, device: str, dtype: torch.dtype, slower: bool = False, operator: str = "linear attention"
) -> None:
    # Where an exported model runs nobody has asked for INFO, and the path decides how fast it runs.
    exported = not __name__.startswith("supra_cli.")
    level = logging.WARNING if exported and device == "cuda" and not slower else logging.INFO
    _log.log(level, "%s: %s on %s in %s", operator, path, device, str(dtype).removeprefix("torch."))
    if slower:
        _log.warning(
            "linear attention runs in PyTorch's operations, several times slower than the Triton kernels, which need "
            "supra, from its repository, and a GPU of compute capability 8.0 or more"
        )
