"""Losses over the vocabulary, in pieces of the sequence, so that the logits of a whole batch never exist at once.

With N scored tokens and a vocabulary of V, the plain form keeps [N, V] logits and their gradient; here each piece's
logits are recomputed in the backward pass, and the peak is one piece of at most `PIECE_NUMBERS` numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from supra_cli.core.data.packing import IGNORED
from supra_cli.core.mixers.parts import wide

PIECE_NUMBERS = 1 << 25

Head = Callable[[Tensor], Tensor]


def cross_entropy(
    hidden: Tensor, head: Head, labels: Tensor, vocabulary: int, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(Σ_t −log p(label_t) + z·(log Z_t)², Σ_t −log p(label_t) detached), over the labelled positions.

    hidden [B,T,D], labels [B,T], `vocabulary` logits a token; log Z_t is the logsumexp of the logits at t. Arithmetic
    in fp32 or finer.
    """

    def piece(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = wide(head(hidden))
        nll = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        if not z_loss:
            return nll, nll.detach()
        log_z = torch.logsumexp(logits, dim=-1).masked_fill(labels == IGNORED, 0)
        return nll + z_loss * log_z.square().sum(), nll.detach()

    return _summed(piece, vocabulary, hidden, labels)


def divergence(
    hidden: Tensor, head: Head, target: Tensor, target_head: Head, labels: Tensor, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """(Σ_t KL(p_teacher,t ‖ p_student,t) over the whole vocabulary, Σ_t −log p_student(label_t) detached).

    hidden and target [B,T,·] are the last hidden states of student and teacher. Only labelled positions count.
    Arithmetic in fp32 or finer.
    """

    def piece(hidden: Tensor, target: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        log_p = F.log_softmax(wide(head(hidden)), dim=-1)
        with torch.no_grad():
            log_q = F.log_softmax(wide(target_head(target)), dim=-1)
        each = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
        nll = F.nll_loss(log_p.detach(), labels, ignore_index=IGNORED, reduction="sum")
        return each.masked_fill(labels == IGNORED, 0).sum(), nll

    return _summed(piece, vocabulary, hidden, target, labels)


def _summed(piece: Callable[..., tuple[Tensor, Tensor]], vocabulary: int, *batch: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of `piece` over the positions of [B,T,...] tensors, a limited number at a time."""
    flat = [tensor.flatten(0, 1) for tensor in batch]
    at_once = max(1, PIECE_NUMBERS // vocabulary)
    if len(flat[0]) <= at_once:
        return piece(*flat)
    recompute = torch.is_grad_enabled()
    sums = [
        checkpoint(piece, *some, use_reentrant=False) if recompute else piece(*some)
        for some in zip(*(tensor.split(at_once) for tensor in flat), strict=True)
    ]
    return torch.stack([first for first, _ in sums]).sum(), torch.stack([second for _, second in sums]).sum()
