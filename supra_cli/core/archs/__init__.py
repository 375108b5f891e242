"""Architectures are data: one record per attention layout says where a base keeps its attention and how to call it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedConfig

from supra_cli.core.layout import HeadSpec, Rotate
from supra_cli.core.ops import Rotation
from supra_cli.core.registry import Registry


class Positions(NamedTuple):
    """Where tokens stand, as a base tells its attention."""

    tables: tuple[Tensor, Tensor] | None = None
    """(cos, sin), [B, T, rotated dims] each; None with learned positions."""
    index: Tensor | None = None
    """[B or 1, T]: the number of each token in its document; None where the base does not say it."""


@dataclass(frozen=True)
class Arch:
    """How one attention layout is read: one record for each Hugging Face `model_type` of that layout.

    The law that ties the fields, with r = `rotation(attention, positions)`: `out(attention, softmax(c(r(q) r(k)ᵀ ·
    spec.scale)) v)` is what the base's own attention returns, c being the soft cap where the spec has one. `qkv` and
    `out` call the base's submodules and never read their weights, so that adapters, quantised linears and sharding go
    on working.
    """

    layers: Callable[[nn.Module], Sequence[nn.Module]]
    """model -> its decoder blocks, in order."""
    slot: str
    """Name of the attention submodule in a block."""
    spec: Callable[[nn.Module], HeadSpec]
    """attention -> its shape."""
    qkv: Callable[[nn.Module, Tensor, Positions], tuple[Tensor, Tensor, Tensor]]
    """(attention, x [B,T,D], positions) -> q [B,T,H,K], k [B,T,G,K], v [B,T,G,V]: projected, normed and scaled,
    neither rotated nor repeated to H heads."""
    rotation: Callable[[nn.Module, Positions], Rotate]
    """(attention, positions) -> what rotates x [B,T,·,K]: a `Rotation`, which kernels take in whole, or any function;
    the identity where nothing is rotated."""
    out: Callable[[nn.Module, Tensor], Tensor]
    """(attention, o [B,T,H·V]) -> [B,T,D], dropout of the base's own included."""
    head: Callable[[nn.Module, Tensor], Tensor]
    """(model, hidden [...,D]) -> logits, soft-capping and multipliers included."""
    decoder: str | None = None
    """Name, within the model without a head, of the part whose forward runs the blocks; None where its own does."""
    hands_on: bool = True
    """Whether blocks hand their attention every keyword that they are called with."""
    limit: Callable[[PreTrainedConfig], int | None] = lambda config: None
    """config -> how many positions the base has learned; None where positions have no end."""
    window: Callable[[PreTrainedConfig, int], int | None] | None = None
    """(config, layer) -> how many tokens that layer's own attention sees, None for all; None for a base that has no
    windows, whatever its config says."""
    rope: tuple[str, ...] = ()
    """Numbers that the attention needs in the config's rope_parameters, and that transformers does not ask for."""
    oddities: Mapping[str, Any] = field(default_factory=dict)
    """Keys of a config that switch on, in a model of three small layers, what is peculiar to the base and off by
    default: the laws are held on such a model. A list has an entry a layer."""

    def shape(self, attention: nn.Module) -> HeadSpec:
        """`spec`, with the layer's own window."""
        return replace(self.spec(attention), window=self.seen(attention.config, attention.layer_idx))

    def seen(self, config: PreTrainedConfig, layer: int) -> int | None:
        """The window of a layer, None for all tokens."""
        return None if self.window is None else self.window(config, layer)

    def stack(self, model: nn.Module) -> nn.Module:
        """The module of a model, with or without a head, whose forward runs the decoder blocks."""
        return model.base_model if self.decoder is None else getattr(model.base_model, self.decoder)

    def __reduce__(self) -> tuple:
        """Pickled and copied by name: its functions cannot be."""
        return _by_name, (next(name for name in archs if archs.get(name) is self),)


def _by_name(name: str) -> Arch:
    return archs.get(name)


def head_spec(
    attention: nn.Module,
    *,
    head_dim: int,
    kv_heads: int | None = None,
    softcap: float | None = None,
) -> HeadSpec:
    """The shape of an attention whose keys and values are equally wide, in the words that transformers uses in all."""
    config = attention.config
    return HeadSpec(
        heads=config.num_attention_heads,
        kv_heads=kv_heads or config.num_attention_heads,
        head_dim=head_dim,
        v_dim=head_dim,
        model_dim=config.hidden_size,
        layer=attention.layer_idx,
        scale=attention.scaling,
        softcap=softcap,
    )


def rotary(attention: nn.Module, positions: Positions) -> Rotate:
    """Rotary positions by the base's own tables, over as much of a head as they are wide."""
    return Rotation(*positions.tables)


def unrotated(attention: nn.Module, positions: Positions) -> Rotate:
    """Learned positions, which are in the layer's input already."""
    return lambda x: x


def everywhere(config: PreTrainedConfig, layer: int) -> int | None:
    """One window for all layers."""
    return config.sliding_window


def by_kind(config: PreTrainedConfig, layer: int) -> int | None:
    """A window for the layers that the config calls sliding."""
    return config.sliding_window if config.layer_types[layer] == "sliding_attention" else None


SLIDING = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
"""Oddities of a base with a window in some layers, shorter than the laws' rows."""


def plain_head(model: nn.Module, hidden: Tensor) -> Tensor:
    return model.lm_head(hidden)


archs: Registry[Arch] = Registry("base architecture", package=__name__, group="supra.archs")
