"""What several mixers are made of: fixed decays, feature maps, the norm of heads."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

SlopeRule = Literal["alibi", "retnet"]


def log_decay(rule: SlopeRule, heads: int) -> list[float]:
    """log γ_h ≤ 0 of every head.

    alibi: γ_h = exp(-s_h), s_h = 2^{-8(h+1)/H}; where H is no power of two, the slopes of the power n below H and
    then every second one of 2n's (Press et al. 2022, arXiv:2108.12409, released code). retnet: γ_h = 1 - 2^{-5-h}
    (arXiv:2307.08621).
    """
    if rule == "retnet":
        return [math.log1p(-(2.0 ** (-5 - head))) for head in range(heads)]
    power = 1 << (heads.bit_length() - 1)
    slopes = _slopes(power) + _slopes(2 * power)[::2]
    return [-slope for slope in slopes[:heads]]


def _slopes(power_of_two: int) -> list[float]:
    return [2.0 ** (-8 * (head + 1) / power_of_two) for head in range(power_of_two)]


def normalise(o: Tensor, eps: float = 1e-5) -> Tensor:
    """(o - mean) / √(var + eps) over each head of o [B,T,H,V]: GroupNorm with H groups and no affine, in fp32."""
    return nn.functional.layer_norm(o.float(), o.shape[-1:], eps=eps).to(o.dtype)


class DenseMap(nn.Linear):
    """W x + b over the concatenated heads of x [B,T,heads,K]: every output sees every head."""

    def __init__(self, heads: int, head_dim: int):
        super().__init__(heads * head_dim, heads * head_dim)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(-2)).view(x.shape)


class HeadMap(nn.Module):
    """W_h x_h + b_h for every head h of x [B,T,heads,K] -> [B,T,heads,features]."""

    def __init__(self, heads: int, head_dim: int, features: int | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, features or head_dim, head_dim))
        self.bias = nn.Parameter(torch.empty(heads, features or head_dim))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bthk,hfk->bthf", x, self.weight) + self.bias

    def reset_parameters(self) -> None:
        """U(±1/√K), as `nn.Linear` draws."""
        bound = self.weight.shape[-1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)
