"""Which layers are swapped, and the cache slot that holds a state."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import tiny_model
from transformers import DynamicCache, StaticCache

from supra_cli.core.cache import RecurrentLayer

IDS = torch.arange(3, 20)[None]


def model(keep="none", **changes):
    torch.manual_seed(0)
    return tiny_model("llama", "supra", keep, **changes)


def test_mixers_are_named_below_the_attention_they_sit_in():
    names = [name for name, _ in model("1").named_parameters() if ".mixer." in name]
    assert {name.split(".mixer.")[0] for name in names} == {"model.layers.0.self_attn", "model.layers.2.self_attn"}


@torch.no_grad()
def test_a_state_is_put_into_the_slot_of_a_cache_made_by_anyone():
    swapped = model("1")
    expected = swapped(IDS).logits[:, -1]
    for memory in (DynamicCache(), DynamicCache(config=swapped.config)):
        swapped(IDS[:, :-1], past_key_values=memory)
        assert [isinstance(layer, RecurrentLayer) for layer in memory.layers] == [True, False, True]
        assert memory.get_seq_length() == 16
        torch.testing.assert_close(swapped(IDS[:, -1:], past_key_values=memory).logits[:, -1], expected)


@torch.no_grad()
def test_a_cache_filled_by_another_model_is_refused():
    memory = model("all")(IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="another model"):
        model("none")(IDS[:, :1], past_key_values=memory)


@torch.no_grad()
def test_a_cache_can_be_copied_repeated_reordered_and_reset():
    swapped = model()
    memory = swapped(IDS, use_cache=True).past_key_values
    kept = copy.deepcopy(memory)
    memory.batch_repeat_interleave(3)
    memory.reorder_cache(torch.tensor([2, 0, 1]))
    memory.batch_select_indices(torch.tensor([0, 2]))
    for layer, other in zip(memory.layers, kept.layers, strict=True):
        assert torch.equal(layer.state.S, other.state.S.expand(2, -1, -1, -1))
    memory.reset()
    assert memory.get_seq_length() == 0
    torch.testing.assert_close(swapped(IDS, past_key_values=memory).logits, swapped(IDS).logits)
    with pytest.raises(ValueError, match="cannot forget"):
        kept.crop(-1)


@torch.no_grad()
@pytest.mark.parametrize("keep", ["none", "all"])
def test_a_static_cache_serves_too(keep):
    swapped = model(keep)
    memory = StaticCache(config=swapped.config, max_cache_len=32)
    swapped(IDS[:, :-1], past_key_values=memory)
    torch.testing.assert_close(swapped(IDS[:, -1:], past_key_values=memory).logits[:, -1], swapped(IDS).logits[:, -1])
