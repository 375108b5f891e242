"""The stack of decoder blocks, told once a forward what swapped layers need and held to what it was asked to cache."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache as memoised
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from supra_cli.core import cache as caches
from supra_cli.core.layout import Layout, derive, softmax_mask
from supra_cli.core.recipe.keep import SOFTMAX
from supra_cli.core.swap import base_class


class SwappedBackbone(nn.Module):
    """The base's own decoder stack, its class exchanged for a subclass of that class and of this.

    Whoever runs the blocks comes through here, the language model's head or a caller without one, so that:
    - padding and documents are read from mask and positions once, and every swapped layer gets the same layout;
    - after a pass that was asked to cache, every swapped layer has advanced by the tokens of the pass, or it raises;
    - `output_attentions=True` gives an entry for every layer, None for one that has no such weights.
    """

    cache_keyword: str
    """The name by which the base's stack takes a cache: `cache` from transformers 5.24 on."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the base's, for every mask [B, past + T] and every position_ids [B, T], where 0 begins a document."""
        swap = self.config.swap
        kinds, limit, switch = swap.layers, self.config.limit(), self.config.switch()
        attends = SOFTMAX in kinds
        batch, tokens = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        cache = caches.handed(kwargs)
        recurrent = [] if cache is None else caches.prepare(cache, kinds)
        check_mask(attention_mask, batch, tokens, recurrent)
        past = 0 if cache is None else recurrent[0].tokens if recurrent else cache.get_seq_length()
        if limit is not None and past + tokens > limit:
            raise ValueError(
                f"the base has {limit} positions, got {past + tokens} columns; pass shorter rows, or choose a base "
                "whose positions have no end"
            )
        if switch is not None and 0 < past <= switch < past + tokens:
            raise ValueError(
                f"the base's positions are others in texts of more than {switch} tokens, and {past} have been read; "
                f"pass all {past + tokens} at once, without the cache"
            )
        layout, position_ids, packed = derive(attention_mask, position_ids, batch, tokens)
        if position_ids is None:  # not every base counts them as we do, and some read the mask for it
            device = (input_ids if inputs_embeds is None else inputs_embeds).device
            position_ids = past + torch.arange(tokens, device=device)[None]
        if use_cache is None and cache is None and self.training:
            use_cache = False  # a caller who trains asks for no state
        if packed and use_cache is not False:
            # Whether rows are packed decides what follows, so that a GPU waits here: at most once a prompt, and never
            # without position_ids. On meta there is nothing to read, and such a call is a prompt's.
            packed = self.device.type != "meta" and bool((layout.segment > 0).any())
        if packed and use_cache is None and cache is None:
            use_cache = False
        if packed and switch is not None and tokens > switch:
            raise ValueError(
                f"the base's positions are others in texts of more than {switch} tokens, got rows of {tokens} with "
                "position_ids that restart; pass one document a row"
            )
        if packed and attends and (cache is not None or use_cache is not False):
            raise ValueError(
                "packed rows cannot be cached by softmax layers, got position_ids that restart; pass one document a row"
            )
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            # The base would make one itself, of keys and values only.
            cache = DynamicCache(config=self.config)
            recurrent = caches.prepare(cache, kinds)
        before = [layer.tokens for layer in recurrent]
        output = super().forward(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask if attends and not packed else self._mask(layout, attends),
            position_ids=position_ids,
            use_cache=use_cache,
            **{self.cache_keyword: cache},
            **({"layout": layout} if swap.any else {}),
            **caches.without(kwargs),
        )
        for layer, seen in zip(recurrent, before, strict=True):
            if layer.tokens != seen + tokens:
                raise RuntimeError(
                    f"a swapped layer carried {layer.tokens - seen} of {tokens} tokens of a pass that was to cache: "
                    "the cache did not reach it; checkpointed activations in training take use_cache=False"
                )
        weights = getattr(output, "attentions", None)
        if weights is not None and len(weights) < len(kinds):  # transformers leaves out layers that give none
            weights = iter(weights)
            output.attentions = tuple(next(weights) if kind == SOFTMAX else None for kind in kinds)
        return output

    def _mask(self, layout: Layout | None, attends: bool) -> Tensor | Mapping[str, Tensor]:
        """The 4-D mask of packed rows, which not every base recognises, by kind of layer where the base has several.

        Without softmax layers an empty one, so that the base makes none: it would be quadratic in T.
        """
        if not attends:
            return torch.empty((1, 1, 0, 0), device=self.device)
        tokens = layout.segment.shape[1]
        masked = partial(softmax_mask, layout, tokens, dtype=self.dtype, device=layout.segment.device)
        window, kinds = self.config.windows(), getattr(self.config, "layer_types", None)
        if kinds is None:
            return masked(window=window[0])
        return {kind: masked(window=window[kinds.index(kind)]) for kind in set(kinds)}


def check_mask(mask: Tensor | None, batch: int, tokens: int, recurrent: list[caches.RecurrentLayer]) -> None:
    """ValueError unless the mask says of every token, the cached ones included, whether it is real."""
    if mask is None:
        return
    if recurrent:
        expected = [batch, recurrent[0].tokens + tokens]
        fits = list(mask.shape) == expected
    else:
        expected = [batch, "past + T"]
        fits = mask.ndim == 2 and mask.shape[0] == batch and mask.shape[1] >= tokens
    if not fits:
        raise ValueError(
            f"attention_mask is {list(mask.shape)}, expected {expected}: 1 for every real token, the cached ones too"
        )


@memoised
def swapped_backbone(base: type[nn.Module]) -> type[SwappedBackbone]:
    """The subclass of a base's decoder stack that models of that base have."""
    keyword = "cache" if "cache" in signature(base.forward).parameters else "past_key_values"
    members = {"cache_keyword": keyword, "__module__": __name__}
    backbone = type(f"Swapped{base.__name__}", (SwappedBackbone, base), members)
    # transformers enters what of a stack can be recorded under the name of its class when an instance is made, which is
    # before ours is exchanged; without this, output_hidden_states=True gives None. Its key differs between versions, so
    # it is set as of a plain dict.
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(backbone), backbone._can_record_outputs)
    return backbone


def __getattr__(name: str) -> type[SwappedBackbone]:
    """`SwappedLlamaModel` and its like by name, as pickle looks for them in another process."""
    if name.startswith("Swapped") and (base := base_class(name.removeprefix("Swapped"))) is not None:
        return swapped_backbone(base)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
