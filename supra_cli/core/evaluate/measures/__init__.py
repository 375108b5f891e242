"""What a recurrent model loses: recall, loss by position, agreement with the teacher. One file, one measure.

Each is a function of a model in memory, `measures.get("repeats")(model, Material(tokenizer))`, which a training script
may call between two steps. All data are drawn from the bundled held-out text and the vocabulary: no network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from supra_cli.core.corpus import documents
from supra_cli.core.data.tokenizer import token_ids
from supra_cli.core.errors import NonFiniteError, UsageError
from supra_cli.core.registry import Registry

RESAMPLES = 1000


class Value(NamedTuple):
    """A figure and its 95 % interval, of a bootstrap over rows."""

    value: float
    low: float
    high: float
    n: int
    """Rows."""


@dataclass(frozen=True)
class Material:
    """What the measures ask about. Two models of one tokenizer are asked the same rows."""

    tokenizer: Any
    rows: int = 64
    """Rows a figure; of long rows fewer (`few`)."""
    train_length: int = 512
    """Tokens of a row in training: agreement is taken at it, positions up to 16 times it."""
    lengths: tuple[int, ...] = ()
    """Gaps of `repeats` and `recall_pairs`, and the longest row of `positions`, in place of their own."""
    longest: int | None = None
    """Tokens of the longest row that the base has positions for; None is no end."""
    batch_size: int = 8
    seed: int = 0

    @cached_property
    def words(self) -> Tensor:
        """The ordinary tokens of the vocabulary, in order."""
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        return torch.tensor(sorted(set(self.tokenizer.get_vocab().values()) - special))

    @cached_property
    def text(self) -> Tensor:
        """The held-out documents of the standard library, one after the other, [tokens]."""
        whole = "\n\n".join(text for _, text in documents("validation"))
        return torch.tensor(self.tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"])

    @cached_property
    def begin(self) -> Tensor:
        """What the tokenizer puts before a text, [0] or more."""
        return torch.tensor(token_ids(self.tokenizer, [""])[0], dtype=torch.int64)

    def generator(self, *name: int) -> torch.Generator:
        """Random numbers of the seed and of `name`, the same whatever was drawn before."""
        state = self.seed
        for part in name:
            state = state * 1_000_003 + part + 1
        return torch.Generator().manual_seed(state % 2**63)

    def distinct(self, rows: int, tokens: int, generator: torch.Generator) -> Tensor:
        """[rows, tokens] of random ordinary tokens, no two of a row the same."""
        if tokens > len(self.words):
            raise UsageError(f"{tokens} different tokens are asked for and the vocabulary has {len(self.words)}")
        order = [torch.randperm(len(self.words), generator=generator)[:tokens] for _ in range(rows)]
        return self.words[torch.stack(order)]

    def passages(self, rows: int, tokens: int, generator: torch.Generator) -> Tensor:
        """[rows, tokens] of text from random places; UsageError where there is not that much of it."""
        if tokens >= len(self.text):
            raise UsageError(f"rows of {tokens:,} tokens are asked for; the held-out text has {len(self.text):,}")
        start = torch.randint(len(self.text) - tokens, (rows, 1), generator=generator)
        return self.text[start + torch.arange(tokens)]

    def gaps(self, own: tuple[int, ...], around: int) -> tuple[int, ...]:
        """`lengths`, or a measure's own gaps, that leave room for `around` tokens in a row."""
        most = math.inf if self.longest is None else self.longest - around - len(self.begin)
        return tuple(gap for gap in self.lengths or own if gap <= most)

    def opened(self, *parts: Tensor) -> Tensor:
        """[rows, T] of `parts` after the begin token, if the tokenizer has one."""
        return torch.cat((self.begin.expand(len(parts[0]), -1), *parts), dim=1)

    def few(self, tokens: int) -> int:
        """Rows of so many tokens: at most `rows` and 65,536 tokens in all, at least 4."""
        return min(self.rows, max(4, 2**16 // tokens))

    def batch(self, tokens: int) -> int:
        """Rows a pass: of rows longer than 1,024 tokens as many fewer."""
        return max(1, self.batch_size * 1024 // max(1024, tokens))


Measure = Callable[..., dict[str, Value]]
"""(model, material, *, teacher=None) → {label: figure}. Only those in `NEED_TEACHER` heed the teacher."""

measures: Registry[Measure] = Registry("measure", package=__name__, group="supra.measures")
NEED_TEACHER = ("agreement",)
OF_ONE_LENGTH = ("agreement",)
"""Those that do not heed `Material.lengths`."""
OF_NO_TRAINING = ("recall_pairs", "repeats")
"""Those that do not heed `Material.train_length`; `positions` does not where it is given lengths."""


def ratio(above: Tensor, below: Tensor | None = None) -> Value:
    """Σ above / Σ below over rows [N], both resampled together; the mean of `above` where `below` is None.

    Source of the interval: the percentile bootstrap (Efron 1979), 1,000 resamples from a fixed seed. NonFiniteError
    where one of the three is no number.
    """
    above = above.double()
    below = torch.ones_like(above) if below is None else below.double()
    rows = len(above)
    draws = torch.randint(rows, (RESAMPLES, rows), generator=torch.Generator().manual_seed(0))
    again = above[draws].sum(1) / below[draws].sum(1)
    low, high = again.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    figure = Value(float(above.sum() / below.sum()), low, high, rows)
    if not all(map(math.isfinite, figure)):
        raise NonFiniteError.of("a figure of a measure is")
    return figure
