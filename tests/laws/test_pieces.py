"""Laws of pieces: a prompt read in pieces leaves the logits and the memory that one pass over it leaves."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from test_rows import left_padded
from tiny import tokens
from torch.testing import assert_close

from supra_cli.core import cache as caches
from supra_cli.core.generate import decode, prefill

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
LENGTHS = (5, 29, 17)


@torch.no_grad()
def check(model, *, padded, pieces):
    """In pieces as in one pass: the logits, and those of two tokens more, which the memory has to answer for."""
    rows = [tokens(length, seed=length) for length in (LENGTHS if padded else LENGTHS[1:2])]
    ids, mask = left_padded(rows, max(LENGTHS))
    mask = mask if padded else None
    whole = model(ids, attention_mask=mask, use_cache=True, logits_to_keep=1)
    assert caches.of(whole).get_seq_length() == ids.shape[1]
    for piece in pieces:
        logits, cache = prefill(model, ids, mask, piece=piece)
        assert_close(logits, whole.logits[:, -1], **CLOSE)
        assert cache.get_seq_length() == ids.shape[1]
        memory, seen = deepcopy(whole.past_key_values), mask
        for step, token in enumerate(tokens(2, len(ids))):
            position = torch.tensor([len(row) for row in rows]) + step
            seen = None if seen is None else torch.cat([seen, seen.new_ones((len(seen), 1))], -1)
            logits, cache = decode(model, token, position, seen, cache)
            want, memory = decode(model, token, position, seen, memory)
            assert_close(logits, want, **CLOSE)


def test_uneven_prompts_in_pieces_leave_what_one_pass_leaves(exact, base, mixer, keep):
    """Of 7 columns, the first three pieces are all padding for the shortest row, and the last one is a single token."""
    check(exact(base, mixer, keep), padded=True, pieces=(4, 7))


def test_even_prompts_in_pieces_leave_what_one_pass_leaves(exact, mixer, keep):
    """Also a piece for each token, and pieces that leave one token or none over."""
    check(exact("llama", mixer, keep), padded=False, pieces=(1, 7, 28, 29))


@pytest.mark.parametrize("padded", [False, True], ids=["even", "uneven"])
@pytest.mark.parametrize("window", [3, 8, 64])
def test_a_sliding_window_reaches_back_over_the_pieces(exact, mixer, keep, window, padded):
    """Windows shorter than a piece, longer than one, and longer than the prompt."""
    check(exact("mistral", mixer, keep, sliding_window=window), padded=padded, pieces=(7,))
