"""Next-token training: what SUPRA uptrains with, and what a model from scratch is trained with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from supra_cli.core.data.packing import Batch
from supra_cli.core.errors import UsageError
from supra_cli.core.stages import chunked, stages
from supra_cli.core.stages.base import Backward, Loss, Stage


@stages.register("finetune")
class Finetune(Stage):
    """Σ_t −log p(x_{t+1} | x_{≤t}) + z_loss · (log Z_t)².  Source: SUPRA, arXiv:2405.06640 (z_loss 1e-4)."""

    @dataclass(frozen=True)
    class Options:
        z_loss: float = 0.0
        """Weight of (log Z_t)², which keeps the sum of a token's exponentiated logits near 1; the paper's is 1e-4."""

        def __post_init__(self) -> None:
            if not 0 <= self.z_loss <= 1:
                raise UsageError(f"z_loss is {self.z_loss}, expected a number from 0 to 1")

    def loss(self, student: nn.Module, teacher: nn.Module | None, batch: Batch, backward: Backward) -> Loss:
        vocabulary, z_loss = student.config.vocab_size, self.options.z_loss
        total, nll = student(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            objective=lambda hidden, head: chunked.cross_entropy(hidden, head, batch.labels, vocabulary, z_loss),
        )
        return Loss(backward(total), {"nll": nll})
