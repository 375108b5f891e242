"""What surrounds the sum, where no kernel has it inside: features and positions before, a norm or denominator after."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from supra_kernels.rotary import rotary


class Around(NamedTuple):
    """What surrounds the sum, as keywords of `linear_attention`: whatever is asked for is named here once."""

    relu: bool = False
    """q and k go through max(x, 0) first,"""
    rotation: tuple[Tensor, Tensor] | None = None
    """and turn by (cos, sin), [B or 1,T,R] each, of which the first R ≤ K numbers do."""
    norm_eps: float | None = None
    """o is normalised over each head's V numbers, (o - mean) / sqrt(variance + norm_eps)."""
    denominator_min: float | None = None
    """o_t is divided by max(d_t, denominator_min), d_t = scale · q_t·z_t; the state has z for a last column."""
    denominators: bool = False
    """d [B,T,H], in fp32 or finer, is returned too: two attentions are added up by it under one denominator."""
    wide: bool = False
    """o is returned in fp32 or finer, not in v's dtype: for a caller with a norm or sum of its own after it."""

    @property
    def sums(self) -> bool:
        """Whether a state has z beside it."""
        return self.denominator_min is not None

    @property
    def widens(self) -> bool:
        """Whether the sum is wanted as it is added up: what has a mean to lose, or a divisor, is rounded after that."""
        return self.wide or self.sums or self.norm_eps is not None

    def check(self) -> None:
        if self.norm_eps is not None and self.sums:
            raise ValueError(f"norm_eps or denominator_min, got both: {self.norm_eps} and {self.denominator_min}")
        if self.denominators and not self.sums:
            raise ValueError("denominators are there beside a denominator_min, got none")

    def prepared(self, x: Tensor, form: str) -> Tensor:
        """q or k as the sum takes it: `rotary` where there is a rotation, else at most the ReLU."""
        if self.rotation is not None:
            return rotary(x, *self.rotation, relu=self.relu, form=form)
        return x.relu() if self.relu else x

    def finished(self, o: Tensor) -> tuple[Tensor, Tensor | None]:
        """o [B,T,H,V] normed, or o [B,T,H,V+1] of values `with_ones` divided by its last column, and that column."""
        if self.sums:
            return o[..., :-1] / o[..., -1:].clamp(min=self.denominator_min), o[..., -1]
        return o if self.norm_eps is None else layer_norm(o, o.shape[-1:], eps=self.norm_eps), None


def with_ones(v: Tensor) -> Tensor:
    """v with a value of 1 beside it, so that the sum of weights comes out as one more column of the weighted sum."""
    return torch.cat((v, torch.ones_like(v[..., :1])), dim=-1)
