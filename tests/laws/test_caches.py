"""The law of caches: whichever cache carries a text on, beside whichever kept layers, the model goes on as if it had
read the whole text at every token.

The full product is taken on one mixer and one base; over the other mixers, bases and sliding windows a seeded draw in
which every pair of values meets.
"""

from __future__ import annotations

import random
from contextlib import contextmanager, nullcontext
from itertools import combinations, product
from typing import Any, NamedTuple

import pytest
import torch
from tiny import tiny_model, tokens
from torch import Tensor
from torch.testing import assert_close
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, StaticCache

from supra_cli.core import cache as caches
from supra_cli.core.archs import archs
from supra_cli.core.cache import RecurrentLayer
from supra_cli.core.mixers import mixers
from supra_cli.core.recipe.keep import SOFTMAX

KEEPS = ("none", "first:1", "last:1", "every:2", "all")
CACHES = ("dynamic", "static", "offloaded", "own dynamic", "own static")
PADDING = (False, True)
NEW, PROMPT, LENGTH = 6, 9, 5

# Bases whose softmax layers see a part of the past; which layers do is up to the base.
WINDOWS = {
    "mistral, window": ("mistral", {"sliding_window": 4}),
    "qwen2, some windows": ("qwen2", {"sliding_window": 4, "layer_types": None, "max_window_layers": 2}),
}
BASES = {**{base: (base, {}) for base in archs}, **WINDOWS}


def pairwise(*ranges: tuple, seed: int = 0) -> list[tuple]:
    """Cases in which every pair of values of two ranges meets at least once: of random cases the one that adds most."""
    draw = random.Random(seed)
    places = list(combinations(range(len(ranges)), 2))
    missing = {(i, j, a, b) for i, j in places for a in ranges[i] for b in ranges[j]}
    cases = []
    while missing:
        i, j, a, b = min(missing, key=repr)
        tries = [[draw.choice(values) for values in ranges] for _ in range(50)]
        for case in tries:
            case[i], case[j] = a, b
        best = max(tries, key=lambda case: len(missing & met(case, places)))
        missing -= met(best, places)
        cases.append(tuple(best))
    return cases


def met(case: list, places: list[tuple[int, int]]) -> set[tuple]:
    return {(i, j, case[i], case[j]) for i, j in places}


class Case(NamedTuple):
    base: str
    mixer: str
    keep: str
    cache: str
    padded: bool

    def __str__(self) -> str:
        return "-".join([*self[:4], "padded" if self.padded else "even"])


RANGES = (tuple(BASES), tuple(mixer for mixer in mixers if mixer != SOFTMAX), KEEPS, CACHES, PADDING)
FULL = [Case(*case) for case in product(["llama"], ["supra"], KEEPS, CACHES, PADDING)]
OTHERS = [Case(*case) for case in pairwise(*RANGES)]
CASES = FULL + [case for case in OTHERS if case not in FULL]


class Stream:
    """Stands for a CUDA stream on a CPU."""

    def wait_stream(self, other: Stream) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


@contextmanager
def offloading_without_a_gpu():
    """Every offloaded layer is out of reach, NaN, until it is prefetched, as on a GPU one in CPU memory is."""
    patch = pytest.MonkeyPatch()

    def offload(layer: Any) -> None:
        layer.away = layer.keys, layer.values
        layer.keys, layer.values = (torch.full_like(tensor, torch.nan) for tensor in layer.away)

    def prefetch(layer: Any) -> None:
        if getattr(layer, "away", None) is not None:
            (layer.keys, layer.values), layer.away = layer.away, None

    def reorder_cache(layer: Any, beams: Tensor) -> None:
        if getattr(layer, "away", None) is not None:  # keys in CPU memory are reordered there
            layer.away = tuple(tensor.index_select(0, beams) for tensor in layer.away)
        else:
            reorder(layer, beams)

    reorder = DynamicLayer.reorder_cache
    for kind in (DynamicLayer, DynamicSlidingWindowLayer):
        patch.setattr(kind, "reorder_cache", reorder_cache)
        patch.setattr(kind, "offload", offload)
        patch.setattr(kind, "prefetch", prefetch)
    patch.setattr(torch, "Stream", Stream)
    patch.setattr(torch.cuda, "default_stream", lambda device: Stream())
    try:
        yield
    finally:
        patch.undo()


def prompts(padded: bool) -> tuple[Tensor, Tensor]:
    """Two prompts; padded, the first is shorter and padded on the left."""
    ids, mask = tokens(2, PROMPT), torch.ones(2, PROMPT, dtype=torch.long)
    if padded:
        ids[0, : PROMPT - LENGTH] = 0
        mask[0, : PROMPT - LENGTH] = 0
    return ids, mask


def loop(model, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(the text, the logits of every new token): the whole text read again for each token, its likeliest one taken."""
    logits = []
    for _ in range(NEW):
        logits.append(model(ids, attention_mask=mask, use_cache=False).logits[:, -1])
        ids = torch.cat((ids, logits[-1].argmax(-1, keepdim=True)), dim=1)
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
    return ids, torch.stack(logits)


def own(model, kind: str) -> Cache:
    if kind == "own dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=32)


def greedy(model, ids: Tensor, mask: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    call = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True, "output_logits": True}
    if kind not in ("own dynamic", "own static"):
        implementation = {} if kind == "dynamic" else {"cache_implementation": kind}
        output = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, **implementation, **call)
        return output.sequences, torch.stack(output.logits)
    call[model.arch.stack(model).cache_keyword] = own(model, kind)
    logits: tuple[Tensor, ...] = ()
    for new in (2, NEW - 2):
        output = model.generate(ids, attention_mask=mask, max_new_tokens=new, **call)
        ids, logits = output.sequences, logits + output.logits
        mask = torch.cat((mask, torch.ones((2, new), dtype=torch.long)), dim=1)
    return ids, torch.stack(logits)


def model_of(base: str, mixer: str, keep: str):
    torch.manual_seed(0)
    kind, shape = BASES[base]
    return tiny_model(kind, mixer, keep, num_hidden_layers=4, **shape)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_cached_text_is_the_text_read_anew_at_every_token(case):
    model, (ids, mask) = model_of(*case[:3]), prompts(case.padded)
    text, logits = loop(model, ids, mask)
    with offloading_without_a_gpu() if case.cache == "offloaded" else nullcontext():
        cached, of_cached = greedy(model, ids, mask, case.cache)
    # Two orders of the same fp32 sums.
    assert_close(of_cached, logits, atol=1e-4, rtol=1e-3)
    assert torch.equal(cached, text)


@torch.no_grad()
@pytest.mark.parametrize("case", [case for case in CASES if not case.cache.startswith("own")], ids=str)
def test_beams_find_what_they_find_without_a_cache(case):
    model, (ids, mask) = model_of(*case[:3]), prompts(case.padded)
    search = {"num_beams": 3, "max_new_tokens": NEW, "eos_token_id": None, "do_sample": False, "attention_mask": mask}
    implementation = {} if case.cache == "dynamic" else {"cache_implementation": case.cache}
    with offloading_without_a_gpu() if case.cache == "offloaded" else nullcontext():
        found = model.generate(ids, **implementation, **search)
    assert torch.equal(found, model.generate(ids, use_cache=False, **search))


@torch.no_grad()
def test_a_cache_that_was_filled_in_inference_mode_goes_on_outside_of_it(build, recurrent):
    model, ids = build("llama", recurrent), tokens(2, PROMPT + 3)
    with torch.inference_mode():
        cache = caches.of(model(ids[:, :PROMPT], use_cache=True))
    name = model.arch.stack(model).cache_keyword
    steps = [model(token, use_cache=True, **{name: cache}).logits for token in ids[:, PROMPT:].split(1, 1)]
    assert_close(torch.cat(steps, 1), model(ids, use_cache=False).logits[:, PROMPT:], atol=1e-4, rtol=1e-3)


def test_the_draw_lets_every_pair_meet():
    for i, j in combinations(range(len(RANGES)), 2):
        assert {(case[i], case[j]) for case in OTHERS} == set(product(RANGES[i], RANGES[j]))


# -- what cannot carry a state is refused ------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kept", KEEPS[:-1])
def test_assistants_and_continuous_batches_are_refused_by_name(kept):
    model, (ids, _) = model_of("llama", "supra", kept), prompts(False)
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens"):
        model.generate(ids[:1], prompt_lookup_num_tokens=2, max_new_tokens=4)
    for route in ("init_continuous_batching", "generate_batch", "continuous_batching_context_manager"):
        with pytest.raises(ValueError, match="continuous batching"):
            getattr(model, route)(ids.tolist())


@torch.no_grad()
def test_a_cache_that_cannot_carry_a_state_is_refused_by_name():
    model, (ids, _) = model_of("llama", "supra", "none"), prompts(False)

    class Quantised(caches.QuantizedCache):
        def __init__(self) -> None:
            Cache.__init__(self, layers=[])

    for cache in (Quantised(), ((ids, ids),) * 4):
        with pytest.raises(ValueError, match=f"cannot use a {type(cache).__name__}"):
            model(ids, **{model.arch.stack(model).cache_keyword: cache})
    with pytest.raises(ValueError, match="two caches"):
        model(ids, cache=DynamicCache(), past_key_values=DynamicCache())


@torch.no_grad()
def test_a_cache_of_other_layers_is_refused():
    (ids, _), (first, last) = prompts(False), (model_of("llama", "supra", keep) for keep in ("first:1", "last:1"))
    with pytest.raises(ValueError, match="pass a new cache"):
        last(ids, past_key_values=caches.of(first(ids, use_cache=True)))


def test_a_pass_whose_cache_does_not_reach_a_layer_is_an_error():
    model, (ids, _) = model_of("llama", "supra", "every:2").train(), prompts(False)
    model.gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match="carried 0 of 9 tokens"):
        model(ids, use_cache=True)


@torch.no_grad()
def test_every_route_to_the_blocks_prepares_the_cache_and_reads_the_padding():
    model, (ids, mask) = model_of("llama", "supra", "every:2"), prompts(True)
    output = model.base_model(ids, mask, use_cache=True)
    assert [isinstance(layer, RecurrentLayer) for layer in caches.of(output).layers] == [True, False, True, False]
    alone = model.base_model(ids[:1, PROMPT - LENGTH :], use_cache=False).last_hidden_state
    assert_close(output.last_hidden_state[:1, PROMPT - LENGTH :], alone, atol=1e-4, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(2, 1, 9, 9), (2, 8), (3, 9), (9,)])
def test_a_mask_that_does_not_say_which_tokens_are_real_is_refused(shape):
    model, (ids, _) = model_of("llama", "supra", "first:1"), prompts(False)
    with pytest.raises(ValueError, match="attention_mask is"):
        model(ids, attention_mask=torch.ones(shape))
    cache = caches.of(model(ids, use_cache=True))
    with pytest.raises(ValueError, match=r"expected \[2, 10\]"):
        model(ids[:, :1], attention_mask=torch.ones(2, 1), past_key_values=cache)


@torch.no_grad()
def test_a_cache_made_early_or_for_another_number_of_layers_is_told_apart():
    model, (ids, _) = model_of("llama", "supra", "first:1"), prompts(False)
    early = StaticCache(config=model.config, max_cache_len=16)
    early.early_initialization(batch_size=2, num_heads=2, head_dim=8, dtype=torch.float32, device="cpu")
    assert_close(model(ids, past_key_values=early).logits, model(ids).logits)
    short = StaticCache(config=tiny_model("llama", num_hidden_layers=2).config, max_cache_len=16)
    with pytest.raises(ValueError, match="2 layers and the model 4"):
        model(ids, past_key_values=short)


@torch.no_grad()
def test_a_state_with_tokens_in_it_cannot_be_cropped_whatever_the_version_means_by_it():
    model, (ids, _) = model_of("llama", "supra", "none"), prompts(False)
    cache = caches.of(model(ids, use_cache=True))
    for length in (0, 1, PROMPT, -1):
        with pytest.raises(ValueError, match="cannot forget"):
            cache.crop(length)
