"""Laws of time: a mixer is causal, and its state is all it needs to know of the past."""

from __future__ import annotations

import pytest
import torch
from tiny import tokens
from torch.testing import assert_close

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def run(model, *pieces, **kwargs):
    """Logits of the pieces, each continuing the one before."""
    memory, logits = None, []
    for piece in pieces:
        output = model(piece, past_key_values=memory, use_cache=True, **kwargs)
        memory = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, dim=1), memory


def a_layer(model, batch, length):
    """A swapped layer, an input for it and the tables of its positions."""
    _, layer = next(model.swapped_layers())
    x = torch.randn(batch, length, 32, dtype=model.dtype)
    return layer, x, model.model.rotary_emb(x, torch.arange(length)[None])


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(1, 69), (64, 6), (7, 1, 62)])
def test_a_sequence_in_pieces_gives_the_logits_of_the_whole(exact, base, mixer, lengths):
    model, ids = exact(base, mixer), tokens(2, 70)
    pieces, memory = run(model, *ids.split(lengths, dim=1))
    assert_close(pieces, model(ids).logits, **CLOSE)
    assert memory.get_seq_length() == 70


@torch.no_grad()
def test_prefill_then_steps_gives_the_logits_of_one_pass(exact, base, mixer, keep):
    model, ids = exact(base, mixer, keep), tokens(2, 23)
    steps, _ = run(model, ids[:, :13], *ids[:, 13:].split(1, dim=1))
    assert_close(steps, model(ids).logits, **CLOSE)


@torch.no_grad()
def test_a_token_changes_nothing_before_it(exact, base, mixer):
    model, ids = exact(base, mixer), tokens(1, 70)
    changed = ids.clone()
    changed[:, 40] = (ids[:, 40] + 1) % 90 + 3
    before, after = model(ids).logits, model(changed).logits
    assert_close(after[:, :40], before[:, :40], **CLOSE)
    assert not torch.allclose(after[:, 40:], before[:, 40:], **CLOSE)


@torch.no_grad()
def test_the_past_matters_beyond_the_last_token(build, base, mixer):
    """Guards the other laws: a model that forgets everything would keep them all."""
    model, ids = build(base, mixer), tokens(1, 20)
    changed = ids.clone()
    changed[:, 15] = (ids[:, 15] + 1) % 90 + 3
    assert (model(ids).logits[:, -1] - model(changed).logits[:, -1]).abs().max() > 1e-3


@torch.no_grad()
def test_state_size_does_not_grow(build, recurrent):
    model = build("llama", recurrent)
    _, short = run(model, tokens(1, 3))
    _, long = run(model, tokens(1, 200))
    for (_, layer), before, after in zip(model.swapped_layers(), short.layers, long.layers, strict=True):
        start = layer.mixer.init_state(1, "cpu")
        for name, first, *others in zip(start._fields, start, before.state, after.state, strict=True):
            for other in others:
                assert (other.shape, other.dtype) == (first.shape, first.dtype), name


@torch.no_grad()
def test_the_initial_state_is_no_state_and_has_a_shape_on_meta(build, recurrent):
    layer, x, tables = a_layer(build("llama", recurrent), 2, 9)
    start = layer.mixer.init_state(2, "cpu")
    fresh, _ = layer.heads(x, position_embeddings=tables)
    given, _ = layer.heads(x, position_embeddings=tables, state=start)
    assert_close(fresh, given)
    assert [tensor.shape for tensor in layer.mixer.init_state(2, "meta")] == [tensor.shape for tensor in start]


@torch.no_grad()
def test_in_bf16_the_error_of_steps_does_not_grow_with_length(build, recurrent):
    """Steps against the parallel form, both in bf16: at 4,096 tokens at most twice the error at 64.

    An error below one rounding of the output (2⁻⁹ of its size) counts as one rounding.
    """
    length, window = 4096, 32
    layer, x, tables = a_layer(build("llama", recurrent, num_hidden_layers=1).to(torch.bfloat16), 1, length)
    parallel, _ = layer.heads(x, position_embeddings=tables)
    state, steps = None, []
    for t in range(length):
        o, state = layer.heads(
            x[:, t : t + 1], position_embeddings=[table[:, t : t + 1] for table in tables], state=state
        )
        steps.append(o)
    error = (torch.cat(steps, dim=1).float() - parallel.float()).square().mean(dim=(0, 2, 3))
    early, late = error[64 - window : 64].mean().sqrt(), error[length - window :].mean().sqrt()
    assert late <= 2 * early.clamp(min=parallel.float().square().mean().sqrt() * 2**-9)


@torch.no_grad()
def test_a_state_is_left_as_it_was_given(build, recurrent):
    layer, x, tables = a_layer(build("llama", recurrent), 2, 12)
    _, state = layer.heads(x, position_embeddings=tables)
    before = [tensor.clone() for tensor in state]
    layer.heads(x, position_embeddings=tables, state=state)
    assert all(map(torch.equal, state, before))
