"""Generation against Hugging Face's own, against formulas, and against itself alone, batched and cut short."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch._inductor.config
from tiny import of_words, tiny_model
from transformers import LlamaForCausalLM

from supra_cli.core import generate
from supra_cli.core.data import tokenizer as bpe
from supra_cli.core.errors import SupraError, UsageError
from supra_cli.core.generate import Sampling, Stats, Writer

TEXT = ["the quick brown fox jumps over the lazy dog " * 20, "naïve café, 東京, 🦊 and über " * 20]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile wants a C++ compiler on a CPU")
PROMPTS = ["the quick", "fox", "naïve café and a rather longer prompt than the others"]


@pytest.fixture(scope="module")
def tokenizer():
    return bpe.train(TEXT, 300)


@pytest.fixture(scope="module", params=["softmax", "supra", "mixed"])
def model(request, tokenizer):
    """A small random model: plain, without any softmax layer, or with one."""
    mixer = "softmax" if request.param == "softmax" else "supra"
    keep = "1" if request.param == "mixed" else "none"
    torch.manual_seed(0)
    return tiny_model("llama", mixer, keep, **of_words(tokenizer))


def tokens_of(model, tokenizer, prompt, sampling):
    """The tokens that a plain loop without any cache generates for one prompt: the specification."""
    ids = tokenizer(prompt)["input_ids"]
    generators = [torch.Generator().manual_seed(sampling.seed)]
    new = []
    with torch.no_grad():
        for _ in range(sampling.max_new_tokens):
            logits = model(torch.tensor([ids + new]), use_cache=False).logits[:, -1]
            new.append(int(generate.choose(logits, sampling, generators)))
            if new[-1] == tokenizer.eos_token_id:
                break
    return new


@pytest.mark.parametrize("sampling", [Sampling(24), Sampling(24, temperature=0.8, top_k=40, top_p=0.9, seed=5)])
def test_cached_decoding_equals_one_without_a_cache(model, tokenizer, sampling):
    texts, _ = generate.complete(model, tokenizer, PROMPTS[:1], sampling)
    tokens = tokens_of(model, tokenizer, PROMPTS[0], sampling)
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    assert texts[0] == whole.rstrip("\ufffd")


@pytest.mark.parametrize("sampling", [Sampling(16), Sampling(16, temperature=1.0, seed=3), Sampling(10, num_beams=3)])
def test_a_batch_gives_what_each_prompt_alone_gives(model, tokenizer, sampling):
    batched, _ = generate.complete(model, tokenizer, PROMPTS, sampling)
    for row, prompt in enumerate(PROMPTS):
        alone = Sampling(
            sampling.max_new_tokens, sampling.temperature, num_beams=sampling.num_beams, seed=sampling.seed + row
        )
        assert generate.complete(model, tokenizer, [prompt], alone)[0] == [batched[row]]


@needs_compiler
@pytest.mark.slow
def test_a_compiled_step_gives_the_same_logits_and_compiles_no_more_while_the_text_grows(model, tokenizer):
    # What PyTorch 2.11 makes of padding beside softmax layers is no valid C++ (docs/compatibility.md).
    invalid = torch.__version__.startswith("2.11") and "softmax" in model.supra.layers
    ids, mask = generate.encode(tokenizer, PROMPTS[:1] if invalid else PROMPTS, "cpu")
    position = torch.full((len(ids),), ids.shape[1]) if mask is None else mask.sum(-1)
    (logits, cache), (_, plain) = (generate.prefill(model, ids, mask) for _ in range(2))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step = generate.compiled(model, logits.argmax(-1), position, mask, cache)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    for _ in range(24):
        token = logits.argmax(-1)
        mask = None if mask is None else torch.cat([mask, mask.new_ones((len(mask), 1))], -1)
        logits, cache = step(model, token, position, mask, cache)
        want, plain = generate.decode(model, token, position, mask, plain)
        torch.testing.assert_close(logits, want, atol=1e-4, rtol=1e-4)
        position = position + 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@needs_compiler
@pytest.mark.slow
def test_compiled_text_is_the_plain_one(tokenizer):
    torch.manual_seed(0)
    model = tiny_model("llama", "supra", **of_words(tokenizer))
    text, stats = generate.complete(model, tokenizer, PROMPTS, Sampling(24), compile=True)
    assert text == generate.complete(model, tokenizer, PROMPTS, Sampling(24))[0]
    assert stats.compile_seconds > stats.decode_seconds > 0


def test_where_nothing_compiles_the_error_says_why(tokenizer):
    model = tiny_model("llama", "supra", **of_words(tokenizer))
    torch._dynamo.reset()
    absent = {"cpp.cxx": (None, "no-such-compiler"), "force_disable_caches": True}
    with (
        torch._inductor.config.patch(absent),
        pytest.raises(SupraError, match=r"No working C\+\+ compiler.*leave out"),
    ):
        generate.complete(model, tokenizer, PROMPTS[:1], Sampling(3), compile=True)


def test_one_token_needs_no_compiling(model, tokenizer):
    assert generate.complete(model, tokenizer, PROMPTS[:1], Sampling(1), compile=True)[1].compile_seconds == 0


def test_greedy_text_is_that_of_hugging_face_generate(tokenizer):
    torch.manual_seed(0)
    ours = tiny_model("llama", "softmax", **of_words(tokenizer))
    plain = LlamaForCausalLM(ours.config.plain()).eval()
    plain.load_state_dict(ours.state_dict())
    ids = torch.tensor([tokenizer(PROMPTS[0])["input_ids"]])
    theirs = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    text = tokenizer.decode(theirs[0, ids.shape[1] :], skip_special_tokens=True)
    assert generate.complete(ours, tokenizer, PROMPTS[:1], Sampling(20))[0] == [text.rstrip("\ufffd")]


def test_the_same_seed_draws_the_same_and_another_seed_another(model, tokenizer):
    one, again, other = (
        generate.complete(model, tokenizer, PROMPTS, Sampling(16, temperature=1.0, seed=seed))[0]
        for seed in (1, 1, 100)
    )
    assert one == again
    assert one != other


def test_a_state_of_recurrent_layers_does_not_grow(tokenizer, model):
    sizes = []
    for tokens in (2, 40):
        stats = Stats()
        list(generate.stream(model, tokenizer, PROMPTS[:1], Sampling(tokens), stats))
        sizes.append(stats.cache_bytes)
    grows = "softmax" in model.supra.layers
    assert (sizes[1] > sizes[0]) is grows
    assert sizes[0] > 0


@pytest.mark.parametrize("beams", [1, 3])
def test_stats_count_tokens_up_to_the_end_of_each_completion(model, tokenizer, monkeypatch, beams):
    """As many as Hugging Face's generate makes for each prompt alone; the prefill's own is no decoded one."""
    monkeypatch.setattr(model.generation_config, "eos_token_id", [1, *range(5, 300, 9)])
    lengths = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "num_beams": beams, "do_sample": False}
        lengths.append(model.generate(ids, **given).shape[1] - ids.shape[1])
    assert min(lengths) < max(lengths), "the test wants completions of different lengths"
    stats = generate.complete(model, tokenizer, PROMPTS, Sampling(12, num_beams=beams))[1]
    assert stats.prompt_tokens == sum(len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS)
    assert stats.new_tokens == sum(lengths)
    assert stats.decoded_tokens == sum(lengths) - (len(PROMPTS) if beams == 1 else 0)
    assert stats.decode_tokens_per_second == stats.decoded_tokens / stats.decode_seconds


def test_generation_ends_at_the_tokenizer_s_or_the_generation_config_s_end(model, tokenizer, monkeypatch):
    free = tokens_of(model, tokenizer, PROMPTS[0], Sampling(12))
    assert generate.eos_ids(model, tokenizer) == {tokenizer.eos_token_id}
    monkeypatch.setattr(model.generation_config, "eos_token_id", [free[3], 299])
    assert generate.eos_ids(model, tokenizer) == {free[3], 299, tokenizer.eos_token_id}
    texts, stats = generate.complete(model, tokenizer, PROMPTS[:1], Sampling(12))
    assert stats.finish == ["eos"]
    assert texts[0] == tokenizer.decode(free[: free.index(free[3])], skip_special_tokens=True).rstrip("\ufffd")


def test_an_empty_prompt_begins_with_the_beginning_of_text(tokenizer, monkeypatch):
    ids, mask = generate.encode(tokenizer, [""], "cpu")
    assert ids.tolist() == [[tokenizer.bos_token_id]]
    assert mask is None

    class Bare:
        bos_token_id = eos_token_id = None

        def __call__(self, text):
            return {"input_ids": []}

    with pytest.raises(UsageError, match="prompt is empty"):
        generate.encode(Bare(), [""], "cpu")


# -- choosing ---------------------------------------------------------------------------------------------------------


def frequencies(sampling, probabilities, draws=4000):
    logits = torch.tensor(probabilities).log()[None].expand(draws, -1)
    generators = [torch.Generator().manual_seed(seed) for seed in range(draws)]
    drawn = generate.choose(logits, sampling, generators)
    return torch.bincount(drawn, minlength=len(probabilities)).double() / draws


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_follow_the_probabilities_and_temperature_sharpens_them(temperature):
    sharp = torch.tensor([0.1, 0.6, 0.3]).double() ** (1 / temperature)
    drawn = frequencies(Sampling(temperature=temperature), [0.1, 0.6, 0.3])
    # Four standard errors of a share among 4,000 draws.
    torch.testing.assert_close(drawn, sharp / sharp.sum(), atol=0.03, rtol=0)


def test_top_k_and_top_p_cut_the_tail():
    assert frequencies(Sampling(temperature=1.0, top_k=2), [0.1, 0.6, 0.3])[0] == 0
    assert frequencies(Sampling(temperature=1.0, top_p=0.5), [0.1, 0.6, 0.3]).tolist() == [0, 1, 0]
    # The smallest set that reaches 0.7 is the first two.
    assert frequencies(Sampling(temperature=1.0, top_p=0.7), [0.1, 0.6, 0.3])[0] == 0


def test_temperature_0_takes_the_most_probable():
    assert frequencies(Sampling(), [0.1, 0.6, 0.3], draws=3).tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"num_beams": 0},
        {"seed": -1},
        {"stop": ("",)},
        {"num_beams": 2, "temperature": 1.0},
    ],
)
def test_impossible_settings_are_usage_errors(wrong):
    with pytest.raises(UsageError):
        Sampling(**wrong)


# -- writing ----------------------------------------------------------------------------------------------------------


def written(tokenizer, text, stop=(), prompt="naïve"):
    writer = Writer(tokenizer, tokenizer(prompt)["input_ids"], stop)
    pieces = []
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        if writer.done:
            break
        pieces.append(writer.add(token))
    return [*pieces, writer.close()]


@pytest.mark.parametrize("text", [TEXT[0][:200], "🦊🦊 東京 𝔘nicode ﷽ é\n\n  x", "a\ufffdb", ""])
def test_pieces_are_whole_characters_and_add_up(tokenizer, text):
    pieces = written(tokenizer, text)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


def test_half_a_character_at_the_end_is_not_written(tokenizer):
    ids = tokenizer("x🧿", add_special_tokens=False)["input_ids"]
    assert len(ids) > 3, "the test wants a character of several tokens"
    writer = Writer(tokenizer, [], ())
    assert "".join([*map(writer.add, ids[:-1]), writer.close()]) == "x"


@pytest.mark.parametrize(
    ("stop", "expected"),
    [(("END",), "one "), (("D two",), "one EN"), (("nowhere",), "one END two"), (("two", "END"), "one ")],
)
def test_text_ends_before_a_stop_string_and_never_shows_a_part_of_it(tokenizer, stop, expected):
    pieces = written(tokenizer, "one END two", stop)
    assert "".join(pieces) == expected
    shown = ""
    for piece in pieces:
        shown += piece
        assert expected.startswith(shown)


def test_a_stop_string_ends_generation(model, tokenizer):
    free = generate.complete(model, tokenizer, PROMPTS[:1], Sampling(24))[0][0]
    stop = free[5:8]
    texts, stats = generate.complete(model, tokenizer, PROMPTS[:1], Sampling(24, stop=(stop,)))
    assert texts == [free[: free.index(stop)]]
    assert stats.finish == ["stop"]
