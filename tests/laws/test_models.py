"""Laws of models: the base is untouched, what is saved comes back, transformers can use it without knowing."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from tiny import EXPERTS, attention, tiny_config, tokens
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from supra_cli.core import cache as caches
from supra_cli.core import checkpoint
from supra_cli.core.modeling import SupraConfig

CLOSE = {"atol": 2e-5, "rtol": 2e-4}


def plain_model(base, **changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(base, **changes), **attention(base)).eval()


@torch.no_grad()
def test_the_identity_swap_equals_the_base_bit_for_bit(build, base):
    model, plain, ids = build(base, "softmax"), plain_model(base), tokens(2, 33)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(ids).logits, plain(ids).logits)
    given = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(ids, **given), plain.generate(ids, **given))


def test_parameters_of_the_base_keep_their_names(build, base, mixer):
    names = dict(build(base, mixer).named_parameters())
    plain = dict(plain_model(base).named_parameters())
    assert plain.keys() <= names.keys()
    assert all(".mixer." in name for name in names.keys() - plain.keys())


def test_a_mixer_holds_nothing_but_parameters(build, mixer):
    for _, layer in build("llama", mixer).swapped_layers():
        for module in layer.mixer.modules():
            assert not list(module.buffers(recurse=False))
            assert not [name for name, value in vars(module).items() if isinstance(value, torch.Tensor)]


@torch.no_grad()
def test_save_then_load_gives_the_same_logits(build, base, mixer, keep, tmp_path):
    model, ids = build(base, mixer, keep), tokens(2, 33)
    checkpoint.save(model, tmp_path / "model", source=None, provenance={})
    again = checkpoint.load(tmp_path / "model")
    assert again.supra == model.supra
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))
    # How an expert's product is rounded depends on where its weights lie in memory.
    assert_close(again(ids).logits, model(ids).logits, **(CLOSE if base in EXPERTS else {"atol": 0, "rtol": 0}))


@torch.no_grad()
def test_a_model_without_a_head_is_the_stack_of_the_one_with_it(build, base, keep, tmp_path):
    model, ids = build(base, "supra", keep), tokens(2, 33)
    checkpoint.save(model, tmp_path / "model", source=None, provenance={})
    headless = AutoModel.from_pretrained(tmp_path / "model", dtype=torch.float32)
    hidden = headless(ids, use_cache=True).last_hidden_state
    assert_close(
        model.arch.head(model, hidden), model(ids).logits, **(CLOSE if base in EXPERTS else {"atol": 0, "rtol": 0})
    )
    for again in (pickle.loads(pickle.dumps(headless)), copy.deepcopy(headless)):
        assert type(again) is type(headless)
        assert_close(again(ids).last_hidden_state, hidden, **CLOSE)
    memory = caches.of(headless(ids[:, :20], use_cache=True))
    steps = headless(ids[:, 20:], past_key_values=memory).last_hidden_state
    assert_close(steps, hidden[:, 20:], **CLOSE)
    headless.save_pretrained(tmp_path / "headless")
    named = json.loads((tmp_path / "headless" / "config.json").read_text())["architectures"]
    assert named == ["SupraModel" if "supra" in model.supra.layers else MODEL_MAPPING_NAMES[base]]
    again = AutoModel.from_pretrained(tmp_path / "headless")
    assert_close(again(ids).last_hidden_state, hidden, **CLOSE)


@torch.no_grad()
def test_attention_weights_are_given_of_layers_that_have_them(build, base):
    """An entry a layer, whatever the base's own class makes of one that returns none."""
    model, ids = build(base, "supra", "1"), tokens(2, 12)
    model.set_attn_implementation("eager")
    weights = model(ids, output_attentions=True).attentions
    assert [w is None for w in weights] == [kind != "softmax" for kind in model.supra.layers]
    assert weights[1].shape == (2, model.config.num_attention_heads, 12, 12)


@torch.no_grad()
def test_hidden_states_are_recorded_of_every_layer(build, base, keep):
    model, ids = build(base, "supra", keep), tokens(2, 33)
    headless = AutoModel.from_config(model.config).eval()
    headless.load_state_dict(model.base_model.state_dict())
    for network in (model, headless):
        recorded = network(ids, output_hidden_states=True).hidden_states
        assert len(recorded) == model.config.num_hidden_layers + 1
        assert_close(model.arch.head(model, recorded[-1]), model(ids).logits, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("rounding", [torch.bfloat16, torch.float16])
def test_constants_survive_loading_in_a_narrow_dtype_exactly(build, mixer, rounding, tmp_path):
    """Loaded narrow and widened, the model is the wide one with rounded parameters: nothing but parameters was
    rounded.
    """
    checkpoint.save(build("llama", mixer), tmp_path / "model", source=None, provenance={})
    widened = checkpoint.load(tmp_path / "model", dtype=rounding).float()
    rounded = checkpoint.load(tmp_path / "model")
    for parameter in rounded.parameters():
        parameter.copy_(parameter.to(rounding))
    ids = tokens(2, 33)
    assert torch.equal(widened(ids).logits, rounded(ids).logits)


@torch.no_grad()
def test_transformers_saves_and_loads_it_by_itself(build, base, mixer, tmp_path):
    model, ids = build(base, mixer, "1"), tokens(2, 20)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, **attention(base)).eval()
    assert isinstance(again.config, SupraConfig) == (mixer != "softmax")
    assert torch.equal(again(ids).logits, model(ids).logits)


@torch.no_grad()
def test_greedy_generation_takes_the_likeliest_token_of_a_full_pass(build, base, mixer, keep):
    model, ids = build(base, mixer, keep), tokens(2, 11)
    grown = ids
    for _ in range(6):
        grown = torch.cat((grown, model(grown).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None), grown)


@torch.no_grad()
def test_batched_generation_equals_single(build, mixer, keep):
    model = build("llama", mixer, keep)
    rows = [tokens(length, seed=length) for length in (4, 15, 9)]
    ids = torch.stack([torch.cat((torch.zeros(15 - len(row), dtype=torch.long), row)) for row in rows])
    given = {"max_new_tokens": 6, "eos_token_id": None}
    for search in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}):
        batch = model.generate(ids, attention_mask=(ids > 0).long(), **given, **search)[:, 15:]
        for row, line in enumerate(rows):
            alone = model.generate(line[None], attention_mask=torch.ones(1, len(line)), **given, **search)
            assert torch.equal(batch[row], alone[0, len(line) :])


@torch.no_grad()
def test_generation_with_a_static_cache_is_the_same(build, mixer):
    model, ids = build("llama", mixer), tokens(2, 9)
    ids[0, :4] = 0
    given = {"max_new_tokens": 6, "attention_mask": (ids > 0).long(), "eos_token_id": None, "do_sample": False}
    assert torch.equal(model.generate(ids, cache_implementation="static", **given), model.generate(ids, **given))


@torch.no_grad()
def test_beam_search_finds_what_it_finds_without_a_cache(build, mixer):
    model, ids = build("llama", mixer), tokens(2, 9)
    given = {"max_new_tokens": 6, "num_beams": 4, "eos_token_id": None, "do_sample": False}
    assert torch.equal(model.generate(ids, **given), model.generate(ids, use_cache=False, **given))


@torch.no_grad()
def test_sampling_with_a_seed_draws_the_same_with_and_without_a_cache(build, mixer):
    model, ids = build("llama", mixer), tokens(2, 9)
    drawn = []
    for cache in (True, False):
        torch.manual_seed(5)
        drawn.append(model.generate(ids, max_new_tokens=8, do_sample=True, use_cache=cache, eos_token_id=None))
    assert torch.equal(*drawn)


SUPRA_FIRST = """
import sys, time
start = time.perf_counter()
import supra_cli
assert time.perf_counter() - start < 0.2 and "torch" not in sys.modules
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM
"""
TRANSFORMERS_FIRST = """
import sys, torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM
import supra_cli
"""
GENERATE = """
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
out = model.generate(torch.arange(3, 11)[None], max_new_tokens=4, do_sample=False, eos_token_id=None)
print(type(model).__name__, *out[0].tolist())
"""


@pytest.mark.parametrize("imports", [SUPRA_FIRST, TRANSFORMERS_FIRST], ids=["supra first", "transformers first"])
def test_import_supra_cli_is_enough_for_the_auto_classes(build, imports, tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    program = [sys.executable, "-c", imports + GENERATE, tmp_path]
    printed = subprocess.run(program, capture_output=True, text=True, check=True).stdout
    expected = model.generate(torch.arange(3, 11)[None], max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert printed.split() == ["SupraLlamaForCausalLM", *map(str, expected[0].tolist())]


def test_without_supra_transformers_refuses_the_model(build, tmp_path):
    build().save_pretrained(tmp_path)
    program = "import sys; from transformers import AutoModelForCausalLM as Auto; Auto.from_pretrained(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True)
    assert done.returncode != 0
    assert "model type `supra`" in done.stderr
