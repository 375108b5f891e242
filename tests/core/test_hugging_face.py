"""What users of transformers do with a model besides calling it: read its config, pickle it, hand it to a pipeline."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from tiny import save_base, tiny_model, tokens
from transformers import CompileConfig, LlamaForCausalLM

from supra_cli.core import checkpoint
from supra_cli.core.archs import archs
from supra_cli.core.modeling import SupraForCausalLM, SupraModel


def python(program: str, *arguments: object) -> str:
    """What a fresh interpreter prints, which knows of supra what the program imports."""
    done = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A converted model on disk with its tokenizer, softmax in its second layer."""
    folder = tmp_path_factory.mktemp("models")
    text = "def read(self, size=-1):\n    return self.buffer[:size]\n" * 50
    base = save_base(folder / "base", [text], num_hidden_layers=3)
    return checkpoint.convert(base, folder / "student", mixer="supra", options={}, keep="1", seed=0)


def test_the_auto_config_alone_knows_the_model(student):
    program = """
import sys, supra_cli
from transformers import AutoConfig
config = AutoConfig.from_pretrained(sys.argv[1])
print(type(config).__name__, config.swap.mixer)
"""
    assert python(program, student).split() == ["SupraLlamaConfig", "supra"]


def test_the_auto_tokenizer_and_a_pipeline_take_the_directory(student):
    program = """
import sys, supra_cli
from transformers import AutoTokenizer, pipeline
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
write = pipeline("text-generation", model=sys.argv[1])
print(len(tokenizer), type(write.model).__name__, len(write("def read", max_new_tokens=4, do_sample=False)))
"""
    words = python(program, student).split()
    assert words[1:] == ["SupraLlamaForCausalLM", "1"]


@torch.no_grad()
@pytest.mark.parametrize("kind", [SupraForCausalLM, SupraModel])
def test_our_classes_are_told_where_a_model_is_as_transformers_own(student, kind):
    found = kind.from_pretrained(pretrained_model_name_or_path=student.parent, subfolder=student.name)
    ids = tokens(1, 9)
    assert torch.equal(found(ids)[0], kind.from_pretrained(student)(ids)[0])


@torch.no_grad()
@pytest.mark.parametrize("base", list(archs))
def test_configs_and_models_are_pickled_and_copied(base):
    torch.manual_seed(0)
    model, ids = tiny_model(base, "gated", "1"), tokens(2, 9)
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(again(ids).logits, model(ids).logits)
    config = pickle.loads(pickle.dumps(model.config))
    assert type(config) is type(model.config)
    assert config.to_dict() == model.config.to_dict()


@torch.no_grad()
def test_another_process_reads_a_pickled_model(tmp_path):
    """As workers, Ray and `torch.load` do: nothing but the pickle tells it what to import, so each base's is read by a
    process that has read no other.
    """
    torch.manual_seed(0)
    files = {tmp_path / f"{base}.pt": tiny_model(base, "supra", "1") for base in archs}
    for file, model in files.items():
        ids = tokens(2, 9)
        torch.save({"model": model, "config": model.config, "ids": ids, "logits": model(ids).logits}, file)
    program = """
import os, sys, torch
from transformers import AutoModelForCausalLM, GenerationMixin, LlamaForCausalLM  # the slow part of what is imported
for file in sys.argv[1:]:
    if not os.fork():
        assert "supra_cli" not in sys.modules
        found = torch.load(file, weights_only=False)
        with torch.no_grad():
            torch.testing.assert_close(found["model"](found["ids"]).logits, found["logits"])
        print(type(found["config"]).__name__, flush=True)
        os._exit(0)
    if os.wait()[1]:
        sys.exit(file)
"""
    assert python(program, *files).split() == [type(model.config).__name__ for model in files.values()]


@torch.no_grad()
@pytest.mark.parametrize("kept", [None, "none", "1"], ids=["softmax", "none kept", "one kept"])
def test_generate_compiles_no_step_that_counts_its_tokens(kept, monkeypatch):
    """As transformers does by itself with a static cache on a GPU, and here because it is told to on all devices."""
    if kept is None:
        model = LlamaForCausalLM(tiny_model().config.plain()).eval()
    else:
        model = tiny_model("llama", "supra", kept)
    asked = []
    monkeypatch.setattr(model, "get_compiled_call", lambda config: asked.append(config) or model.__call__)
    config = CompileConfig()
    config._compile_all_devices = True
    ids = tokens(2, 9)
    call = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "eos_token_id": None, "do_sample": False}
    text = model.generate(ids, cache_implementation="static", compile_config=config, **call)
    assert bool(asked) == (kept is None)
    assert torch.equal(text, model.generate(ids, **call))
