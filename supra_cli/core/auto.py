"""transformers' Auto classes learn of converted models. An exported one does without: its config says what it is."""

from __future__ import annotations


def register_config() -> None:
    """Once transformers' AutoConfig is there."""
    from transformers.models.auto.configuration_auto import AutoConfig

    from supra_cli.core.config import SupraConfig

    AutoConfig.register(SupraConfig.model_type, SupraConfig, exist_ok=True)


def register_models() -> None:
    """Once transformers' tables of models are there."""
    from supra_cli.core.archs import archs
    from supra_cli.core.config import SupraConfig, config_class
    from supra_cli.core.modeling import SupraForCausalLM, SupraModel

    for kind in (SupraForCausalLM, SupraModel):
        kind.auto.register(SupraConfig, kind, exist_ok=True)
        for base in archs:
            # A config that is read before any model, as pipelines do: the base's class is made when one is wanted.
            kind.auto._model_mapping.register(config_class(base), kind, exist_ok=True)
