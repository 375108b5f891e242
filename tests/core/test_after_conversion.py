"""What people do next with a converted model, by the tools that they know: each works, or is refused in a sentence.

Everything starts from `model`, a directory and what `from_pretrained` takes for it: one that this package loads, and
its export, whose own code transformers runs.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import save_base, tokens
from torch.testing import assert_close
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
    pipeline,
)

from supra_cli.core import checkpoint
from supra_cli.core.export import export

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
IDS = tokens(2, 33)


@pytest.fixture(scope="module", params=["converted", "exported"])
def model(request, tmp_path_factory):
    """A converted model, softmax in its second layer, with a chat template; and the keywords that load it."""
    folder = tmp_path_factory.mktemp("models")
    text = "def read(self, size=-1):\n    return self.buffer[:size]\n" * 50
    base = save_base(folder / "base", [text], num_hidden_layers=3)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(base)
    student = checkpoint.convert(base, folder / "student", mixer="supra", options={}, keep="1", seed=0)
    if request.param == "converted":
        return student, {}
    return export(student, folder / "exported"), {"trust_remote_code": True}


def load(model, **changes):
    path, keywords = model
    return AutoModelForCausalLM.from_pretrained(path, **keywords, **changes)


@torch.no_grad()
def logits(network):
    return network.eval()(IDS).logits


def test_a_pipeline_chats_by_the_template(model):
    path, keywords = model
    chat = [{"role": "user", "content": "def read"}]
    write = pipeline("text-generation", model=str(path), **keywords)
    answer = write(chat, max_new_tokens=6, do_sample=False)[0]["generated_text"][-1]
    assert answer["role"] == "assistant"
    text = write.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "user: def read\n>"
    plain = write(text, max_new_tokens=6, do_sample=False, return_full_text=False, add_special_tokens=False)
    assert answer["content"] == plain[0]["generated_text"] != ""


def test_a_device_map_of_auto_changes_nothing(model):
    network = load(model, device_map="auto")
    assert {parameter.device.type for parameter in network.parameters()} <= {"cpu", "cuda"}
    assert_close(logits(network).cpu(), logits(load(model)), **CLOSE)


def test_torch_compile_changes_nothing(model):
    network = load(model)
    expected = logits(network)
    compiled = torch.compile(network, backend="aot_eager")
    assert_close(logits(compiled), expected, **CLOSE)
    ids, call = IDS[:, :9], {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    call["attention_mask"] = torch.ones_like(ids)
    assert torch.equal(compiled.generate(ids, **call), network.generate(ids, **call))


def test_gradient_checkpointing_changes_no_gradient(model):
    networks = [load(model).train(), load(model).train()]
    networks[1].gradient_checkpointing_enable()
    forwards = [0, 0]
    for index, network in enumerate(networks):
        layer = next(layer for _, layer in network.swapped_layers())
        layer.mixer.register_forward_hook(lambda *_, index=index: forwards.__setitem__(index, forwards[index] + 1))
        network(IDS, labels=IDS).loss.backward()
    assert forwards == [1, 2]  # the second pass is the backward's
    for ours, theirs in zip(*(network.parameters() for network in networks), strict=True):
        assert_close(ours.grad, theirs.grad, **CLOSE)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"], ids=["two of the base's", "all"])
def test_lora_trains_is_saved_merged_saved_and_loaded(model, targets, tmp_path):
    """What each mixer owes to adapters is a law, in tests/laws/test_adapters.py."""
    network = load(model)
    before = logits(network)
    adapted = get_peft_model(network, LoraConfig(task_type="CAUSAL_LM", target_modules=targets, r=4))
    assert_close(logits(adapted), before, **CLOSE)
    fit(adapted)
    after = logits(adapted)
    assert (after - before).abs().max() > 0.05
    adapted.save_pretrained(tmp_path / "adapter")
    assert_close(logits(PeftModel.from_pretrained(load(model), tmp_path / "adapter")), after, **CLOSE)
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", **model[1])), after, **CLOSE)


def fit(network):
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-2)
    network.train()
    for _ in range(2):
        network(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_the_trainer_trains_saves_goes_on_and_reloads(model, tmp_path):
    path, keywords = model
    rows = [{"input_ids": row, "labels": row} for row in IDS]

    def trainer(network, steps):
        arguments = TrainingArguments(
            output_dir=tmp_path / "run",
            max_steps=steps,
            save_steps=2,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            per_device_train_batch_size=2,
            gradient_checkpointing=True,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        return Trainer(network, arguments, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(path))

    network = load(model)
    before = logits(network)
    first = trainer(network, 2)
    first.train()
    first.save_model(tmp_path / "trained")
    after = logits(network)
    assert (after - before).abs().max() > 0.05
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained", **keywords)
    assert type(again).__name__ == type(network).__name__
    assert_close(logits(again), after, **CLOSE)
    resumed = trainer(load(model), 3)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3
    assert 0 < (logits(resumed.model) - after).abs().max() < (after - before).abs().max()


@torch.no_grad()
def test_a_model_without_a_head_gives_the_hidden_states_of_the_one_with_it(model):
    path, keywords = model
    headless = AutoModel.from_pretrained(path, **keywords).eval()
    hidden = headless(IDS).last_hidden_state
    assert torch.equal(hidden, load(model).eval()(IDS, output_hidden_states=True).hidden_states[-1])
    assert not any("lm_head" in name for name in headless.state_dict())


@pytest.mark.parametrize("fault", ["missing", "unexpected"])
def test_a_model_without_a_head_is_loaded_strictly(model, fault, tmp_path):
    """But for the head, which is in the directory and is not wanted."""
    path, keywords = model
    shutil.copytree(path, tmp_path, dirs_exist_ok=True)
    tensors = {}
    for shard in tmp_path.glob("*.safetensors*"):
        tensors |= load_file(shard) if shard.suffix == ".safetensors" else {}
        shard.unlink()
    name = "model.layers.0.self_attn.mixer.E.weight"
    if fault == "missing":
        del tensors[name]
    else:
        tensors[name.replace(".E.", ".F.")] = tensors[name].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(Exception, match=rf"{fault} keys .*layers\.0\.self_attn\.mixer\.[EF]\.weight"):
        AutoModel.from_pretrained(tmp_path, **keywords)


def test_torchao_loads_it_in_int8(model):
    """As torchao itself makes it of the loaded model, the mixers' linear maps among the rest."""
    network = load(model, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    quantised = load(model)
    head = quantised.get_output_embeddings()
    quantize_(quantised, Int8WeightOnlyConfig(), lambda part, _: isinstance(part, torch.nn.Linear) and part is not head)
    for _, layer in network.swapped_layers():
        assert type(layer.mixer.E.weight) is type(layer.q_proj.weight) is not torch.nn.Parameter
    assert_close(logits(network), logits(quantised), **CLOSE)
    assert (logits(network) - logits(load(model))).abs().max() > 1e-3
    call = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(network.generate(IDS, **call), quantised.generate(IDS, **call))


def test_what_is_saved_names_the_class_that_loads_it(model, tmp_path):
    load(model).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["SupraForCausalLM"]
