"""Laws of rows: padding changes nothing, documents do not see each other, the state is the one at the last real
token.
"""

from __future__ import annotations

import pytest
import torch
from tiny import tokens, wide
from torch.testing import assert_close

from supra_cli.core.layout import derive
from supra_cli.core.recipe.keep import SOFTMAX

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
LENGTHS = (5, 17, 12)


def left_padded(rows, to):
    ids = torch.zeros(len(rows), to, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, line in enumerate(rows):
        ids[row, to - len(line) :] = line
        mask[row, to - len(line) :] = 1
    return ids, mask


def packed(lengths):
    return torch.cat([torch.arange(length) for length in lengths])[None]


@torch.no_grad()
def test_left_padding_changes_no_logit(exact, base, mixer, keep):
    model = exact(base, mixer, keep)
    rows = [tokens(length, seed=length) for length in LENGTHS]
    ids, mask = left_padded(rows, 20)
    logits = model(ids, attention_mask=mask).logits
    for row, line in enumerate(rows):
        assert_close(logits[row, 20 - len(line) :], model(line[None]).logits[0], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("explicit", [True, False], ids=["positions given", "positions counted"])
def test_the_state_handed_on_is_the_one_at_each_rows_last_real_token(exact, base, mixer, explicit):
    """A batch padded on the right, continued with three tokens more, is each row continued alone.

    A sliding layer of the base keeps its last columns, padding among them, so its window is to hold the row.
    """
    model = exact(base, mixer, **(wide(base) if mixer == SOFTMAX else {}))
    rows, more = [tokens(length, seed=length) for length in LENGTHS], tokens(len(LENGTHS), 3)
    ids, mask = (side.flip(1) for side in left_padded([row.flip(0) for row in rows], 18))
    memory = model(ids, attention_mask=mask, use_cache=True).past_key_values
    mask = torch.cat((mask, torch.ones_like(more)), dim=1)
    positions = torch.tensor(LENGTHS)[:, None] + torch.arange(3) if explicit else None
    logits = model(more, attention_mask=mask, position_ids=positions, past_key_values=memory).logits
    for row, line in enumerate(rows):
        alone = model(torch.cat((line, more[row]))[None]).logits[0, -3:]
        assert_close(logits[row], alone, **CLOSE)


@torch.no_grad()
def test_packed_documents_do_not_see_each_other(exact, base, mixer, keep):
    model = exact(base, mixer, keep)
    rows = [tokens(length, seed=length) for length in (1, 40, 2, 63)]
    logits = model(torch.cat(rows)[None], position_ids=packed(map(len, rows)), use_cache=False).logits[0]
    for part, line in zip(logits.split([len(line) for line in rows]), rows, strict=True):
        assert_close(part, model(line[None]).logits[0], **CLOSE)


@torch.no_grad()
def test_packed_documents_with_padding_on_either_side_do_not_see_each_other(exact, mixer, keep):
    model = exact("llama", mixer, keep)
    rows = [tokens(length, seed=length) for length in (9, 30)]
    pad = torch.zeros(4, dtype=torch.long)
    ids = torch.cat((pad, *rows, pad))[None]
    mask = (ids > 0).long()
    positions = torch.cat((pad[None], packed(map(len, rows)), pad[None]), dim=1)
    logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[0, 4:-4]
    assert logits.isfinite().all()
    for part, line in zip(logits.split([len(line) for line in rows]), rows, strict=True):
        assert_close(part, model(line[None]).logits[0], **CLOSE)


@torch.no_grad()
def test_after_packed_rows_the_state_is_the_last_documents(exact, recurrent):
    model = exact("llama", recurrent)
    first, second, more = tokens(21, seed=2), tokens(14, seed=3), tokens(1, 4, seed=4)
    memory = model(torch.cat((first, second))[None], position_ids=packed((21, 14)), use_cache=True).past_key_values
    logits = model(more, position_ids=14 + torch.arange(4)[None], past_key_values=memory).logits
    assert_close(logits, model(torch.cat((second[None], more), dim=1)).logits[:, -4:], **CLOSE)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_gradients_are_finite_and_reach_every_parameter(build, base, mixer, packing):
    """In rows longer than the windows that mixers have by default: some parameters are for what has left them."""
    model, ids = build(base, mixer).train(), tokens(2, 100)
    if packing:
        call = {"position_ids": packed((13, 87)).expand(2, -1)}
    else:
        call = {"attention_mask": torch.cat((torch.zeros(2, 6), torch.ones(2, 94)), dim=1)}
    model(ids, objective=lambda hidden, head: head(hidden)[:, 6:].logsumexp(-1).mean(), **call).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if ".mixer." in name:
            assert parameter.grad.abs().sum() > 0, name


def test_an_objective_sees_what_the_head_makes_into_the_logits(build, base):
    model, ids = build(base), tokens(2, 9)
    logits = model(ids, objective=lambda hidden, head: head(hidden))
    assert torch.equal(logits, model(ids).logits)


def test_a_batch_without_padding_or_restarts_has_no_layout():
    assert derive(None, None, 2, 5) == (None, None, False)
    assert derive(torch.ones(2, 5), None, 2, 5) == (None, None, False)
    positions = torch.arange(5)[None]
    layout, given, _ = derive(torch.ones(2, 5), positions, 2, 5)
    assert layout is None
    assert given is positions


def test_documents_are_numbered_within_the_row_and_padding_is_minus_one():
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0]])
    layout, *_ = derive(mask, torch.tensor([[0, 0, 0, 1, 0, 1, 0]]), 1, 7)
    assert layout.segment.tolist() == [[-1, -1, 0, 0, 1, 1, -1]]


def test_a_cached_document_goes_on_as_the_rows_first():
    layout, *_ = derive(None, torch.tensor([[7, 8, 0, 1, 2]]), 1, 5)
    assert layout.segment.tolist() == [[0, 0, 1, 1, 1]]
