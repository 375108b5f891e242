"""The config and the model's forward: masks, packing, caches, checkpointed gradients."""

from __future__ import annotations

import pytest
import torch
from tiny import softmax_heads, tiny_config, tiny_model, tokens
from torch.testing import assert_close
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from supra_cli.core import checkpoint
from supra_cli.core.errors import UsageError
from supra_cli.core.mixers import mixers
from supra_cli.core.modeling import SupraConfig
from supra_cli.core.recipe import Stage
from supra_cli.core.train.build import prepare, stage_of

SPEC = Stage(kind="finetune", tokens=1)

DOCUMENTS = (11, 1, 20)


def model(base="llama", mixer="softmax", **changes):
    torch.manual_seed(0)
    return tiny_model(base, mixer, num_hidden_layers=2, **changes)


def packed():
    ids = torch.randint(3, 97, (1, sum(DOCUMENTS)), generator=torch.Generator().manual_seed(1))
    return ids, torch.cat([torch.arange(length) for length in DOCUMENTS])[None]


def alone(swapped, ids):
    return torch.cat([swapped(part).logits for part in ids.split(DOCUMENTS, dim=1)], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "base",
    [
        {"base": "llama"},
        {"base": "mistral", "sliding_window": 5},
        {"base": "qwen2", "sliding_window": 5, "layer_types": None, "max_window_layers": 1},
    ],
    ids=["all", "window", "window in some layers"],
)
def test_packed_softmax_layers_keep_to_their_document_and_window(base, attention):
    swapped = model(**base)
    swapped.set_attn_implementation(attention)
    ids, positions = packed()
    assert_close(swapped(ids, position_ids=positions, use_cache=False).logits, alone(swapped, ids))


def heard(swapped, **call):
    """What the first attention layer was given and what it answered."""
    heard = []
    hook = swapped.model.layers[0].self_attn.register_forward_hook(
        lambda module, args, kwargs, output: heard.append((kwargs, output[0])), with_kwargs=True
    )
    swapped(use_cache=False, **call)
    hook.remove()
    return heard[0]


@torch.no_grad()
@pytest.mark.parametrize("sliding", [None, 5])
@pytest.mark.parametrize("packing", [True, False])
def test_a_swapped_layer_answers_as_its_base_within_documents_and_window(sliding, packing):
    swapped, plain = (model("mistral", mixer, sliding_window=sliding) for mixer in ("supra", "softmax"))
    plain.load_state_dict({k: v for k, v in swapped.state_dict().items() if ".mixer." not in k})
    ids, positions = packed()
    call = {"input_ids": ids, "position_ids": positions if packing else None}
    _, expected = heard(plain, **call)
    given, _ = heard(swapped, **call)
    layer = swapped.model.layers[0].self_attn
    heads = softmax_heads(layer, given.pop("hidden_states"), **given)
    assert_close(layer.o_proj(heads.flatten(-2)), expected)


@torch.no_grad()
def test_packed_rows_with_a_softmax_cache_are_refused():
    ids, positions = packed()
    memory = model()(ids[:, :3], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="one document a row"):
        model()(ids, position_ids=positions, past_key_values=memory)
    with pytest.raises(ValueError, match="one document a row"):
        model()(ids, position_ids=positions, use_cache=True)
    assert model()(ids, position_ids=positions).past_key_values is None


@torch.no_grad()
def test_a_model_without_softmax_layers_builds_no_mask_however_long_the_batch(monkeypatch):
    """A [1, 1, 20000, 20000] mask alone would take 400 MB."""
    swapped, shapes = model(mixer="supra"), []
    layer = swapped.model.layers[0].self_attn
    layer.register_forward_hook(lambda *call: shapes.append(call[2]["attention_mask"].shape), with_kwargs=True)
    ids = torch.randint(3, 97, (1, 20_000))
    mask = torch.ones_like(ids)
    mask[:, :5] = 0
    swapped(ids, attention_mask=mask, logits_to_keep=1)
    assert shapes == [(1, 1, 0, 0)]


@pytest.mark.parametrize("mixer", ["softmax", "supra"])
def test_gradients_are_the_same_with_checkpointed_activations(mixer):
    ids, positions = packed()
    gradients = []
    for checkpointing in (False, True):
        swapped = model(mixer=mixer).train()
        prepare(swapped, stage_of(SPEC), SPEC.model_copy(update={"activation_checkpointing": checkpointing}))
        swapped(ids, position_ids=positions, objective=lambda hidden, head: head(hidden).square().mean()).backward()
        gradients.append({name: parameter.grad for name, parameter in swapped.named_parameters()})
    plain, checkpointed = gradients
    for name in plain:
        assert_close(checkpointed[name], plain[name])


@pytest.mark.parametrize("mixer", list(mixers))
def test_it_trains_under_bf16_autocast(mixer):
    swapped, (ids, positions) = model(mixer=mixer).train(), packed()
    with torch.autocast("cpu", torch.bfloat16):
        loss = swapped(ids, position_ids=positions, objective=lambda hidden, head: head(hidden).float().square().mean())
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in swapped.parameters())


def test_labels_give_the_loss_that_the_base_gives():
    swapped, (ids, _) = model(), packed()
    plain = LlamaForCausalLM(swapped.config.plain())
    plain.load_state_dict(swapped.state_dict())
    assert torch.equal(swapped(ids, labels=ids).loss, plain(ids, labels=ids).loss)


def test_a_config_holds_the_base_whole_and_comes_back_from_json(tmp_path):
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    base = tiny_config("llama", num_hidden_layers=2, rope_parameters=scaled)
    config = SupraConfig.from_base(base, mixer="t2r", options={"feature_size": 7}, layers=["t2r", "softmax"])
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, LlamaConfig)
    assert again.swap == config.swap == ("llama", "t2r", {"feature_size": 7}, ["t2r", "softmax"])
    assert again.plain().to_diff_dict() | {"architectures": None} == base.to_diff_dict() | {"architectures": None}


def test_a_model_can_be_built_on_the_meta_device():
    with torch.device("meta"):
        swapped = model(mixer="supra")
    assert {parameter.device.type for parameter in swapped.parameters()} == {"meta"}
    assert len(list(swapped.swapped_layers())) == 2


@pytest.mark.parametrize("layers", [["supra"], ["supra", "t2r"]])
def test_layers_must_name_a_kind_for_each(layers):
    with pytest.raises(ValueError, match="expected 2 layers"):
        SupraConfig.from_base(tiny_config("llama", num_hidden_layers=2), mixer="supra", layers=layers)


@pytest.mark.parametrize("mixer", ["gated_delta", "kda", "lolcats"])
@torch.no_grad()
def test_an_option_may_have_an_entry_for_each_layer(mixer, tmp_path):
    branch = {"branch": "gated_delta", "window": 4, "sinks": 1} if mixer == "lolcats" else {}
    model = tiny_model("llama", mixer, options={"key_width": (1, 2.5, 3)} | branch)
    rows = [memory.state.S.shape[2] for memory in model(tokens(1, 9), use_cache=True).past_key_values.layers]
    assert rows == [8, 20, 24]
    checkpoint.save(model, tmp_path / "saved", source=None, provenance={})
    assert torch.equal(checkpoint.load(tmp_path / "saved")(tokens(2, 9)).logits, model(tokens(2, 9)).logits)
    assert checkpoint.read_config(tmp_path / "saved").swap == model.config.swap


@torch.no_grad()
def test_layers_may_have_windows_of_their_own():
    model = tiny_model("llama", "window", options={"window": [2, 5, 3], "sinks": 0})
    kept = [memory.state.recent_k.shape[1] for memory in model(tokens(1, 9), use_cache=True).past_key_values.layers]
    assert kept == [1, 4, 2]


def test_an_option_for_each_layer_has_as_many_entries_as_there_are_layers():
    for widths in ((1, 2), (1, 2, 3, 4)):
        with pytest.raises(UsageError, match=f"key_width has {len(widths)} values, expected one, or .* 3 layers"):
            tiny_model("llama", "gated_delta", options={"key_width": widths})
    with pytest.raises(UsageError, match=r"mixer.key_width: input should be a valid number, got 'wide'"):
        tiny_model("llama", "gated_delta", options={"key_width": "wide"})
    with pytest.raises(UsageError, match=r"mixer.key_width.1: input should be a valid number, got 'x'"):
        tiny_model("llama", "gated_delta", options={"key_width": [1, "x", 3]})


def test_an_architecture_without_a_record_is_named():
    with pytest.raises(UsageError, match="unknown base architecture 'cohere'"):
        SupraConfig.from_base(AutoConfig.for_model("cohere"))


def test_positions_that_stretch_with_the_length_of_a_text_end_where_they_begin_to():
    """Tokens that were read would have to be read again at every further one."""
    stretched = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = tiny_model("llama", rope_parameters=stretched, max_position_embeddings=16)
    assert model(tokens(1, 16)).logits.isfinite().all()
    with pytest.raises(ValueError, match="the base has 16 positions, got 17"):
        model(tokens(1, 17))


def test_rows_that_would_change_each_other_s_positions_are_refused():
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0, 8.0, 16.0, 32.0], "original_max_position_embeddings": 16}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    model = tiny_model("phi3", rope_parameters=rope, original_max_position_embeddings=16, sliding_window=None)
    places = torch.cat([torch.arange(12), torch.arange(8)])[None]
    with pytest.raises(ValueError, match="more than 16 tokens, got rows of 20 with position_ids that restart"):
        model(tokens(1, 20), position_ids=places, use_cache=False)
    with pytest.raises(ValueError, match="more than 16 tokens, and 12 have been read; pass all 20 at once"):
        model(tokens(1, 8), past_key_values=model(tokens(1, 12), use_cache=True).past_key_values)
    apart = model(tokens(1, 16), position_ids=places[:, 4:], use_cache=False)
    assert apart.logits.isfinite().all()
