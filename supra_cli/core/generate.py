"""Text from a model: `prefill` reads the prompts in one pass, `decode` goes on by one token, in memory that stays.

Works on every model that `checkpoint.load` returns. Where softmax layers are left, their keys and values grow as ever.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from supra_cli.core.errors import UsageError
from supra_cli.core.swap import SOFTMAX

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.cache_utils import Cache


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
    num_beams: int = 1
    """Above 1: beam search by Hugging Face's `generate`."""
    seed: int = 0
    """Prompt number i (from 0) draws with seed + i."""
    stop: tuple[str, ...] = ()
    """A completion ends before the first of these strings."""

    def __post_init__(self) -> None:
        for name, value, fine, expected in (
            ("--max-new-tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            ("--temperature", self.temperature, 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("--top-k", self.top_k, self.top_k is None or self.top_k >= 1, "at least 1"),
            ("--top-p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("--num-beams", self.num_beams, self.num_beams >= 1, "at least 1"),
            ("--seed", self.seed, 0 <= self.seed < 2**63, "from 0 to 2^63 - 1"),
            ("--stop", "''", "" not in self.stop, "some text"),
        ):
            if not fine:
                raise UsageError(f"{name} is {value}, expected {expected}")
        if self.num_beams > 1 and self.temperature > 0:
            raise UsageError(f"--num-beams {self.num_beams} searches, it does not draw; leave out --temperature")


class Piece(NamedTuple):
    """Some more of one completion."""

    row: int
    text: str


@dataclass
class Stats:
    """What a generation took; complete once its stream has ended."""

    prompt_tokens: int = 0
    """Real tokens in all prompts."""
    prefill_seconds: float = 0.0
    new_tokens: int = 0
    """Tokens generated after the first of each completion, which is the prefill's."""
    decode_seconds: float = 0.0
    cache_bytes: int = 0
    """Recurrent state, keys and values at the end, of all rows."""
    finish: list[str] = field(default_factory=list)
    """Why each completion ended: eos, stop or length."""

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        return self.new_tokens / self.decode_seconds if self.decode_seconds else 0.0


@torch.no_grad()
def prefill(model: PreTrainedModel, input_ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Cache]:
    """Logits [B,vocab] after each prompt's last token, and the cache that `decode` goes on from.

    input_ids [B,T] and mask [B,T] (1 on real tokens, None if all are) are padded on the left.
    """
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp_(min=0)
    output = model(
        input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1
    )
    return output.logits[:, -1], output.past_key_values


@torch.no_grad()
def decode(
    model: PreTrainedModel, token: Tensor, position: Tensor, mask: Tensor | None, cache: Cache
) -> tuple[Tensor, Cache]:
    """Logits [B,vocab] after one more token [B] at position [B], and the cache; mask [B, past + 1] or None."""
    output = model(
        input_ids=token[:, None],
        attention_mask=mask,
        position_ids=position[:, None],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1], output.past_key_values


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    sampling: Sampling,
    stats: Stats | None = None,
) -> Iterator[Piece]:
    """The completions of `prompts`, piece by piece as they come, never half a character.

    A batch gives what each prompt alone would. `stats` is filled on the way. UsageError for a prompt without any token.
    """
    stats = stats if stats is not None else Stats()
    input_ids, mask = encode(tokenizer, prompts, model.device)
    stats.prompt_tokens = int(mask.sum()) if mask is not None else input_ids.numel()
    writers = [Writer(tokenizer, ids, sampling.stop) for ids in _unpadded(input_ids, mask)]
    tokens = _beams if sampling.num_beams > 1 else _tokens
    ends = eos_ids(model, tokenizer)
    stats.finish = ["length"] * len(prompts)
    for step in tokens(model, input_ids, mask, sampling, ends, stats, writers):
        for row, (writer, token) in enumerate(zip(writers, step, strict=True)):
            if writer.done:
                continue
            if token in ends:
                stats.finish[row] = "eos"
                text = writer.close()
            else:
                text = writer.add(token)
                if writer.done:
                    stats.finish[row] = "stop"
            if text:
                yield Piece(row, text)
    for row, writer in enumerate(writers):
        if text := writer.close():
            yield Piece(row, text)


def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], sampling: Sampling
) -> tuple[list[str], Stats]:
    """All completions at once, and what they took."""
    stats = Stats()
    texts = [""] * len(prompts)
    for piece in stream(model, tokenizer, prompts, sampling, stats):
        texts[piece.row] += piece.text
    return texts, stats


def encode(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], device: torch.device | str
) -> tuple[Tensor, Tensor | None]:
    """(input_ids [B,T], mask [B,T] or None without padding): the prompts, padded on the left.

    An empty prompt is the tokenizer's beginning of text, if it has one.
    """
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    rows = [row or ([start] if start is not None else []) for row in rows]
    if not rows or not all(rows):
        raise UsageError("the prompt is empty and the tokenizer has no beginning-of-text token; give some text")
    longest = max(map(len, rows))
    input_ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
    if all(len(row) == longest for row in rows):
        return input_ids, None
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return input_ids, mask


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a text: the tokenizer's together with the generation config's."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list | tuple) else [configured]
    return {int(token) for token in (*ids, tokenizer.eos_token_id) if token is not None}


def choose(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """The next token [B] from logits [B,vocab]: the first maximum, or a draw by each row's own generator."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    ordered, order = (logits.float() / sampling.temperature).sort(stable=True, dim=-1, descending=True)
    probability = ordered[:, : sampling.top_k].softmax(-1)
    upto = probability.cumsum(-1)
    if sampling.top_p is not None:
        probability = probability * ((upto - probability) < sampling.top_p)
        upto = probability.cumsum(-1)
    # One uniform number a row, drawn on the CPU, so that a seed means the same on every device.
    drawn = torch.stack([torch.rand((), generator=generator) for generator in generators])
    index = torch.searchsorted(upto, drawn.to(upto.device)[:, None] * upto[:, -1:], right=True)
    last = (probability > 0).sum(-1, keepdim=True) - 1
    return order.gather(-1, index.minimum(last))[:, 0]


class Writer:
    """One completion's text from its tokens: whole characters only, and nothing of a stop string."""

    # Tokens of the prompt that are decoded along, because some decoders drop the space at the start of a text.
    _CONTEXT = 8

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], stop: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._ids = list(prompt[-self._CONTEXT :])
        self._shown_from, self._shown_to = 0, len(self._ids)
        self._stop = tuple(stop)
        self._held = ""
        self.done = False

    def add(self, token: int) -> str:
        """The text that is certain after one more token: no half character, nothing that may become a stop."""
        self._ids.append(token)
        shown = self._text(self._ids[self._shown_from : self._shown_to])
        text = self._text(self._ids[self._shown_from :])
        if len(text) <= len(shown) or text.endswith("\ufffd"):
            return ""
        del self._ids[: self._shown_from]
        self._shown_from, self._shown_to = self._shown_to - self._shown_from, len(self._ids)
        return self._release(text[len(shown) :])

    def close(self) -> str:
        """What was held back, without an incomplete character; nothing comes after it."""
        if self.done:
            return ""
        shown = self._text(self._ids[self._shown_from : self._shown_to])
        rest = self._release(self._text(self._ids[self._shown_from :])[len(shown) :].rstrip("\ufffd"))
        held, self._held = ("" if self.done else self._held), ""
        self.done = True
        return rest + held

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _release(self, text: str) -> str:
        """`text` after what was held back, up to the first stop string or to what may become one."""
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self._held, self.done = "", True
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _tokens(
    model: PreTrainedModel,
    input_ids: Tensor,
    mask: Tensor | None,
    sampling: Sampling,
    ends: set[int],
    stats: Stats,
    writers: Sequence[Writer],
) -> Iterator[list[int]]:
    """One token for each row, step by step, until the writers of all rows are done or the length is reached."""
    generators = [torch.Generator().manual_seed(sampling.seed + row) for row in range(len(input_ids))]
    began = time.perf_counter()
    logits, cache = prefill(model, input_ids, mask)
    token = choose(logits, sampling, generators)
    chosen = token.tolist()
    stats.prefill_seconds = time.perf_counter() - began
    position = torch.full_like(token, input_ids.shape[1]) if mask is None else mask.sum(-1)
    if SOFTMAX not in model.supra.layers:
        mask = None  # a recurrent state holds no padding that would have to be masked
    for _ in range(sampling.max_new_tokens - 1):
        stats.cache_bytes = cache_bytes(cache)
        yield chosen
        alive = sum(not writer.done for writer in writers)
        if not alive:
            return
        began = time.perf_counter()
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones((len(mask), 1))], dim=-1)
        logits, cache = decode(model, token, position, mask, cache)
        position = position + 1
        token = choose(logits, sampling, generators)
        chosen = token.tolist()
        stats.decode_seconds += time.perf_counter() - began
        stats.new_tokens += alive
    stats.cache_bytes = cache_bytes(cache)
    yield chosen


def _beams(
    model: PreTrainedModel,
    input_ids: Tensor,
    mask: Tensor | None,
    sampling: Sampling,
    ends: set[int],
    stats: Stats,
    writers: Sequence[Writer],
) -> Iterator[list[int]]:
    """The best beam of each row in steps of one token a row, once the search has ended; its time is all decoding."""
    began = time.perf_counter()
    output = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids) if mask is None else mask,
        max_new_tokens=sampling.max_new_tokens,
        num_beams=sampling.num_beams,
        do_sample=False,
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0),
        return_dict_in_generate=True,
    )
    new = output.sequences[:, input_ids.shape[1] :]
    stats.decode_seconds = time.perf_counter() - began
    stats.new_tokens = new.numel()
    if output.past_key_values is not None:
        stats.cache_bytes = cache_bytes(output.past_key_values)
    yield from new.T.tolist()


def cache_bytes(cache: Cache) -> int:
    """Bytes of every tensor that the cache's layers hold: recurrent states, keys, values."""
    held = [value for layer in cache.layers for value in vars(layer).values()]
    tensors = [t for value in held for t in (value if isinstance(value, tuple) else (value,)) if isinstance(t, Tensor)]
    return sum(tensor.nbytes for tensor in tensors)


def _unpadded(input_ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    if mask is None:
        return input_ids.tolist()
    return [ids[keep.bool()].tolist() for ids, keep in zip(input_ids, mask, strict=True)]
