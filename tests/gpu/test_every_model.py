"""Every base with the project's mixer, and every mixer on one base, on a GPU as on a CPU: logits, gradients, steps."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import tiny_model, tokens
from torch import Tensor, nn

from supra_cli.core.archs import archs
from supra_cli.core.mixers import mixers

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LENGTH = 70
"""More than a chunk."""
MODELS = [(base, "supra") for base in archs] + [("llama", mixer) for mixer in mixers if mixer != "supra"]


@pytest.fixture(params=MODELS, ids="-".join)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """One student with a kept layer, in fp32, on the CPU and on the GPU."""
    torch.manual_seed(0)
    base, mixer = request.param
    model = tiny_model(base, mixer, "1")
    return model, copy.deepcopy(model).cuda()


def loss(model: nn.Module, ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
    logits = model(ids, position_ids=position_ids, use_cache=False).logits.float()
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}


def packed() -> tuple[Tensor, Tensor]:
    """Rows of two documents, and their positions."""
    position = torch.cat([torch.arange(30), torch.arange(LENGTH - 30)])
    return tokens(2, LENGTH), position.expand(2, -1).contiguous()


@torch.no_grad()
def test_padded_logits_are_those_of_a_cpu(pair):
    ours, theirs = pair
    ids, mask = tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :9] = 0
    wanted = ours(ids, attention_mask=mask).logits[mask.bool()]
    found = theirs(ids.cuda(), attention_mask=mask.cuda()).logits.cpu()[mask.bool()]
    assert (found - wanted).abs().max() < 1e-3 * wanted.abs().max()


def test_gradients_of_packed_rows_are_those_of_a_cpu(pair):
    ours, theirs = pair
    ids, position = packed()
    losses = loss(ours, ids, position), loss(theirs, ids.cuda(), position.cuda())
    for one in losses:
        one.backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-4)
    wanted, found = gradients(ours), gradients(theirs)
    assert wanted.keys() == found.keys()
    whole = torch.cat([x.flatten() for x in wanted.values()])
    off = torch.cat([(found[name] - x).flatten() for name, x in wanted.items()])
    assert off.norm() < 1e-3 * whole.norm()


def test_a_bf16_pass_over_fp32_weights_follows_fp32(pair):
    """As `supra uptrain` computes on a GPU: experts and heads under autocast too."""
    _, model = pair
    ids, position = (part.cuda() for part in packed())
    wanted = loss(model, ids, position)
    with torch.autocast("cuda", torch.bfloat16):
        found = loss(model, ids, position)
    found.backward()
    assert found.item() == pytest.approx(wanted.item(), rel=3e-2)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def test_text_in_bf16_weights_is_read_in_pieces_as_whole(pair):
    """Prefill in one call against token by token through the decode kernel."""
    model = pair[1].bfloat16()
    ids = tokens(2, 20).cuda()
    whole, cache, pieces = model(ids).logits.float(), None, []
    for piece in ids.split((9, 1, 1, 9), dim=1):
        output = model(piece, use_cache=True, **({} if cache is None else {"past_key_values": cache}))
        cache = output.past_key_values
        pieces.append(output.logits.float())
    off = (torch.cat(pieces, dim=1) - whole).norm() / whole.norm()
    assert off < 5e-2
