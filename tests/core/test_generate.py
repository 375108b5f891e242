"""Generation against Hugging Face's own, against formulas, and against itself alone, batched and cut short."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from tiny import of_words, tiny_model
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import GPT2Tokenizer, LlamaForCausalLM, Phi3ForCausalLM, PreTrainedTokenizerFast

from supra_cli.__main__ import main
from supra_cli.core import generate
from supra_cli.core.data import tokenizer as bpe
from supra_cli.core.data.tokens import encode
from supra_cli.core.errors import NonFiniteError, SupraError, UsageError
from supra_cli.core.generate import Sampling, Stats, Writer, steps, streaming

TEXT = ["the quick brown fox jumps over the lazy dog " * 20, "naïve café, 東京, 🦊 and über " * 20]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile wants a C++ compiler on a CPU")
STRETCHED = {
    "sliding_window": None,
    "original_max_position_embeddings": 16,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0, 8.0, 16.0, 32.0],
        "original_max_position_embeddings": 16,
    },
}
"""As Phi-3's for 128k tokens, with other rotary tables from 17 tokens on."""
PROMPTS = ["the quick", "fox", "naïve café and a rather longer prompt than the others"]


@pytest.fixture(scope="module")
def tokenizer():
    return bpe.train(TEXT, 300)


@pytest.fixture(scope="module", params=["softmax", "supra", "mixed"])
def model(request, tokenizer, device):
    """A small random model on each device: plain, without any softmax layer, or with one."""
    mixer = "softmax" if request.param == "softmax" else "supra"
    keep = "1" if request.param == "mixed" else "none"
    torch.manual_seed(0)
    return tiny_model("llama", mixer, keep, **of_words(tokenizer)).to(device)


def tokens_of(model, tokenizer, prompt, sampling):
    """The tokens that a plain loop without any cache generates for one prompt: the specification."""
    ids = tokenizer(prompt)["input_ids"]
    generators = [torch.Generator().manual_seed(sampling.seed)]
    new = []
    with torch.no_grad():
        for _ in range(sampling.max_new_tokens):
            logits = model(torch.tensor([ids + new], device=model.device), use_cache=False).logits[:, -1]
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
    ids, mask = generate.encode(tokenizer, PROMPTS[:1] if invalid else PROMPTS, model.device)
    position = ids.new_full((len(ids),), ids.shape[1]) if mask is None else mask.sum(-1)
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


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("sampling", [Sampling(24), Sampling(24, temperature=0.8, seed=5)])
@pytest.mark.parametrize(("mixer", "keep"), [("softmax", "none"), ("supra", "none"), ("supra", "1")])
def test_text_that_outgrows_the_base_s_positions_is_read_again(mixer, keep, sampling, prompt, tokenizer, monkeypatch):
    """Rotary tables for long texts hold for their first tokens too, so that no cache could have been right."""
    monkeypatch.setattr(steps.prefill, "__kwdefaults__", {"piece": 7})
    torch.manual_seed(0)
    model = tiny_model("phi3", mixer, keep, **STRETCHED, **of_words(tokenizer))
    text = generate.complete(model, tokenizer, [prompt], sampling)[0]
    whole = tokenizer.decode(tokens_of(model, tokenizer, prompt, sampling), skip_special_tokens=True)
    assert text == [whole.rstrip("\ufffd")]


def test_beams_over_a_text_that_outgrows_the_base_s_positions_are_hugging_face_s(tokenizer, monkeypatch):
    monkeypatch.setattr(streaming, "PIECE", 7)
    torch.manual_seed(0)
    model = tiny_model("phi3", "softmax", **STRETCHED, **of_words(tokenizer))
    plain = Phi3ForCausalLM(model.config.plain()).eval()
    plain.load_state_dict(model.state_dict())
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        given = {"max_new_tokens": 20, "do_sample": False, "num_beams": 3, "attention_mask": torch.ones_like(ids)}
        text = tokenizer.decode(plain.generate(ids, **given)[0, ids.shape[1] :], skip_special_tokens=True)
        assert generate.complete(model, tokenizer, [prompt], Sampling(20, num_beams=3))[0] == [text.rstrip("\ufffd")]


def test_prompts_that_would_change_each_other_s_positions_are_refused(tokenizer):
    model = tiny_model("phi3", **STRETCHED, **of_words(tokenizer))
    with pytest.raises(UsageError, match="more than 16 tokens, so that prompts of different lengths"):
        generate.complete(model, tokenizer, PROMPTS, Sampling(24))


def test_one_token_needs_no_compiling(model, tokenizer):
    assert generate.complete(model, tokenizer, PROMPTS[:1], Sampling(1), compile=True)[1].compile_seconds == 0


def test_greedy_text_is_that_of_hugging_face_generate(tokenizer, device):
    """On a CPU."""
    torch.manual_seed(0)
    ours = tiny_model("llama", "softmax", **of_words(tokenizer))
    plain = LlamaForCausalLM(ours.config.plain()).eval()
    plain.load_state_dict(ours.state_dict())
    ids = torch.tensor([tokenizer(PROMPTS[0])["input_ids"]])
    theirs = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    text = tokenizer.decode(theirs[0, ids.shape[1] :], skip_special_tokens=True)
    assert generate.complete(ours.to(device), tokenizer, PROMPTS[:1], Sampling(20))[0] == [text.rstrip("\ufffd")]


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
        ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=model.device)
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


def test_beams_follow_no_setting_of_the_model_and_read_a_prompt_in_pieces(model, tokenizer, monkeypatch):
    """Greedy text follows none either; the settings are the model's again afterwards."""
    plain = generate.complete(model, tokenizer, PROMPTS, Sampling(8, num_beams=3))[0]
    monkeypatch.setattr(model.generation_config, "no_repeat_ngram_size", 1)
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 5.0)
    own, widths = model.generation_config, set()
    monkeypatch.setattr(streaming, "PIECE", 7)
    hook = model.register_forward_pre_hook(
        lambda _, positional, named: widths.add(named["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        assert generate.complete(model, tokenizer, PROMPTS, Sampling(8, num_beams=3))[0] == plain
    finally:
        hook.remove()
    assert max(widths) == 7
    assert model.generation_config is own


def test_settings_of_the_model_that_are_not_followed_are_named(model, monkeypatch):
    assert generate.unused_settings(model, Sampling()) == {}
    settings = {"do_sample": True, "temperature": 0.6, "top_k": 50, "repetition_penalty": 1.1}
    further = {"no_repeat_ngram_size": 1, "min_length": 1}
    without_effect = {"top_p": 1.0, "min_p": 0.0, "num_return_sequences": 1, "bad_words_ids": [], "max_length": 99}
    for name, value in (settings | further | without_effect).items():
        monkeypatch.setattr(model.generation_config, name, value)
    assert generate.unused_settings(model, Sampling()) == settings | further
    asked = Sampling(temperature=0.6, top_k=50, repetition_penalty=1.1)
    assert generate.unused_settings(model, asked) == further


def test_a_repetition_penalty_is_that_of_hugging_face_and_the_same_in_a_batch(model, tokenizer):
    batched = generate.complete(model, tokenizer, PROMPTS, Sampling(16, repetition_penalty=1.5))[0]
    assert batched != generate.complete(model, tokenizer, PROMPTS, Sampling(16))[0]
    for prompt, text in zip(PROMPTS, batched, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=model.device)
        given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 16, "do_sample": False}
        theirs = model.generate(ids, repetition_penalty=1.5, **given)[0, ids.shape[1] :]
        assert text == tokenizer.decode(theirs, skip_special_tokens=True).rstrip("\ufffd")


# -- prompts ----------------------------------------------------------------------------------------------------------

LONG = """
import bisect, sys
from pathlib import Path
import torch
from supra_cli.core import checkpoint, generate

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

folder = Path(sys.argv[1])
model = checkpoint.load(folder, device="cpu", dtype=torch.float32)
tokenizer = checkpoint.load_tokenizer(folder)
text = Path(bisect.__file__).read_text(encoding="utf-8")
times = 100_000 // len(tokenizer(text)["input_ids"]) + 2
tokens, peaks = [], []
for prompt in (text, text * times):
    _, stats = generate.complete(model, tokenizer, [prompt], generate.Sampling(4))
    tokens.append(stats.prompt_tokens)
    peaks.append(peak())
print(*tokens, peaks[1] - peaks[0], stats.cache_bytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_a_prompt_of_100_000_tokens_takes_the_memory_of_one_of_1_000(tmp_path):
    """At its peak, so that nothing large is held in between, from the text on."""
    assert main(["convert", "tiny", "-o", str(tmp_path / "student")]) == 0
    done = subprocess.run(
        [sys.executable, "-c", LONG, tmp_path / "student"], capture_output=True, text=True, check=True
    )
    short, long, grown, cache = map(int, done.stdout.split())
    assert short < 2_000
    assert long > 100_000
    assert grown < 64 << 20
    assert cache < 1 << 20


def opened(tokenizer, template, **changes):
    """The tokenizer with another template, in which $A is the text, and other special tokens."""
    other = deepcopy(tokenizer)
    for name, value in changes.items():
        setattr(other, name, value)
    special = [(word, other.convert_tokens_to_ids(word)) for word in template.split() if word != "$A"]
    other._tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return other


@pytest.mark.parametrize(
    ("template", "begin"),
    [("<s> $A", "<s>"), ("<s> $A </s>", "<s>"), ("</s> $A", "</s>"), ("<pad> <s> $A", "<pad><s>"), ("$A", "")],
    ids=["begin", "begin and end", "begin is end", "two tokens", "nothing"],
)
def test_a_text_is_opened_once_and_closed_once_whatever_it_brings(tokenizer, template, begin):
    words = opened(tokenizer, template, **({"bos_token": "</s>"} if begin == "</s>" else {}))
    end = words.eos_token_id
    [plain] = bpe.token_ids(words, ["the fox"])
    assert plain == words(begin + "the fox", add_special_tokens=False)["input_ids"]
    for text in (f"{begin}the fox", f"{begin}{begin}the fox"):
        assert bpe.token_ids(words, [text]) == [plain]
    assert generate.encode(words, [begin + "the fox"], "cpu")[0].tolist() == [plain]
    for text in ("the fox", f"{begin}the fox", "the fox</s>", f"{begin}the fox</s>"):
        assert bpe.token_ids(words, [text], close=True) == [[*plain, end]]
        assert next(iter(encode([text, "x"], words))) == [*plain, end]


@pytest.mark.parametrize("adds", [True, False])
def test_add_bos_token_opens_a_text_once_also_where_the_beginning_is_the_end(adds):
    words = GPT2Tokenizer(vocab={"a": 0, "b": 1, "<|endoftext|>": 2}, merges=[], add_bos_token=adds)
    assert bpe.token_ids(words, ["ab", "<|endoftext|>ab"]) == [[2, 0, 1] if adds else [0, 1], [2, 0, 1]]
    assert bpe.token_ids(words, ["ab", "ab<|endoftext|>"], close=True) == [[2, 0, 1, 2] if adds else [0, 1, 2]] * 2


def test_a_vocabulary_without_letters_is_opened_too():
    """Of nucleotides, say: what stands around a text cannot be told from a text that has no token."""
    plain = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "A": 2, "C": 3, "G": 4, "T": 5}, []))
    words = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>")
    words = opened(words, "<s> $A")
    assert words("a", add_special_tokens=False)["input_ids"] == []
    assert bpe.token_ids(words, ["CGT", "<s>CGT"], close=True) == [[0, 3, 4, 5, 1]] * 2


def test_what_no_tokenizer_opens_keeps_what_it_brings(tokenizer):
    bare = opened(tokenizer, "$A")
    assert bpe.token_ids(bare, ["<s><s>fox"]) == [bare("<s><s>fox")["input_ids"]]


def test_a_prompt_is_not_closed_by_a_tokenizer_that_closes_texts(model, tokenizer):
    closing = opened(tokenizer, "<s> $A </s>")
    assert closing("fox")["input_ids"][-1] == tokenizer.eos_token_id
    both = [generate.complete(model, words, PROMPTS[:1], Sampling(8))[0] for words in (tokenizer, closing)]
    assert both[0] == both[1]


def test_an_empty_prompt_begins_with_the_beginning_of_text(tokenizer):
    ids, mask = generate.encode(tokenizer, [""], "cpu")
    assert ids.tolist() == [[tokenizer.bos_token_id]]
    assert mask is None
    bare = opened(tokenizer, "$A", bos_token=None, eos_token=None)
    with pytest.raises(UsageError, match="prompt is empty"):
        generate.encode(bare, [""], "cpu")


def with_special(tokenizer, *words):
    more = deepcopy(tokenizer)
    more.add_tokens([AddedToken(word, special=True, normalized=False) for word in words], special_tokens=True)
    return more


def test_a_token_beyond_the_embedding_is_refused_only_where_it_is_used(model, tokenizer, monkeypatch):
    """As in Gemma 3, whose tokenizer has a token for images that its text models have no embedding for."""
    more = with_special(tokenizer, "<image>")
    bpe.check_vocabulary(more, model.config)
    assert generate.complete(model, more, PROMPTS[:1], Sampling(2))[1].new_tokens == 2
    monkeypatch.setattr(model, "forward", lambda **_: pytest.fail("went on to the model"))
    with pytest.raises(
        SupraError, match=rf"holds token {len(tokenizer)}, '<image>'.*tokens 0 to {len(tokenizer) - 1};"
    ):
        generate.complete(model, more, ["the <image>"], Sampling(2))


def test_a_tokenizer_of_another_model_is_refused(model):
    with pytest.raises(SupraError, match=r"350 tokens.*room for 300"):
        bpe.check_vocabulary(bpe.train([*TEXT, *map(str, range(999))], 350), model.config)


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


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(4),
        Sampling(4, temperature=1.0),
        Sampling(4, temperature=1.0, top_k=3, top_p=0.9),
        Sampling(4, repetition_penalty=1.5),
        Sampling(4, num_beams=2),
    ],
    ids=["greedy", "drawn", "cut", "discouraged", "beams"],
)
@pytest.mark.parametrize("first", [0, 2])
def test_logits_that_are_no_numbers_are_told(tokenizer, first, sampling, number):
    torch.manual_seed(0)
    model, passes = tiny_model("llama", "supra", **of_words(tokenizer)), itertools.count()

    def spoil(module, inputs, output):
        if next(passes) >= first:
            output[..., -1] = number

    with model.lm_head.register_forward_hook(spoil), pytest.raises(NonFiniteError, match="logits are not finite"):
        generate.complete(model, tokenizer, PROMPTS[:1], sampling)


def test_a_penalty_may_leave_the_range_of_numbers(model, tokenizer):
    assert generate.complete(model, tokenizer, PROMPTS[:1], Sampling(4, repetition_penalty=3e38))[1].new_tokens == 4


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_k=3, top_p=0.9)])
def test_choosing_asks_nothing_of_the_device(sampling):
    """But to take in the numbers that the CPU has drawn."""
    with FakeTensorMode():
        logits, seen = torch.empty(2, 9, device="meta"), torch.empty(2, 9, dtype=torch.bool, device="meta")
        generators = [torch.Generator().manual_seed(row) for row in range(2)]
        assert generate.choose(logits, sampling, generators, seen).device.type == "meta"


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
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")},
        {"seed": -1},
        {"stop": ("",)},
        {"num_beams": 2, "temperature": 1.0},
        {"num_beams": 2, "repetition_penalty": 1.5},
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


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("<|im_end|>",), "one "),
        (("e <|im",), "on"),
        (("one <|im_end|>two",), ""),
        (("<|im_end|>tw",), "one "),
        (("<|im_end|><|im_start|>",), "one two"),
        (("e two",), "on"),  # as it is read on the screen
        (("nowhere", "<|im_end|>nowhere"), "one two three"),
    ],
)
def test_a_stop_string_may_be_or_span_special_tokens_which_never_show(tokenizer, stop, expected):
    words = with_special(tokenizer, "<|im_end|>", "<|im_start|>")
    pieces = written(words, "one <|im_end|>two<|im_end|><|im_start|> three", stop)
    assert "".join(pieces) == expected
    shown = ""
    for piece in pieces:
        shown += piece
        assert expected.startswith(shown)


@pytest.mark.parametrize(
    ("stop", "expected", "finish"),
    [
        ((), "one two", "eos"),
        (("two</s>",), "one ", "stop"),
        (("</s>",), "one two", "stop"),
        (("</s>x",), "one two", "eos"),
        (("<|im_end|>",), "one ", "stop"),
    ],
)
def test_a_stop_string_with_the_end_of_text_in_it_stops(model, tokenizer, monkeypatch, stop, expected, finish):
    """The model's choices are written for it: these tokens, whatever it says."""
    words = with_special(tokenizer, "<|im_end|>")
    script = iter(words("one <|im_end|>two</s>x x x", add_special_tokens=False)["input_ids"])
    monkeypatch.setattr(streaming, "choose", lambda *_: torch.tensor([next(script)]))
    monkeypatch.setattr(streaming, "decode", lambda model, token, position, mask, cache: (None, cache))
    texts, stats = generate.complete(model, words, PROMPTS[:1], Sampling(9, stop=stop))
    assert texts == [expected]
    assert stats.finish == [finish]


def sentencepiece():
    """In the manner of Llama 2: a space before a text, dropped again by the decoder, and bytes for what is unknown."""
    letters = ["\u2581", *"abcdefghijklmnopqrstuvwxyz", "\u2581a", "\u2581b", "ab", "\u2581ab"]
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges = [("\u2581", "a"), ("\u2581", "b"), ("a", "b"), ("\u2581a", "b")]
    words = Tokenizer(
        models.BPE({word: id for id, word in enumerate(vocabulary)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    words.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    words.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize(("prompt", "text"), [("ab", " ab é a"), ("ab" + "</s>" * 9, " ab a"), ("", "ab a")])
def test_the_first_space_of_a_completion_is_kept_where_decoders_drop_it(prompt, text):
    words = sentencepiece()
    ids = words(text.removeprefix(" "), add_special_tokens=False)["input_ids"]
    writer = Writer(words, words(prompt)["input_ids"])
    assert "".join([*map(writer.add, ids), writer.close()]) == text


@pytest.mark.parametrize(
    ("prompt", "text"), [("ab 東京東", "京都 ab"), ("a 🦊🦊", "🦊 a"), ("京" * 20, "都"), ("東\ufffd京", "都")]
)
def test_a_prompt_that_is_cut_within_a_character_spoils_none_of_the_completion(prompt, text):
    words = sentencepiece()
    ids, whole = words(prompt)["input_ids"], words(prompt + text)["input_ids"]
    assert whole[: len(ids)] == ids
    writer = Writer(words, ids)
    assert "".join([*map(writer.add, whole[len(ids) :]), writer.close()]) == text


@pytest.mark.parametrize(("stop", "expected"), [("é", "ab "), (" 🦊 a", "ab é"), ("\n", "ab é 🦊 a")])
def test_a_stop_string_of_bytes_stops(stop, expected):
    words = sentencepiece()
    writer = Writer(words, [words.bos_token_id], (stop,))
    pieces = []
    for token in words("ab é 🦊 a\nb")["input_ids"]:
        if not writer.done:
            pieces.append(writer.add(token))
    assert "".join([*pieces, writer.close()]) == expected
    assert writer.stopped
