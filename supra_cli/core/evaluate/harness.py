"""lm-eval's wrapper around a live model, which counts what it has answered and takes no answer that is none."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from supra_cli.core.data.tokenizer import check_ids
from supra_cli.core.errors import NonFiniteError, SupraError


class Model(HFLM):
    """A model and its tokenizer as lm-eval asks them. `begin` says which task comes next."""

    def __init__(self, model, tokenizer, *, batch_size: int, max_length: int):
        super().__init__(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, max_length=max_length
        )
        self.cache_hook = self  # lm-eval hands every answer to a cache, which it may not have; here they are counted
        self.begin("", lambda done, total: None)

    def begin(self, task: str, progress: Callable[[int, int], None]) -> None:
        """`progress(done, total)` is called with requests, or windows of a long text, answered so far."""
        self.task = task
        self.progress = progress
        self.is_computing = False
        self.cut: set[str] = set()
        """Prompts whose beginning did not fit into the context."""

    def loglikelihood(self, requests: list, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self._expect(len(requests))
        return super().loglikelihood(requests, disable_tqdm=True)

    def generate_until(self, requests: list, disable_tqdm: bool = True) -> list[str]:
        self._expect(len(requests))
        return super().generate_until(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = True) -> list[float]:
        lengths = [len(self.tok_encode(request.args[0])) for request in requests]
        if 0 in lengths:
            raise SupraError(f"task '{self.task}': document {lengths.index(0)} has no token to score")
        self._expect(sum(-(-length // self.max_length) for length in lengths))
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list, disable_tqdm: bool = True, override_bs: int | None = None) -> list:
        for texts, context, answer in requests:
            if not 0 < len(answer) <= self.max_length:
                raise SupraError(
                    f"task '{self.task}': an answer of {len(answer)} tokens cannot be scored in {self.max_length} "
                    "tokens of context; " + ("give a larger --max-length" if answer else "every choice needs a text")
                )
            if texts is not None and len(context) + len(answer) > self.max_length + 1:
                self.cut.add(texts[0])
        self._check_ids([[*context, *answer] for _, context, answer in requests])
        answers = super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
        if not all(math.isfinite(likelihood) for likelihood, _ in answers):
            raise self._not_finite("the likelihood of an answer is")
        if requests[0][0] is None:  # windows, of which lm-eval tells no cache
            self._answered(len(requests))
        return answers

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Any, Any]:
        """Each text by itself. lm-eval looks at the first of a batch alone and then gives all of them a begin token or
        none: a text that brings its own got a second, or its neighbours went without.
        """
        rows = [self.tok_encode(string) or [self.prefix_token_id] for string in strings]
        kept = [row[-left_truncate_len:] if left_truncate_len else row for row in rows]
        self.cut |= {text for text, short, row in zip(strings, kept, rows, strict=True) if len(short) < len(row)}
        self._check_ids(kept)
        # With token 0: a padding token that was added to a tokenizer often has no embedding.
        longest = max(map(len, kept))
        fill = [[0] * (longest - len(row)) for row in kept]
        pairs = list(zip(fill, kept, strict=True))
        ids = [blank + row if padding_side == "left" else row + blank for blank, row in pairs]
        ones = [[1] * len(row) for row in kept]
        mask = [a + b if padding_side == "left" else b + a for a, b in zip(fill, ones, strict=True)]
        return torch.tensor(ids), torch.tensor(mask)

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        """What a cache would be told; a long text's windows were counted one by one."""
        if kind != "loglikelihood_rolling":
            self._answered(1)

    def _model_call(self, *args: Any, **options: Any):
        with self._computing():
            return super()._model_call(*args, **options)

    def _model_generate(self, *args: Any, **options: Any):
        """With a look at what follows the prompts: of logits that are no numbers `generate` would make a text."""

        def look(module: Any, inputs: Any, output: Any) -> None:
            hook.remove()
            if not output.logits[:, -1].isfinite().all():
                raise self._not_finite("logits are")

        with self.model.register_forward_hook(look) as hook, self._computing():
            return super()._model_generate(*args, **options)

    def _not_finite(self, what: str) -> NonFiniteError:
        return NonFiniteError.of(f"task '{self.task}': {what}")

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """`is_computing` stays true when the forward pass raises: that is no fault of the task, as it is when
        `generate` refuses the task's generation_kwargs.
        """
        hooks = (
            self.model.register_forward_pre_hook(lambda *_: setattr(self, "is_computing", True)),
            self.model.register_forward_hook(lambda *_: setattr(self, "is_computing", False)),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _check_ids(self, rows: list[list[int]]) -> None:
        check_ids((max(row, default=0) for row in rows), self.tokenizer, self.model.config)

    def _expect(self, total: int) -> None:
        self._done, self._total = 0, total
        self.progress(0, total)

    def _answered(self, count: int) -> None:
        self._done += count
        self.progress(self._done, self._total)
