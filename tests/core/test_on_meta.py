"""Whole models on a device that is not the CPU, where no GPU is: nothing waits for the device or mixes devices.

Under FakeTensorMode, with every tensor on `meta`, a question for a number raises, and so does an operation on tensors
of two devices. `ops.planning("triton")` takes the form of the operator that a GPU takes.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tiny import EXPERTS, tiny_model
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import StaticCache

from supra_cli.core import ops
from supra_cli.core import recipe as recipes
from supra_cli.core.archs import archs
from supra_cli.core.cache import RecurrentLayer
from supra_cli.core.data.packing import Batch
from supra_cli.core.errors import UsageError
from supra_cli.core.generate import decode, prefill
from supra_cli.core.mixers import mixers
from supra_cli.core.recipe.keep import SOFTMAX
from supra_cli.core.stages import stages
from supra_cli.core.train.build import prepare, stage_of

KEEPS = ("none", "every:2")
RECURRENT = [name for name in mixers if name != SOFTMAX]
MODELS = [
    *((base, "supra") for base in archs if base not in EXPERTS),
    *(("llama", mixer) for mixer in RECURRENT if mixer != "supra"),
]
"""(base, mixer); test_no_host_sync.py asks every mixer with all its options. Experts do ask: which tokens they have."""

META = torch.device("meta")


@pytest.fixture(autouse=True)
def no_data() -> Iterator[None]:
    # transformers begins a dynamic cache's keys with `torch.tensor([])`, which the mode does not make fake by itself.
    with FakeTensorMode(allow_non_fake_inputs=True), ops.planning("triton"):
        yield


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.long, device=META)


def model_of(base: str, mixer: str, keep: str):
    with META:
        return tiny_model(base, mixer, keep)


def assert_on_meta(*tensors: Tensor) -> None:
    assert tensors
    assert all(isinstance(tensor, FakeTensor) and tensor.device == META for tensor in tensors)


def held(cache) -> list[Tensor]:
    """Every tensor of a cache."""
    parts = [layer.state if isinstance(layer, RecurrentLayer) else (layer.keys, layer.values) for layer in cache.layers]
    return tree_leaves(parts)


def test_what_is_looked_for_raises_here() -> None:
    model = model_of("llama", "supra", "none")
    with pytest.raises(RuntimeError, match="same device"):
        model(inputs_embeds=torch.zeros(2, 9, 32))
    question = model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: bool(args[0].isfinite().all()))
    with pytest.raises(DataDependentOutputException):
        model(meta(2, 9))
    question.remove()
    assert_on_meta(model(meta(2, 9)).logits)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize(("base", "mixer"), MODELS)
def test_reading_and_writing_text_ask_nothing_of_the_device(base: str, mixer: str, keep: str, padded: bool) -> None:
    """A pass without a cache, a prompt in two pieces, two tokens more."""
    model, mask = model_of(base, mixer, keep), meta(2, 9) if padded else None
    assert_on_meta(model(meta(2, 9), attention_mask=mask, use_cache=False).logits)
    logits, cache = prefill(model, meta(2, 9), mask, piece=5)
    for length in (10, 11):
        mask = meta(2, length) if padded else None
        logits, cache = decode(model, logits.argmax(-1), meta(2), mask, cache)
        assert_on_meta(logits, *held(cache))
    assert cache.get_seq_length() == 11


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("keep", KEEPS)
def test_positions_of_a_prompt_and_a_static_cache_are_not_read_either(keep: str, padded: bool) -> None:
    """As transformers' `generate` gives them. A GPU is asked once a prompt whether rows with kept layers hold one
    document each, which nothing on meta can answer: there their prompt goes without positions.
    """
    model, mask = model_of("llama", "supra", keep), meta(2, 9) if padded else None
    prompt = {"attention_mask": mask, "position_ids": meta(2, 9) if keep == "none" else None}
    cache = StaticCache(config=model.config, max_cache_len=16)
    output = model(meta(2, 9), **prompt, past_key_values=cache, use_cache=True)
    mask = meta(2, 10) if padded else None
    one = {"attention_mask": mask, "position_ids": meta(2, 1)}
    assert_on_meta(output.logits, model(meta(2, 1), **one, past_key_values=cache, use_cache=True).logits, *held(cache))


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("mixer", RECURRENT)
@pytest.mark.parametrize("kind", list(stages))
def test_passes_of_training_ask_nothing_of_the_device(kind: str, mixer: str, keep: str) -> None:
    """On packed rows, up to the gradients; what a step asks then, the loss and the gradients' norm, is one question."""
    student = model_of("llama", mixer, keep).train()
    teacher = model_of("llama", SOFTMAX, "none")
    stage = stage_of(spec := recipes.Stage(kind=kind, tokens=1))
    try:
        trained = prepare(student, stage, spec)
    except UsageError:
        assert stage.teacher == "shared"
        assert not list(next(student.swapped_layers())[1].mixer.parameters())
        return
    batch = Batch(meta(2, 9), meta(2, 9), meta(2, 9))

    def backward(part: Tensor) -> Tensor:
        part.backward(torch.full_like(part, 0.1))
        return part.detach()

    with torch.no_grad():
        stage.begin(student, stage.measure(student, batch), tokens=16)
    loss = stage.loss(student, teacher if stage.teacher == "separate" else None, batch, backward)
    assert_on_meta(loss.sum, *loss.metrics.values(), *(parameter.grad for _, parameter in trained))
