"""The stream of text that prefill and decoding make."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
import torch
from torch import Tensor
from transformers import GenerationConfig

from supra_cli.core import cache as caches
from supra_cli.core.checkpoint.describing import theirs
from supra_cli.core.data.tokenizer import check_chat_template, check_ids, token_ids
from supra_cli.core.errors import NonFiniteError, SupraError, UsageError, first_line
from supra_cli.core.generate.sampling import Sampling, choose
from supra_cli.core.generate.steps import PIECE, cache_bytes, compiled, decode, grown, prefill
from supra_cli.core.generate.writer import Writer
from supra_cli.core.recipe.keep import SOFTMAX

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


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
    compile_seconds: float = 0.0
    """Before the first decoded token, if the step was compiled."""
    new_tokens: int = 0
    """Tokens of all completions, the ones that ended a text included."""
    decode_seconds: float = 0.0
    """In a beam search, where neither can be told from the other, prefill and decoding together."""
    cache_bytes: int = 0
    """Recurrent state, keys and values at the end, of all rows."""
    finish: list[str] = field(default_factory=list)
    """Why each completion ended: eos, stop or length."""

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decoded_tokens(self) -> int:
        """New tokens but for the first of each completion, which the prefill chose unless it was a beam search."""
        return self.new_tokens - (len(self.finish) if self.prefill_seconds else 0)

    @property
    def decode_tokens_per_second(self) -> float:
        return self.decoded_tokens / self.decode_seconds if self.decode_seconds else 0.0


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    sampling: Sampling,
    stats: Stats | None = None,
    *,
    compile: bool = False,
) -> Iterator[Piece]:
    """The completions of `prompts`, piece by piece as they come, never half a character.

    A batch gives what each prompt alone would. `stats` is filled on the way. With `compile` the decode step is compiled
    first, which a beam search takes none of. UsageError for a prompt without any token, for more tokens than the model
    has positions, and for prompts whose positions would depend on each other's length; SupraError for a token that the
    model does not have; NonFiniteError for logits that are no numbers.
    """
    stats = stats if stats is not None else Stats()
    input_ids, mask = encode(tokenizer, prompts, model.device)
    check_ids([int(input_ids.max())], tokenizer, model.config)  # an embedding would read past its end, on CUDA unseen
    limit, longest = model.config.limit(), input_ids.shape[1] + sampling.max_new_tokens
    if limit is not None and longest > limit:
        raise UsageError(
            f"a prompt of {input_ids.shape[1]} tokens and {sampling.max_new_tokens} new ones are more than the {limit} "
            "positions that the model has; shorten one of them"
        )
    switch = model.config.switch()
    if switch is not None and mask is not None and longest > switch:
        raise UsageError(
            f"the model's positions are others in texts of more than {switch} tokens, so that prompts of different "
            "lengths would change each other; give them one at a time"
        )
    stats.prompt_tokens = int(mask.sum()) if mask is not None else input_ids.numel()
    if input_ids.shape[1] > 8 * PIECE:
        log.info(f"reading {stats.prompt_tokens:,} prompt tokens")
    writers = [Writer(tokenizer, ids, sampling.stop) for ids in _endings(input_ids, mask)]
    ends = eos_ids(model, tokenizer)
    stats.finish = ["length"] * len(prompts)
    if sampling.num_beams > 1:
        steps = _beams(model, input_ids, mask, sampling, stats, ends)
    else:
        steps = _tokens(model, input_ids, mask, sampling, stats, writers, compile)
    for step in steps:
        for row, (writer, token) in enumerate(zip(writers, step, strict=True)):
            if writer.done:
                continue
            stats.new_tokens += 1
            text = writer.end(token) if token in ends else writer.add(token)
            if writer.done:
                stats.finish[row] = "stop" if writer.stopped else "eos"
            if text:
                yield Piece(row, text)
    for row, writer in enumerate(writers):
        if writer.done:
            continue
        text = writer.close()
        if writer.stopped:
            stats.finish[row] = "stop"
        if text:
            yield Piece(row, text)


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    compile: bool = False,
) -> tuple[list[str], Stats]:
    """All completions at once, and what they took."""
    stats = Stats()
    texts = [""] * len(prompts)
    for piece in stream(model, tokenizer, prompts, sampling, stats, compile=compile):
        texts[piece.row] += piece.text
    return texts, stats


def as_chat(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """Each prompt as the one thing that a user says, up to where the model's answer begins. UsageError for a tokenizer
    without a chat template, SupraError for one whose template fails.
    """
    check_chat_template(tokenizer)
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    try:
        return tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        if not (isinstance(error, jinja2.TemplateError) or theirs(error)):
            raise
        raise SupraError(
            f"the chat template of {tokenizer.name_or_path} fails ({first_line(error)}); restore its file"
        ) from error


def encode(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], device: torch.device | str
) -> tuple[Tensor, Tensor | None]:
    """(input_ids [B,T], mask [B,T] or None without padding): the prompts, padded on the left.

    An empty prompt is the tokenizer's beginning of text, if it has one. No prompt is closed by an end of text, whatever
    the tokenizer would put there.
    """
    rows = token_ids(tokenizer, prompts)
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


def unused_settings(model: PreTrainedModel, sampling: Sampling) -> dict[str, Any]:
    """What the model's generation config says of the choice of tokens and `sampling` does not do.

    The tokens that end a text are used, see `eos_ids`; how long it may grow is asked of the user alone.
    """
    own = model.generation_config.to_diff_dict()
    without_effect = GenerationConfig._get_default_generation_params() | {"top_k": 0}  # the default, 50, has one
    used = asdict(sampling) | {"do_sample": sampling.temperature > 0}
    return {
        name: value
        for name, value in own.items()
        if not name.startswith("_")
        and not name.endswith("token_id")
        and name not in ("transformers_version", "use_cache", "max_length")
        and value not in (without_effect.get(name, False), None, "", [], {})
        and used.get(name) != value
    }


def _tokens(
    model: PreTrainedModel,
    input_ids: Tensor,
    mask: Tensor | None,
    sampling: Sampling,
    stats: Stats,
    writers: Sequence[Writer],
    compile: bool,
) -> Iterator[list[int]]:
    """One token for each row, step by step, until the writers of all rows are done or the length is reached."""
    generators = [torch.Generator().manual_seed(sampling.seed + row) for row in range(len(input_ids))]
    began = time.perf_counter()
    logits, cache = prefill(model, input_ids, mask)
    text, switch = input_ids, model.config.switch()
    seen = _seen(input_ids, mask, logits.shape[-1]) if sampling.repetition_penalty != 1 else None
    token = choose(logits, sampling, generators, seen)
    chosen = _on_host(token)
    stats.prefill_seconds = time.perf_counter() - began
    position = torch.full_like(token, input_ids.shape[1]) if mask is None else mask.sum(-1)
    if SOFTMAX not in model.supra.layers:
        mask = None  # a recurrent state holds no padding that would have to be masked
    step = None if compile else decode
    for _ in range(sampling.max_new_tokens - 1):
        stats.cache_bytes = cache_bytes(cache)
        yield chosen
        if all(writer.done for writer in writers):
            return
        if step is None:
            began = time.perf_counter()
            step = compiled(model, token, position, mask, cache)
            stats.compile_seconds = time.perf_counter() - began
        began = time.perf_counter()
        mask = grown(mask)
        ahead = switch is not None and text.shape[1] <= switch
        if ahead:
            text = torch.cat([text, token[:, None]], dim=1)
        if ahead and text.shape[1] > switch:
            # What was read has other positions from here on, so it is read again; no row is padded, see `stream`.
            logits, cache = prefill(model, text, None)
        else:
            logits, cache = step(model, token, position, mask, cache)
        position = position + 1
        token = choose(logits, sampling, generators, seen)
        chosen = _on_host(token)
        stats.decode_seconds += time.perf_counter() - began
    stats.cache_bytes = cache_bytes(cache)
    yield chosen


def _on_host(token: Tensor) -> list[int]:
    """What `choose` chose, which says in the same numbers where there was nothing to choose from."""
    chosen = token.tolist()
    if -1 in chosen:
        raise NonFiniteError.of("the model's logits are")
    return chosen


def _beams(
    model: PreTrainedModel,
    input_ids: Tensor,
    mask: Tensor | None,
    sampling: Sampling,
    stats: Stats,
    ends: set[int],
) -> Iterator[list[int]]:
    """The best beam of each row in steps of one token a row, once the search has ended."""
    began = time.perf_counter()
    settings = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        num_beams=sampling.num_beams,
        do_sample=False,
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0),
        return_dict_in_generate=True,
        prefill_chunk_size=PIECE if PIECE < input_ids.shape[1] <= (model.config.switch() or math.inf) else None,
    )
    # transformers fills what a call leaves open from the model's own settings, which no other route here follows.
    own, model.generation_config = model.generation_config, settings
    finite: list[Tensor] = []
    look = model.register_forward_hook(lambda _, __, output: finite.append(output.logits[:, -1].isfinite().all()))
    try:
        output = model.generate(
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids) if mask is None else mask
        )
    finally:
        look.remove()
        model.generation_config = own
    if not torch.stack(finite).all():
        raise NonFiniteError.of("the model's logits are")
    new = output.sequences[:, input_ids.shape[1] :]
    stats.decode_seconds = time.perf_counter() - began
    if (cache := caches.of(output)) is not None:
        stats.cache_bytes = cache_bytes(cache)
    yield from new.T.tolist()


def _seen(input_ids: Tensor, mask: Tensor | None, vocabulary: int) -> Tensor:
    """[B,vocab] bool: the tokens of each prompt, without its padding."""
    seen = torch.zeros((len(input_ids), vocabulary), dtype=torch.bool, device=input_ids.device)
    for row, ids in enumerate(input_ids):
        seen[row, ids if mask is None else ids[mask[row].bool()]] = True
    return seen


def _endings(input_ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    """The last tokens of each prompt, for its Writer."""
    ids = input_ids[:, -32:]
    if mask is None:
        return ids.tolist()
    return [row[real].tolist() for row, real in zip(ids, mask[:, -32:].bool(), strict=True)]
