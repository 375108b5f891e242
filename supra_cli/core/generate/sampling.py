"""How the next token is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from supra_cli.core.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen and when to stop."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    """0 takes the most probable token."""
    top_k: int | None = None
    """Draw from this many most probable tokens only."""
    top_p: float | None = None
    """Draw from the fewest most probable tokens whose probabilities reach this sum."""
    repetition_penalty: float = 1.0
    """Above 1 it takes from the logits of tokens that stand in the prompt or the completion; see `discourage`."""
    num_beams: int = 1
    """Above 1: beam search by Hugging Face's `generate`."""
    seed: int = 0
    """Prompt number i (from 0) draws with seed + i."""
    stop: tuple[str, ...] = ()
    """A completion ends before the first of these strings; special tokens, never shown, count with their own text."""

    def __post_init__(self) -> None:
        for name, value, fine, expected in (
            ("--max-new-tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            ("--temperature", self.temperature, _is_temperature(self.temperature), "0 (greedy) or 1e-6 and more"),
            ("--top-k", self.top_k, self.top_k is None or self.top_k >= 1, "at least 1"),
            ("--top-p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("--repetition-penalty", self.repetition_penalty, 0 < self.repetition_penalty < float("inf"), "above 0"),
            ("--num-beams", self.num_beams, self.num_beams >= 1, "at least 1"),
            ("--seed", self.seed, 0 <= self.seed < 2**63, "from 0 to 2^63 - 1"),
            ("--stop", "''", "" not in self.stop, "some text"),
        ):
            if not fine:
                raise UsageError(f"{name} is {value}, expected {expected}")
        if self.num_beams > 1 and self.temperature > 0:
            raise UsageError(f"--num-beams {self.num_beams} searches, it does not draw; leave out --temperature")
        if self.num_beams > 1 and self.repetition_penalty != 1:
            raise UsageError("--repetition-penalty is for one token after another; leave it or --num-beams out")


def _is_temperature(value: float) -> bool:
    """Below 1e-6 the quotient of logits and temperature leaves the range of fp32."""
    return value == 0 or 1e-6 <= value < float("inf")


def choose(
    logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator], seen: Tensor | None = None
) -> Tensor:
    """The next token [B] from logits [B,vocab]: the first maximum, or a draw by each row's own generator. A row whose
    logits are not finite has −1, so that the device need not be asked for that besides.

    seen [B,vocab], the tokens that `sampling` discourages, is then marked with those chosen.
    """
    finite = logits.isfinite().all(-1)
    if seen is not None:
        logits = discourage(logits, seen, sampling.repetition_penalty)
    token = logits.argmax(-1) if sampling.temperature == 0 else _draw(logits, sampling, generators)
    if seen is not None:
        seen.scatter_(1, token[:, None], True)
    return token.where(finite, -1)


def _draw(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    ordered, order = (logits.float() / sampling.temperature).sort(stable=True, dim=-1, descending=True)
    probability = ordered[:, : sampling.top_k].softmax(-1)
    upto = probability.cumsum(-1)
    if sampling.top_p is not None:
        probability = probability * ((upto - probability) < sampling.top_p)
        upto = probability.cumsum(-1)
    # One uniform number a row, drawn on the CPU, so that a seed means the same on every device.
    drawn = torch.stack([torch.rand((), generator=generator) for generator in generators])
    index = torch.searchsorted(upto, drawn.to(upto.device)[:, None] * upto[:, -1:], right=True)
    last = (probability > 0).sum(-1, keepdim=True).clamp(min=1) - 1
    return order.gather(-1, index.minimum(last))[:, 0]


def discourage(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """logits [B,vocab], where seen [B,vocab] divided by `penalty` if positive and multiplied by it if negative.

    Keskar et al. 2019, arXiv:1909.05858; as transformers' `repetition_penalty`.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
