"""Models of many layers by models of few: every layer of one kind adds the same to what a step takes."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

from supra_cli.core.mixers import options_by_layer
from supra_cli.core.modeling import SupraConfig

FEW = 2
"""Layers of a kind in the smallest model that is tried: the first and the last may differ from those between."""

Step = Callable[[Sequence[SupraConfig]], list[int]]


def extrapolated(step: Step, configs: Sequence[SupraConfig]) -> list[int]:
    """step(configs), whose every figure is linear in the numbers of layers: f₀ + Σ_n (n − FEW)·(f₊₁ − f₀).

    f₀ is of models with FEW layers of each kind, f₊₁ of the same with one more of every kind that has n.
    """
    whole = [Counter(kinds(config)) for config in configs]
    few = [Counter({kind: min(count, FEW) for kind, count in counts.items()}) for counts in whole]

    def of(numbers: Sequence[Counter]) -> list[int]:
        return step([shortened(config, counts) for config, counts in zip(configs, numbers, strict=True)])

    least = of(few)
    total = least
    for count in {count for counts in whole for count in counts.values() if count > FEW}:
        added = [Counter(kind for kind, number in counts.items() if number == count) for counts in whole]
        grown = zip(total, of([one + more for one, more in zip(few, added, strict=True)]), least, strict=True)
        total = [so_far + (count - FEW) * (after - before) for so_far, after, before in grown]
    return total


def kinds(config: SupraConfig) -> list[Hashable]:
    """Of each layer what tells it from others: its mixer, the base's type of layer where it has several, and its own
    options.
    """
    mixers, own = config.swap.layers, zip(*options_by_layer(config.swap.options).values(), strict=True)
    types = getattr(config, "layer_types", None) or [None] * len(mixers)
    return list(zip(mixers, types, list(own) or [()] * len(mixers), strict=True))


def shortened(config: SupraConfig, counts: Counter) -> SupraConfig:
    """`config` with so many layers of each kind: the first ones and the last."""
    every = kinds(config)
    whole, seen, chosen = Counter(every), Counter(), []
    for layer, kind in enumerate(every):
        seen[kind] += 1
        if seen[kind] < counts[kind] or seen[kind] == whole[kind]:
            chosen.append(layer)
    config = copy.deepcopy(config)
    config.num_hidden_layers = len(chosen)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in chosen]
    config.supra = config.swap.of_layers(chosen)._asdict()
    return config
