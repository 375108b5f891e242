"""What the forms share: where Triton runs, the dtype to compute in, the floor of a log decay, documents in one code."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

NAMESPACE = "supra" if __name__ == "supra_kernels.boundaries" else __name__.replace(".", "_")
"""Of the operators of torch.library, of which there may be one set by each name: an exported model brings its own."""
OPERATORS = getattr(torch.ops, NAMESPACE)
INTERFACE = 2
"""Of supra_kernels.gpu, as library.py calls it: raise it when a call changes, since exported models call it too."""

DECAY_FLOOR = -200.0
"""exp(-200) is 0 in fp32 and 1e-87 in float64; a finite floor keeps -inf - -inf out of the sums."""


def documents(segment: Tensor) -> Tensor:
    """2 · number + (1 on a real token), [B,T] int32, of the document numbers [B,T] with -1 on padding.

    Padding has the number of the document before it, leading padding that of the first. Reads nothing from the device.
    """
    real = segment >= 0
    first = segment.masked_fill(~real, torch.iinfo(segment.dtype).max).amin(dim=1, keepdim=True)
    number = torch.maximum(segment.cummax(dim=1).values, first)
    return (number.clamp(max=2**30 - 1) * 2 + real).int().contiguous()


class Documents(NamedTuple):
    """real [B,T]: not padding. number [B,T]: of the document each position belongs to. continues [B,T]: real, and the
    document did not start here."""

    real: Tensor
    number: Tensor
    continues: Tensor


def decoded(documents: Tensor) -> Documents:
    """What `documents` has put into one number."""
    real, number = (documents & 1) != 0, documents >> 1
    continues = real.clone()
    continues[:, 1:] &= number[:, 1:] == number[:, :-1]
    return Documents(real, number, continues)


@torch.compiler.assume_constant_result
def triton_compiles_for(device: torch.device) -> bool:
    """Whether Triton supports this GPU: NVIDIA's from compute capability 8.0 on (not the T4 or V100), and AMD's."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def kernels_are_here() -> bool:
    """Whether there are kernels for library.py to call: an exported model has those of an installed supra, if any."""
    try:
        installed = import_module("supra_kernels.boundaries")
    except ImportError:
        return False
    return installed.INTERFACE == INTERFACE


@torch.compiler.assume_constant_result
def triton_runs_on(device: torch.device) -> bool:
    """Whether Triton supports this GPU and the kernels are here."""
    return kernels_are_here() and triton_compiles_for(device)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def writable(state: Tensor) -> Tensor:
    """A state that a step may overwrite: a copy of one that was made in inference mode, which PyTorch lets nobody write
    to outside of it. torch.compile, which cannot ask, takes it as it is."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not state.is_inference():
        return state
    return state.clone()


def log_decay(g: Tensor | None, real: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """g in the compute dtype, floored; with `real` [B,T] it is [B,T,H], 0 on padding, which a fixed decay skips too."""
    if g is None:
        return None
    g = g.to(dtype).clamp(min=DECAY_FLOOR)
    return g if real is None else g * real.unsqueeze(-1)
