"""Logit distillation: the student's next-token distribution is drawn to the teacher's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from supra_cli.core.data.packing import Batch
from supra_cli.core.stages import chunked, stages
from supra_cli.core.stages.base import Backward, Loss, Stage
from supra_cli.core.stages.chunked import Head


@stages.register("distill")
class Distill(Stage):
    """Σ_t KL(p_teacher(· | x_{≤t}) ‖ p_student(· | x_{≤t})) over the full vocabulary, temperature 1.

    The teacher sees the same document boundaries. Source: as in RADLADS, arXiv:2505.03005, step 2.
    """

    teacher = "separate"

    def loss(self, student: nn.Module, teacher: nn.Module | None, batch: Batch, backward: Backward) -> Loss:
        vocabulary, labels = student.config.vocab_size, batch.labels
        inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}

        @torch.enable_grad()
        def learn(target: Tensor, target_head: Head) -> tuple[Tensor, Tensor]:
            # Within the teacher's own forward: where it is shared out among ranks, its head is whole only here.
            return student(
                **inputs,
                objective=lambda hidden, head: chunked.divergence(
                    hidden, head, target, target_head, labels, vocabulary
                ),
            )

        with torch.no_grad():
            total, nll = teacher(**inputs, objective=learn)
        return Loss(backward(total), {"nll": nll})
