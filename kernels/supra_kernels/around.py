"""What surrounds the sum, where no kernel has it inside: features and positions before, a norm or denominator after."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from supra_kernels.rotary import rotary


def prepared(x: Tensor, relu: bool, rotation: tuple[Tensor, Tensor] | None, form: str) -> Tensor:
    """q or k as the sum takes it: `rotary` where there is a rotation, else at most the ReLU."""
    if rotation is not None:
        return rotary(x, *rotation, relu=relu, form=form)
    return x.relu() if relu else x


def with_ones(v: Tensor) -> Tensor:
    """v with a value of 1 beside it, so that the sum of weights comes out as one more column of the weighted sum."""
    return torch.cat((v, torch.ones_like(v[..., :1])), dim=-1)


def finished(o: Tensor, norm_eps: float | None, denominator_min: float | None) -> Tensor:
    """o [B,T,H,V] normed, or o [B,T,H,V+1] of values `with_ones` divided by its last column."""
    if denominator_min is not None:
        return o[..., :-1] / o[..., -1:].clamp(min=denominator_min)
    return o if norm_eps is None else layer_norm(o, o.shape[-1:], eps=norm_eps)
