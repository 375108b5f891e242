"""Laws of bases: attention computed through an arch's own qkv, rotation, spec and out is the base's own, layer by layer
and in the logits, with every peculiarity of the base switched on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny import attention, tiny_config, tiny_model, tokens, wide
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from supra_cli.core.archs import archs, everywhere
from supra_cli.core.mixers.window import Window
from supra_cli.core.modeling import SupraConfig, SupraForCausalLM

CLOSE = {"atol": 2e-5, "rtol": 2e-4}
LENGTH = 21
LENGTHS = (8, 13)


def two(base: str, keep: str = "none", **changes: Any) -> tuple[nn.Module, nn.Module]:
    """(the base, the same with the attention of every layer that is not kept computed through its arch).

    `Window` with the base's own window, or one longer than any row, is softmax attention with a cache.
    """
    torch.manual_seed(0)
    ours = tiny_model(base, "window", keep, options={"window": 64, "sinks": 0}, **changes)
    for _, layer in ours.swapped_layers():
        spec = layer.mixer.spec
        layer.mixer = Window(spec, Window.Options(window=spec.window or 64, sinks=0))
    plain = plain_base(base, **changes)
    plain.load_state_dict(ours.state_dict())
    return plain, ours


def plain_base(base: str, **changes: Any) -> nn.Module:
    return AutoModelForCausalLM.from_config(tiny_config(base, **changes), **attention(base)).eval()


@pytest.fixture
def pair(base: str) -> tuple[nn.Module, nn.Module]:
    return two(base)


@contextmanager
def answers(model: nn.Module, base: str) -> Iterator[list[Tensor]]:
    """What each attention layer returns, pass after pass."""
    found: list[Tensor] = []
    arch = archs.get(base)
    handles = [
        getattr(block, arch.slot).register_forward_hook(lambda module, args, output: found.append(output[0]))
        for block in arch.layers(model)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def by_layer(found: list[Tensor]) -> list[Tensor]:
    """The answers of each of three layers, one pass behind the other along the tokens."""
    return [torch.cat(found[layer::3], dim=1) for layer in range(3)]


def assert_layers_close(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted) == 3
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other, **CLOSE)


def places(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_through_the_arch_is_the_base_s(base, kv_heads):
    plain, ours = two(base, num_key_value_heads=kv_heads)
    ids = tokens(2, LENGTH)
    with answers(plain, base) as wanted, answers(ours, base) as found:
        logits = plain(ids).logits
        assert_close(ours(ids).logits, logits, **CLOSE)
    assert_layers_close(found, wanted)
    other = ids.clone()
    other[:, -4] = ids[:, -4] % 50 + 4  # one that the last token sees, whatever the window
    assert (logits[:, -1] - plain(other).logits[:, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("windowed", [name for name in archs if archs.get(name).window is not None])
def test_windows_are_on_and_shorter_than_the_rows(windowed):
    assert 7 in tiny_model(windowed, "window").config.windows()


@torch.no_grad()
def test_what_is_dropped_in_training_is_what_the_base_drops(base):
    """Behind the attention; weights of attention are dropped by softmax alone."""
    none = dict.fromkeys(("attention_dropout", "attn_pdrop", "embd_pdrop", "embedding_dropout"), 0.0)
    plain, ours = two(base, **none)
    ids, dropping = tokens(2, LENGTH), {"resid_pdrop", "residual_dropout"} & plain.config.to_dict().keys()
    logits = []
    for model in (plain, ours):
        torch.manual_seed(0)
        logits.append(model.train()(ids).logits)
    assert_close(logits[1], logits[0], **CLOSE)
    assert ((logits[0] - plain.eval()(ids).logits).abs().max() > 0.1) or not dropping


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(base, pair):
    plain, ours = pair
    ids, mask = tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :5] = 0
    real = mask.bool()
    with answers(plain, base) as taught, answers(ours, base) as found:
        wanted = plain(ids, attention_mask=mask, position_ids=places(mask)).logits
        assert_close(ours(ids, attention_mask=mask).logits[real], wanted[real], **CLOSE)
    assert_layers_close([layer[real] for layer in found], [layer[real] for layer in taught])
    assert_close(ours(ids, attention_mask=mask).logits[:1, 5:], plain(ids[:1, 5:]).logits, **CLOSE)


def in_pieces(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits of a pass over a few pieces with a cache."""
    cache, pieces = None, []
    for piece in ids.split((9, 1, 1, 10), dim=1):
        # By whichever name the base takes it.
        output = model(piece, use_cache=True, **({} if cache is None else {"past_key_values": cache}))
        cache = output.past_key_values
        pieces.append(output.logits)
    return torch.cat(pieces, dim=1)


@torch.no_grad()
def test_in_pieces_with_a_cache_it_is_the_base_s(base, pair):
    plain, ours = pair
    ids = tokens(2, LENGTH)
    with answers(plain, base) as taught, answers(ours, base) as found:
        assert_close(in_pieces(ours, ids), plain(ids).logits, **CLOSE)
    assert_layers_close(by_layer(found), taught)


def packed(model: nn.Module, ids: Tensor) -> Tensor:
    position = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    return model(ids, position_ids=position, use_cache=False).logits


def apart(model: nn.Module, ids: Tensor) -> Tensor:
    return torch.cat([model(piece).logits for piece in ids.split(LENGTHS, dim=1)], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("kept", ["none", "all", "1"])
def test_packed_documents_are_the_base_s_documents_apart(base, kept):
    plain, ours = two(base, kept)
    ids = tokens(1, LENGTH)
    with answers(plain, base) as taught, answers(ours, base) as found:
        assert_close(packed(ours, ids), apart(plain, ids), **CLOSE)
    assert_layers_close(found, by_layer(taught))


@torch.no_grad()
@pytest.mark.parametrize("kept", ["none", "all"])
@pytest.mark.parametrize("same", [name for name in archs if archs.get(name).window in (None, everywhere)])
def test_windows_that_the_base_does_not_heed_are_none(same, kept):
    """As of a config that was made from another family's, where all layers of this one see the same."""
    config, own = tiny_config(same), None if archs.get(same).window is None else 7
    config.sliding_window, config.attention_chunk_size = 7, 5
    config.layer_types = ["full_attention", "sliding_attention", "chunked_attention"]
    torch.manual_seed(0)
    config = SupraConfig.from_base(config).with_mixer("window", {"window": own or 64, "sinks": 0}, kept)
    ours, plain = SupraForCausalLM._from_config(config).eval(), plain_base(same)
    plain.load_state_dict(ours.state_dict())
    ids = tokens(1, LENGTH)
    assert config.windows() == [own] * 3
    assert_close(in_pieces(ours, ids), plain(ids).logits, **CLOSE)
    assert_close(packed(ours, ids), apart(plain, ids), **CLOSE)


@torch.no_grad()
def test_a_window_longer_than_the_row_is_the_base(base):
    torch.manual_seed(0)
    ours = tiny_model(base, "window", options={"window": 64}, **wide(base))
    plain = plain_base(base, **wide(base))
    plain.load_state_dict(ours.state_dict())
    ids, given = tokens(2, LENGTH), {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert_close(ours(ids).logits, plain(ids).logits, **CLOSE)
    assert_close(in_pieces(ours, ids), plain(ids).logits, **CLOSE)
    assert torch.equal(ours.generate(ids, **given), plain.generate(ids, **given))
