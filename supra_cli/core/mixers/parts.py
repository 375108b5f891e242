"""What several mixers are made of: a matrix for a state, fixed decays, the norm of heads, feature maps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _get_current_dispatch_mode

from supra_cli.core.layout import HeadSpec, Layout, Rotate
from supra_cli.core.mixers import Mixer
from supra_cli.core.ops import linear_attention, without_autocast

SlopeRule = Literal["alibi", "retnet", "none"]

Gain = Literal["none", "head"]


def capped(scores: Tensor, cap: float | None) -> Tensor:
    """cap · tanh(scores / cap), as some bases have it before the softmax."""
    return scores if cap is None else cap * (scores / cap).tanh()


class MatrixState(NamedTuple):
    S: Tensor
    """[B, N, K, V] fp32, of N states: one a head, or fewer."""


class MatrixMixer(Mixer):
    """A mixer whose state is matrices, one a head if it says nothing else: S_t = γ_t S_{t-1} + k_t v_tᵀ."""

    @property
    def states(self) -> int:
        """Matrices of a layer."""
        return self.spec.heads

    def state_shape(self) -> tuple[int, int]:
        """K and V of the state."""
        return self.spec.head_dim, self.spec.v_dim

    def init_state(self, batch: int, device: torch.device | str) -> MatrixState:
        shape = (batch, self.states, *self.state_shape())
        return MatrixState(torch.zeros(shape, dtype=torch.float32, device=device))

    def reset_parameters(self) -> None:
        for part in self.children():
            if type(part) is nn.Linear:  # one of a kind of its own draws itself
                draw_map(part)
            else:
                part.reset_parameters()


class Retaining(MatrixMixer):
    """A mixer that ends in o_i = GroupNorm( Σ_{j≤i} γ_h^{i-j} (q_i · k_j) d^{-1/2} v_j ), γ and gain by its options."""

    fitted = ("norm.gain",)

    def __init__(self, spec: HeadSpec, options: Mixer.Options):
        super().__init__(spec, options)
        self.norm = HeadNorm(spec.heads, options.gain)

    def retain(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rope: Rotate,
        state: MatrixState | None,
        layout: Layout | None,
        relu: bool = False,
    ) -> tuple[Tensor, MatrixState]:
        """Of q and k before their positions, and with `relu` before the ReLU too."""
        g = log_decay(self.options.slopes, self.spec.heads, q.device)
        S = None if state is None else state.S
        scale, eps = self.spec.head_dim**-0.5, self.norm.eps
        o, S = linear_attention(q, k, v, g, scale=scale, state=S, layout=layout, relu=relu, rope=rope, norm_eps=eps)
        return self.norm.scaled(o), MatrixState(S)

    def target(self, o: Tensor) -> Tensor:
        return self.norm.target(o)

    def moments(self, o: Tensor, taught: Tensor, attention: Callable[[], Tensor]) -> Tensor:
        return gain_moments(o, taught)

    def fit(self, moments: Tensor) -> None:
        self.norm.fit(moments)


_decays: dict[tuple[SlopeRule, int, torch.device], Tensor] = {}
"""log_decay by its arguments. It forgets nothing, since a CUDA graph may read what is here, and stops growing at 64."""


def log_decay(rule: SlopeRule, heads: int, device: torch.device | str) -> Tensor | None:
    """g_h = log γ_h ≤ 0 of every head, [H] fp32; None without decay.

    Made once for each device, since every layer asks at every decoded token: some five launches each time. But not
    kept where the tensor would not outlive the caller: under torch.compile, which traces it, under a dispatch mode,
    whose tensors may be fake, and in the memory of a CUDA graph that is being captured.
    """
    if rule == "none":
        return None
    device = torch.device(device)
    passing = torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None or device.type == "meta"
    if passing:
        return slopes(rule, heads, device).neg().float()
    key = (rule, heads, device)
    if key not in _decays:
        with torch.inference_mode(False):  # a tensor made in inference mode could take no part in a later backward
            made = slopes(rule, heads, device).neg().float()
        if len(_decays) == 64 or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return made
        _decays[key] = made
    return _decays[key]


def slopes(rule: SlopeRule, heads: int, device: torch.device | str = "cpu") -> Tensor:
    """s_h = -log γ_h of every head, [H] float64 (fp32 on a device without).

    alibi: s_h = 2^{-8(h+1)/H}; where H is no power of two, the slopes of the power n below H and then every second one
    of 2n's (Press et al. 2022, arXiv:2108.12409, released code). retnet: γ_h = 1 - 2^{-5-h} (arXiv:2307.08621).
    Computed on the device: a copy of numbers from the host would keep a decode step out of a CUDA graph.
    """
    if rule == "retnet":
        return torch.log1p(-_powers_of_two(-5, -1, heads, device)).neg()
    n = 1 << (heads.bit_length() - 1)
    first = _powers_of_two(-8 / n, -8 / n, n, device)
    return first if n == heads else torch.cat((first, _powers_of_two(-4 / n, -8 / n, heads - n, device)))


def _powers_of_two(exponent: float, step: float, count: int, device: torch.device | str) -> Tensor:
    dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
    last = exponent + step * (count - 1)
    return torch.logspace(exponent, last, count, base=2.0, dtype=dtype, device=device)


def nearly_none(decay: nn.Linear) -> None:
    """Begin with γ = σ(w·x + b) = 0.9975 for whatever x, as w = 0 and b = 6."""
    nn.init.zeros_(decay.weight)
    nn.init.constant_(decay.bias, 6.0)


class HeadNorm(nn.Module):
    """(o - mean) / √(var + eps) over each head of o [B,T,H,V], in fp32: GroupNorm with H groups and no affine.

    With gain = "head", times a learned scale for each head. The operator can normalise in the kernel that makes o: give
    it `eps`, and what it returns to `scaled`.
    """

    eps = 1e-5

    def __init__(self, heads: int, gain: Gain):
        super().__init__()
        self.gain = nn.Parameter(torch.empty(heads, 1)) if gain == "head" else None

    def forward(self, o: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Rounded to `dtype`, or as o is, before the gain: of a sum that is wide, so that a mean takes no digits."""
        return self.scaled(nn.functional.layer_norm(wide(o), o.shape[-1:], eps=self.eps).to(dtype or o.dtype))

    def scaled(self, normed: Tensor) -> Tensor:
        """Heads that are normalised already, times the gain."""
        return normed if self.gain is None else normed * self.gain

    def target(self, o: Tensor) -> Tensor:
        """What normed heads can be asked to equal: o, or without a gain, whose scale they cannot reach, o normed."""
        return self(o) if self.gain is None else o

    def fit(self, moments: Tensor) -> None:
        if self.gain is not None:
            fit_gain(self.gain, moments)

    def reset_parameters(self) -> None:
        if self.gain is not None:
            nn.init.ones_(self.gain)


def gain_moments(o: Tensor, taught: Tensor) -> Tensor:
    """[2, H]: Σ o_h·o_h and Σ o_h·taught_h of every head, over batch and tokens."""
    return torch.stack((dots(o, o), dots(o, taught)))


def fit_gain(gain: Tensor, moments: Tensor) -> None:
    """Least squares for a gain [H,1], from `gain_moments` of heads that have it in them: gain_h ← gain_h · Σ
    o_h·taught_h / Σ o_h·o_h; a head that answers 0 keeps its own.
    """
    square, product = moments
    gain *= torch.where(square > 0, product / square, 1)[:, None]


def dots(a: Tensor, b: Tensor) -> Tensor:
    """Σ a·b of every head, [H] in fp32 or finer, over batch, tokens and width of [B,T,H,V]."""
    return (wide(a) * wide(b)).sum((0, 1, 3))


def wide(x: Tensor) -> Tensor:
    """x in fp32, or as it is where it is finer."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def in_fp32(module: nn.Module, x: Tensor) -> Tensor:
    """`module`, a linear map or several, of x in fp32 or finer: what a decay, a write strength or a share is made of.

    Where decays begin, from 4 to 8, bf16 has a number every 1/32: a step of 3 % of log σ(x). The module itself is
    called, adapters and all, without autocast. Weights that are stored in half precision have lost their digits, and no
    more are lost: products, sums and biases are fp32's.
    """
    halved = any(parameter.itemsize < 4 for parameter in module.parameters())
    with without_autocast(x.device.type), _Widened() if halved else nullcontext():
        return module(wide(x))


class _Widened(TorchFunctionMode):
    """While this lasts, linear maps compute in fp32 or finer, whatever their weights are stored in."""

    def __torch_function__(self, called, types, args=(), kwargs=None):
        if called is nn.functional.linear:
            args = tuple(None if x is None else wide(x) for x in args)
        return called(*args, **(kwargs or {}))


def over_heads(module: nn.Module, x: Tensor) -> Tensor:
    """`module`, a linear map or a norm as wide as all heads together, over the concatenated heads of x [B,T,heads,K].

    The module itself stays one that takes [..., heads·K], so that whatever is put in its place (an adapter, a quantised
    linear) can be called as it would call the original.
    """
    return module(x.flatten(-2)).view(x.shape)


def draw_map(module: nn.Module) -> None:
    """Draw W [..., out, K] and b of a linear map from U(±1/√K), as `nn.Linear` draws its own."""
    bound = module.weight.shape[-1] ** -0.5
    for parameter in module.parameters(recurse=False):
        _draw_uniform(parameter, bound)


@torch.no_grad()
def _draw_uniform(x: Tensor, bound: float) -> None:
    """Fill x from U[-bound, bound), one of 65,536 values each: PyTorch draws 24 bits a number, which takes nearly twice
    as long, and to draw SUPRA's maps is most of what converting a large base computes.
    """
    if x.is_meta:
        return
    words = torch.empty(2**16, dtype=torch.int64, device=x.device)  # of four numbers; what a core's cache holds
    for part in x.view(-1).split(4 * len(words)):
        bits = words.random_(-(2**63), None).view(torch.int16)
        part.copy_(bits[: len(part)]).mul_(bound / 2**15)


class HeadMap(nn.Module):
    """W_h x_h + b_h for every head h of x [B,T,heads,K] -> [B,T,heads,features]."""

    matrices = ("weight",)
    """The parameters that weight decay is for, as of every module with matrices of its own (docs/adding-a-mixer.md)."""

    def __init__(self, heads: int, head_dim: int, features: int | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, features or head_dim, head_dim))
        self.bias = nn.Parameter(torch.empty(heads, features or head_dim))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bthk,hfk->bthf", x, self.weight) + self.bias

    def reset_parameters(self) -> None:
        draw_map(self)


class ShortConv(nn.Module):
    """y_t = x_t + Σ_{1≤i<taps} w_i ⊙ x_{t-i} over each channel of x [B,T,heads,K], within a document.

    w starts at zero. What came before is the last taps - 1 real tokens of the row's document, [B,taps-1,heads,K].
    """

    def __init__(self, heads: int, width: int, taps: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(taps - 1, heads, width))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor, past: Tensor | None, layout: Layout | None) -> tuple[Tensor, Tensor]:
        """-> y in x's dtype, and what the next call is given as `past`, in fp32 or finer."""
        tokens, before, kept = x.shape[1], len(self.weight), wide(x)
        if past is None:
            past = kept.new_zeros(x.shape[0], before, *x.shape[2:])
        taps = range(1, before + 1)
        if layout is None:
            line = torch.cat((past.to(kept.dtype), kept), dim=1)
            y = kept + sum(self.weight[i - 1] * line[:, before - i : before - i + tokens] for i in taps)
            return y.to(x.dtype), line[:, tokens:]
        # The past stands right before the first real token, wherever padding has put that.
        real = layout.segment >= 0
        first = (real.cumsum(1) == 0).sum(1, keepdim=True)
        place = torch.arange(tokens + before, device=x.device)[None] - first
        old = past.to(kept.dtype).gather(1, _as(place.clamp(0, before - 1), past))
        new = nn.functional.pad(kept, (0, 0, 0, 0, before, 0))
        line = torch.where((place < before)[..., None, None], old, new)
        number = layout.segment.gather(1, (place - before + first).clamp(0, tokens - 1))
        opening = layout.segment.gather(1, first.clamp(max=tokens - 1))
        number = torch.where(place < before, torch.where(place < 0, -1, opening), number)
        y = kept
        for i in taps:
            shifted = slice(before - i, before - i + tokens)
            same = number[:, shifted] == layout.segment
            y = y + self.weight[i - 1] * line[:, shifted].masked_fill(~same[..., None, None], 0)
        last = first + real.sum(1, keepdim=True) + torch.arange(before, device=x.device)
        own = number.gather(1, last) == number.gather(1, last[:, -1:])
        return y.to(x.dtype), line.gather(1, _as(last, line)).masked_fill(~own[..., None, None], 0)


def _as(index: Tensor, x: Tensor) -> Tensor:
    """index [B,N] for a gather along dimension 1 of x [B,·,heads,K]."""
    return index[..., None, None].expand(-1, -1, *x.shape[2:])


class FromIdentity(HeadMap):
    """A `HeadMap` that begins at W = 1, b = 0: its answers are the teacher's q and k, as a feature map then takes
    them."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.copy_(torch.eye(self.weight.shape[-1]))
        nn.init.zeros_(self.bias)


class ReluMap(FromIdentity):
    """φ(x)_h = ReLU(W_h x_h + b_h), T2R's (Kasai et al. 2021, arXiv:2103.13076), as wide as x."""

    width = 1
    """Features for each number of x."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class HedgehogMap(FromIdentity):
    """φ(x)_h = [softmax(W_h x_h + b_h), softmax(-W_h x_h - b_h)], Hedgehog's (Zhang et al. 2024, arXiv:2402.04347):
    twice as wide as x and positive."""

    width = 2

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return torch.cat((x.softmax(-1), (-x).softmax(-1)), dim=-1)
