"""The config of a swapped model: the base's own, plus what was exchanged. `AutoConfig` needs no more than this."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any, NamedTuple

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

from supra_cli.core.archs import archs, everywhere
from supra_cli.core.errors import UsageError
from supra_cli.core.mixers import options_by_layer, parse_options
from supra_cli.core.recipe.keep import SOFTMAX, layer_kinds


class Swap(NamedTuple):
    """What was exchanged in a model: the key `supra` of its config."""

    base: str
    """The base's `model_type`."""
    mixer: str
    options: dict[str, Any]
    layers: list[str]
    """The kind of each layer: the mixer's name, or softmax."""

    @property
    def any(self) -> bool:
        return any(kind != SOFTMAX for kind in self.layers)

    def of_layers(self, chosen: Sequence[int]) -> Swap:
        """That of a model which has these layers alone."""
        own = {name: [values[n] for n in chosen] for name, values in options_by_layer(self.options).items()}
        return self._replace(options={**self.options, **own}, layers=[self.layers[n] for n in chosen])

    def check(self, layers: int) -> None:
        """Raise a ValueError unless every one of the model's layers has a kind, the mixer's or softmax."""
        if len(self.layers) != layers or not set(self.layers) <= {self.mixer, SOFTMAX}:
            raise ValueError(f"expected {layers} layers of kind '{self.mixer}' or '{SOFTMAX}', got {self.layers}")


class SupraConfig(PreTrainedConfig):
    """The base's config whole, plus what was exchanged.

    Instances are of a subclass made for each base, `SupraLlamaConfig(LlamaConfig, SupraConfig)`, so every attribute,
    default and check of the base's config holds. Written without any swapped layer it is the base's plain config
    again.
    """

    model_type = "supra"
    supra: dict | None = None

    @classmethod
    def from_base(
        cls,
        base: PreTrainedConfig,
        *,
        mixer: str = SOFTMAX,
        options: Mapping[str, Any] | None = None,
        layers: Sequence[str] | None = None,
    ) -> SupraConfig:
        """The config of `base` with `mixer` in the layers whose kind in `layers` is not softmax (all, if None)."""
        if isinstance(base, SupraConfig):
            base = base.plain()
        kinds = [mixer] * base.num_hidden_layers if layers is None else list(layers)
        chosen = asdict(parse_options(mixer, options or {}))
        for name, values in options_by_layer(chosen).items():
            if len(values) != base.num_hidden_layers:
                raise UsageError(
                    f"mixer.{name} has {len(values)} values, expected one, or one for each of the model's "
                    f"{base.num_hidden_layers} layers"
                )
            chosen[name] = list(values)  # in JSON's words, so that it is the same when it has been saved
        record = Swap(base.model_type, mixer, chosen, kinds)
        record.check(base.num_hidden_layers)
        config = config_class(record.base)(**_fields(base), supra=record._asdict())
        config._attn_implementation = base._attn_implementation
        return config

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> SupraConfig:
        if __name__ == "supra_cli.core.config":  # the class here is ours, and saved it brings no code of an export
            config_dict = {key: value for key, value in config_dict.items() if key != "auto_map"}
        if cls is SupraConfig:
            base = config_dict["supra"]["base"]
            return config_class(base).from_dict(_heeded(base, config_dict), **kwargs)
        return super().from_dict(config_dict, **kwargs)

    @property
    def swap(self) -> Swap:
        return Swap(**self.supra)

    def limit(self) -> int | None:
        """How many positions the base has: the learned ones, or those up to which its rotary tables are the same for
        texts of every length; None where there is no end.
        """
        stretched = [self.max_position_embeddings for kind, _ in _tables(self) if "dynamic" in kind]
        return min([*stretched, *filter(None, [archs.get(self.swap.base).limit(self)])], default=None)

    def switch(self) -> int | None:
        """The length beyond which the base takes other rotary tables for all of a text, its first tokens included; None
        for most.

        Phi-3's long contexts (rope_type longrope, arXiv:2402.13753) have such tables.
        """
        return min(
            (table["original_max_position_embeddings"] for kind, table in _tables(self) if kind == "longrope"),
            default=None,
        )

    def windows(self) -> list[int | None]:
        """How many tokens each layer's own attention sees, None for all."""
        arch = archs.get(self.swap.base)
        return [arch.seen(self, layer) for layer in range(self.num_hidden_layers)]

    def with_mixer(self, mixer: str, options: Mapping[str, Any] | None = None, keep: str = "none") -> SupraConfig:
        """The base with `mixer` in every layer that `keep`, as `layer_kinds` reads it, does not spare; `auto` are those
        that are spared already.
        """
        ranked = [n for n, kind in enumerate(self.swap.layers) if kind == SOFTMAX] if self.swap.any else ()
        sliding = [layer for layer, window in enumerate(self.windows()) if window]
        layers = layer_kinds(self.num_hidden_layers, mixer, keep, sliding, ranked)
        return self.from_base(self, mixer=mixer, options=options, layers=layers)

    def plain(self) -> PreTrainedConfig:
        """The base's own config."""
        config = CONFIG_MAPPING[self.swap.base](**_fields(self))
        config._attn_implementation = self._attn_implementation
        return config

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        if self.supra is None:
            return output
        # What transformers saves is named by its class there: SupraLlamaModel is without a head.
        headless = any(re.fullmatch("Supra.*Model", str(name)) for name in self.architectures or ())
        if self.swap.any:
            return output | {"architectures": ["SupraModel" if headless else "SupraForCausalLM"]}
        del output["supra"]
        # Not at the top: `AutoConfig` alone must not load the table of models, which asks for ours while it loads.
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

        architecture = (MODEL_MAPPING_NAMES if headless else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)[self.swap.base]
        return output | {"model_type": self.swap.base, "architectures": [architecture]}


def _tables(config: PreTrainedConfig) -> list[tuple[str, Mapping[str, Any]]]:
    """(kind, parameters) of the base's rotary tables, of which some bases have one for each kind of layer."""
    own = getattr(config, "rope_parameters", None) or {}
    tables = [own] if "rope_type" in own else [table for table in own.values() if isinstance(table, Mapping)]
    return [(table.get("rope_type", "default"), table) for table in tables]


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    base = config.swap.base if isinstance(config, SupraConfig) else config.model_type
    apart = ("model_type", "architectures", "transformers_version", "supra")
    return {key: value for key, value in _heeded(base, config.to_dict()).items() if key not in apart}


def _heeded(base: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Without the windows that the base itself does not heed, but a cache of transformers would."""
    stray = _STRAY.get(archs.get(base).window, ())
    return {key: value for key, value in fields.items() if key not in stray}


_STRAY = {
    None: ("sliding_window", "layer_types", "attention_chunk_size"),
    everywhere: ("layer_types", "attention_chunk_size"),
}
"""By an arch's `window`, the keys that are another family's."""


@cache
def config_class(base: str) -> type[SupraConfig]:
    """The config class for a base's `model_type`; a UsageError without an arch."""
    archs.get(base)
    plain = CONFIG_MAPPING[base]
    return type(f"Supra{plain.__name__}", (plain, SupraConfig), {"model_type": "supra", "__module__": __name__})


def __getattr__(name: str) -> type[SupraConfig]:
    """`SupraLlamaConfig` and its like by name, as pickle looks for them in another process."""
    for base in archs if name.startswith("Supra") else ():
        if name == f"Supra{CONFIG_MAPPING[base].__name__}":
            return config_class(base)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


if __name__ == "supra_cli.core.config":  # an exported model says in its config what it is, and registers nothing
    AutoConfig.register("supra", SupraConfig, exist_ok=True)
