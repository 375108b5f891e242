"""How a student's next-token distribution differs from its teacher's, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from supra_cli.core.evaluate.measures import Material, Value, measures, ratio
from supra_cli.core.evaluate.nats import LOGITS_AT_ONCE, judging, with_head


@measures.register("agreement")
def agreement(model, material: Material, *, teacher) -> dict[str, Value]:
    """KL(teacher‖student) = Σ_w p_t(w) (ln p_t(w) − ln p_s(w)) in nats, and the share of tokens at which both find the
    same token the likeliest; means over rows of held-out text as long as those of training. Both models are in memory.
    """
    length = min(material.train_length, material.longest or material.train_length, len(material.text) // 2)
    tokens = material.opened(material.passages(material.few(length), length, material.generator(length)))[:, :length]
    divergence, same = [], []
    with judging(model, teacher):
        for batch in tokens.split(material.batch(length)):
            kl, top = _compare(model, teacher, batch)
            divergence.append(kl.double().mean(1))
            same.append(top.double().mean(1))
    return {"kl": ratio(torch.cat(divergence)), "top-1": ratio(torch.cat(same))}


def _compare(model, teacher, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(KL, whether the likeliest token is the same), each [B,T] on the CPU; logits live a piece of T at a time."""
    step = max(1, LOGITS_AT_ONCE // (len(tokens) * model.config.vocab_size))

    def both(hidden: Tensor, head) -> tuple[Tensor, Tensor]:
        def taught(wanted: Tensor, its_head) -> tuple[Tensor, Tensor]:
            parts = [
                _piece(head(ours), its_head(theirs))
                for ours, theirs in zip(hidden.split(step, dim=1), wanted.split(step, dim=1), strict=True)
            ]
            return tuple(torch.cat(part, dim=1).cpu() for part in zip(*parts, strict=True))

        return with_head(teacher, tokens.to(teacher.device), taught)

    return with_head(model, tokens.to(model.device), both)


def _piece(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    ours, theirs = student.float().log_softmax(-1), teacher.float().log_softmax(-1).to(student.device)
    return (theirs.exp() * (theirs - ours)).sum(-1), ours.argmax(-1) == theirs.argmax(-1)
