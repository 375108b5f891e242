"""What `supra export` writes loads where there is nothing but torch and transformers, and computes the same bits."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import tomli_w
import torch
import yaml
from tiny import save_base
from transformers import AutoModelForCausalLM, AutoTokenizer

from supra_cli.core import checkpoint
from supra_cli.core.archs import archs
from supra_cli.core.checkpoint.slices import write_shards
from supra_cli.core.errors import UsageError
from supra_cli.core.export import export
from supra_cli.core.mixers import mixers

ON_CPU = ("--device", "cpu", "--dtype", "float32", "--teacher", "none")
TEXT = "def read(self, size=-1):\n    return self.buffer[:size]\n" * 50
MODELS = [(base, "supra") for base in archs] + [
    ("llama", mixer) for mixer in mixers if mixer not in ("supra", "softmax")
]
ALONE = """
import sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("supra_cli", "supra_kernels", "pydantic", "tomli_w"):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)

sys.meta_path.insert(0, Nothing())
"""
IMPORTS = """
import sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
"""


def alone(code: str, folder: Path, *arguments: object, begin: str = ALONE) -> subprocess.CompletedProcess:
    """`code` in a process that can import neither this package nor what it asks for beside transformers."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", begin + IMPORTS + code, *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280, stdin=subprocess.DEVNULL
    )


def converted(folder: Path, base: str = "llama", mixer: str = "supra", keep: str = "1") -> Path:
    plain = save_base(folder / "base", [TEXT], base)
    # As a list, in a config's words, of which the one for a kept layer is not used.
    options = {"key_width": [2, 1, 1.5]} if mixer == "gated_delta" else {}
    settings = {"mixer": mixer, "options": options, "keep": keep, "seed": 0}
    return checkpoint.convert(plain, folder / "student", base="org/base@0123abc", **settings)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def exported(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(student, tmp_path_factory.mktemp("exported") / "model")


@torch.no_grad()
def test_logits_and_text_are_the_same_bits_without_this_package(tmp_path):
    """Of every base with one mixer, and of every mixer on one base; padded, packed rows and text in pieces too. And in
    bf16, and of weights in bf16 in the format that `supra generate` takes on a CPU.
    """
    places = [tmp_path / f"{base}-{mixer}" for base, mixer in MODELS]
    narrow = {tmp_path / "bf16": {}, tmp_path / "bf16 in fp32": {"dtype": torch.float32}}
    ids = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    given = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 8}
    for place, (base, mixer) in zip(places, MODELS, strict=True):
        export(converted(place, base, mixer), place / "exported")
        model = checkpoint.load(place / "student")
        found = model(ids, attention_mask=mask).logits, model.generate(ids, attention_mask=mask, **given)
        torch.save({"ids": ids, "mask": mask, "given": given, "wanted": found, "call": {}}, place / "wanted.pt")
    for place, call in narrow.items():
        export(converted(place), place / "exported", dtype=torch.bfloat16)
        model = checkpoint.load(place / "exported", **call)
        found = model(ids, attention_mask=mask).logits, model.generate(ids, attention_mask=mask, **given)
        torch.save({"ids": ids, "mask": mask, "given": given, "wanted": found, "call": call}, place / "wanted.pt")
    places += narrow
    done = alone(
        """
for place in sys.argv[1:]:
    kept = torch.load(f"{place}/wanted.pt")
    model = AutoModelForCausalLM.from_pretrained(f"{place}/exported", trust_remote_code=True, **kept["call"]).eval()
    with torch.no_grad():
        logits = model(kept["ids"], attention_mask=kept["mask"]).logits
        text = model.generate(kept["ids"], attention_mask=kept["mask"], **kept["given"])
    same = all(map(torch.equal, (logits, text), kept["wanted"]))
    print(type(model).__module__.partition(".")[0], same, place)
""",
        tmp_path,
        *places,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [f"transformers_modules True {place}" for place in places]


def test_what_was_loaded_is_saved_with_its_code(exported, tmp_path):
    done = alone(
        """
import pickle
first = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
first.save_pretrained(sys.argv[2])
again = AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True)
ids = torch.arange(3, 30)[None]
print(torch.equal(first(ids).logits, again(ids).logits))
print(torch.equal(first(ids).logits, pickle.loads(pickle.dumps(first))(ids).logits))
""",
        tmp_path,
        exported,
        tmp_path / "again",
    )
    assert done.stdout.split() == ["True", "True"], done.stderr[-3000:]


def test_two_exports_live_in_one_process(exported, student, tmp_path):
    other = export(student, tmp_path / "other", dtype=torch.bfloat16)
    done = alone(
        """
models = [AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True) for path in sys.argv[1:]]
ids = torch.arange(3, 40)[None]
for model in models:
    model.train()(ids, labels=ids).loss.backward()
print([str(model.dtype) for model in models])
""",
        tmp_path,
        exported,
        other,
    )
    assert done.stdout.strip() == "['torch.float32', 'torch.bfloat16']", done.stderr[-3000:]


@pytest.mark.parametrize(("base", "named"), [("olmo2", {"tokenizer_class": "GPT2Tokenizer"}), ("gpt2", {})])
def test_the_tokenizer_is_the_one_that_transformers_makes_for_the_base(base, named, tmp_path):
    """Of the base's type for OLMo 2, whatever is named, and for GPT-2, where nothing is."""
    plain = save_base(tmp_path / "base", [TEXT], base)
    described = json.dumps({"model_max_length": 1024, **named})
    (plain / "tokenizer_config.json").write_text(described)
    theirs = AutoTokenizer.from_pretrained(plain)
    student = checkpoint.convert(plain, tmp_path / "student", mixer="supra", options={}, keep="1", seed=0)
    saved = checkpoint.save(checkpoint.load(student), tmp_path / "saved", source=plain, provenance={})
    for folder in (student, saved, export(saved, tmp_path / "exported")):
        for ours in (AutoTokenizer.from_pretrained(folder), checkpoint.load_tokenizer(folder)):
            assert type(ours) is type(theirs)
            assert ours(TEXT)["input_ids"] == theirs(TEXT)["input_ids"]
            assert (ours.special_tokens_map, ours.model_max_length) == (theirs.special_tokens_map, 1024)
    assert (plain / "tokenizer_config.json").read_text() == described


def test_a_model_without_a_tokenizer_is_exported_with_a_warning(student, tmp_path, caplog):
    bare = checkpoint.save(checkpoint.load(student), tmp_path / "bare", source=None, provenance={})
    out = export(bare, tmp_path / "out")
    assert f"{bare} has no tokenizer" in caplog.text
    assert not list(out.glob("tokenizer*"))


def test_it_runs_nothing_of_this_package_where_that_is_installed(exported, tmp_path):
    done = alone(
        """
from importlib.util import find_spec
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
model(torch.arange(3, 40)[None])
print("supra_cli" in sys.modules, find_spec("supra_cli") is not None)
""",
        tmp_path,
        exported,
        begin="",
    )
    assert done.stdout.split() == ["False", "True"], done.stderr[-3000:]


def test_what_this_package_loads_of_an_export_and_saves_is_a_model_without_code(exported, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    model.save_pretrained(tmp_path / "tuned")
    assert "auto_map" not in json.loads((tmp_path / "tuned" / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", trust_remote_code=True)
    ids = torch.arange(3, 40)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_it_is_refused_without_trust(exported, tmp_path):
    done = alone("AutoModelForCausalLM.from_pretrained(sys.argv[1])", tmp_path, exported)
    assert done.returncode != 0
    assert "trust_remote_code" in done.stderr.splitlines()[-1]


def test_an_exported_model_says_once_what_computes_on_a_gpu(exported, tmp_path):
    done = alone(
        """
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ops = sys.modules[type(model).__module__.rpartition(".")[0] + ".supra_ops"]


class OnAGPU(torch.Tensor):
    device = torch.device("cuda:0")


def computed(q, *given, form, **named):
    return form, q.device.type


ops.supra_kernels.linear_attention, ops.supra_kernels.default_form = computed, lambda q, segment: form
ops.supra_kernels.operand_dtype = lambda q, form: q.dtype
q = torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16)
for form in ("triton", "triton", "chunk", "chunk"):
    assert ops.linear_attention(q.as_subclass(OnAGPU), q, q) == (form, "cuda")
    ops.linear_attention(q.float(), q, q)
""",
        tmp_path,
        exported,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("linear attention: triton on cuda in bfloat16") == 1
    assert done.stderr.count("linear attention runs in PyTorch's operations, several times slower") == 1
    assert "on cpu" not in done.stderr


def test_this_package_reads_an_export_as_a_model_of_its_own(exported, student):
    ids = torch.arange(3, 40)[None]
    assert torch.equal(checkpoint.load(exported)(ids).logits, checkpoint.load(student)(ids).logits)
    assert not (exported / "supra.json").exists()


def test_lm_eval_gives_the_scores_of_supra_eval(supra, exported, student, tmp_path, monkeypatch):
    """Of choices and of a perplexity, by `--model hf` from the directory alone."""
    monkeypatch.setenv("SUPRA_CACHE", str(tmp_path / "cache"))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    lines = [{"ask": f"def f{n}(self):", "choices": [" return", " pass", " size"], "gold": n % 3} for n in range(12)]
    (tasks / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tasks / 'lines.jsonl'}}}}}\ntest_split: test\n"
    (tasks / "choose.yaml").write_text(
        f"task: choose\n{data}output_type: multiple_choice\ndoc_to_text: ask\ndoc_to_choice: choices\n"
        "doc_to_target: gold\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    (tasks / "roll.yaml").write_text(
        f"task: roll\n{data}output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: ask\n"
        "metric_list: [{metric: byte_perplexity}]\n"
    )
    result = supra("eval", student, "--tasks", "choose,roll", "--include-path", tasks, *ON_CPU, "--json")
    assert result.code == 0, result.err
    ours = json.loads(result.out)["results"]
    done = alone(
        """
import json, lm_eval
from lm_eval.tasks import TaskManager
found = lm_eval.simple_evaluate(
    model="hf", model_args=f"pretrained={sys.argv[1]},trust_remote_code=True,dtype=float32", tasks=["choose", "roll"],
    task_manager=TaskManager(include_path=sys.argv[2], include_defaults=False), device="cpu", bootstrap_iters=0,
)
print(json.dumps({name: found["results"][name] for name in ("choose", "roll")}))
""",
        tmp_path,
        exported,
        tasks,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads(done.stdout.splitlines()[-1])
    for task, metric in (("choose", "acc"), ("choose", "acc_norm"), ("roll", "byte_perplexity")):
        mine = ours[task][metric]["student"]
        assert mine == pytest.approx(theirs[task][f"{metric},none"], rel=1e-6)


def card(path: Path) -> tuple[dict, str]:
    _, head, body = (path / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_card_says_what_the_model_is(exported):
    head, body = card(exported)
    assert (head["base_model"], head["library_name"], "license" in head) == ("org/base", "transformers", False)
    assert "mixer: supra" in body
    assert "1 of them softmax attention still (1)" in body


def test_the_card_of_a_run_has_its_recipe_its_scores_and_the_licence_of_its_base(supra, tmp_path, monkeypatch):
    """And says nothing of this machine's folders."""
    monkeypatch.setenv("SUPRA_CACHE", str(tmp_path / "cache"))
    base = save_base(tmp_path / "base", [TEXT])
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: mine\n---\n# Base\n")
    (base / "LICENSE").write_text("Do as you like.\n")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    recipe = {
        "base": str(base),
        "data": {"seq_len": 32, "sources": [{"path": str(tmp_path / "text.txt")}]},
        "stages": [{"kind": "finetune", "tokens": 128, "batch_tokens": 64, "lr": 1e-3}],
    }
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(recipe), encoding="utf-8")
    for verb in (
        ("uptrain", "-r", "recipe.toml", "-o", "run", "--device", "cpu"),
        ("eval", "run", "--tasks", "stdlib_ppl,repeats", "--lengths", "0", "--limit", "2", "--device", "cpu"),
        ("export", "run", "-o", "out"),
    ):
        result = supra(*verb)
        assert result.code == 0, result.err
    head, body = card(tmp_path / "out")
    assert (head["license"], head["license_name"], "base_model" in head) == ("other", "mine", False)
    assert (tmp_path / "out" / "LICENSE").read_text() == "Do as you like.\n"
    assert "uptraining: 128 tokens" in body
    figure = r"[\d.]+ ± [\d.]+"
    assert "| task | metric | n-shot | questions | this model | its teacher |" in body
    assert re.search(rf"\| stdlib_ppl \| nats_per_token \| 0 \| 2 \| {figure} \| {figure} \|", body)
    assert "| measure | of | n | this model | its teacher | untrained window | before training |" in body
    assert re.search(r"\| repeats \| random, gap 0 \| 2 \|( [\d.]+ \[[\d.]+, [\d.]+\] \|){4}", body)
    assert 'path = "text.txt"' in body
    assert "Taken before" not in body
    for model, output, dtype in (("run", "same", "float32"), ("run", "narrow", "bf16"), ("out", "again", "bf16")):
        assert supra("export", model, "-o", output, "--dtype", dtype).code == 0
        said = card(tmp_path / output)[1]
        assert ("## Scores\n\nTaken before the weights were written in bfloat16.\n" in said) == (dtype == "bf16")
        assert re.search(rf"\| {figure} \| {figure} \|", said)
    assert str(tmp_path) not in "".join(file.read_text("utf-8") for file in (tmp_path / "out").glob("*.[pmj][yds]*"))


HALVED = """
from .words import FACTOR
from supra_cli.core.mixers import mixers
from supra_cli.core.mixers.retention import Retention


{decorator}
class Halved(Retention):
    def forward(self, *call):
        o, state = super().forward(*call)
        return FACTOR * o, state
"""


@pytest.fixture
def house(tmp_path, monkeypatch) -> Iterator[Path]:
    """Another package with a mixer `halved`, which registers itself or, by an entry point, does not."""
    package = tmp_path / "house"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "words.py").write_text("import math\n\nFACTOR = math.sqrt(0.25)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(mixers, "_objects", {**mixers._objects})
    yield package
    for name in ("house", "house.words", "house.halved"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("entry_point", [False, True], ids=["registers itself", "by an entry point"])
def test_a_mixer_of_another_package_comes_along(house, entry_point, tmp_path, monkeypatch):
    (house / "halved.py").write_text(HALVED.format(decorator="" if entry_point else "@mixers.register('halved')"))
    module = import_module("house.halved")
    if entry_point:
        monkeypatch.setitem(mixers._objects, "halved", module.Halved)
        monkeypatch.setitem(mixers._origins, "halved", "house.halved")
    export(student := converted(tmp_path, mixer="halved"), tmp_path / "out")
    ids = torch.arange(3, 40)[None]
    torch.save(checkpoint.load(student)(ids).logits, tmp_path / "wanted.pt")
    done = alone(
        """
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(torch.equal(model(torch.arange(3, 40)[None]).logits, torch.load(sys.argv[2])), "house" in sys.modules)
""",
        tmp_path,
        tmp_path / "out",
        tmp_path / "wanted.pt",
    )
    assert done.stdout.split() == ["True", "False"], done.stderr[-3000:]
    for line, said in (
        ("import os, einops", "house.words imports einops"),
        ("import house.words", "write `from house import words`"),
    ):
        (house / "words.py").write_text(f"{line}\n")
        with pytest.raises(UsageError, match=said):
            export(student, tmp_path / "other")
        assert not (tmp_path / "other").exists()


def test_a_large_export_has_several_shards_in_whatever_format(student, tmp_path, monkeypatch):
    """Which are counted in the format that is written: a wider one needs more of them."""
    narrow = export(student, tmp_path / "narrow", dtype=torch.bfloat16)
    size = (narrow / "model.safetensors").stat().st_size
    monkeypatch.setattr("supra_cli.core.export.write_shards", partial(write_shards, limit=size + size // 4))
    wide = export(narrow, tmp_path / "wide", dtype=torch.float32)
    assert len(list(wide.glob("*.safetensors"))) > 1
    ids = torch.arange(3, 40)[None]
    wanted = checkpoint.load(narrow, dtype=torch.float32)(ids).logits
    assert torch.equal(checkpoint.load(wide)(ids).logits, wanted)


def test_what_others_have_saved_is_exported_too(student, tmp_path):
    """It has no record; and a card of its base that makes no sense says nothing."""
    checkpoint.load(student).save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(student).save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "README.md").write_text("---\nlicense: a: b\n---\n")
    head, body = card(export(tmp_path / "saved", tmp_path / "mine"))
    assert "license" not in head
    assert "# mine\n" in body
    assert "uptraining" not in body
    assert "auto_map" not in checkpoint.read_config(tmp_path / "mine").to_dict()


def test_what_cannot_be_exported_is_said_in_a_sentence(supra, base, student, tmp_path):
    model = checkpoint.load(student)
    damaged = checkpoint.save(model, tmp_path / "damaged", source=student, provenance={})
    content = bytearray((damaged / "model-mixers.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "model-mixers.safetensors").write_bytes(content)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "letter.txt").touch()
    for model, output, code, said in (
        (base, "out", 2, "has no recurrent layer"),
        (damaged, "out", 1, "hash differs"),
        (tmp_path / "nowhere", "out", 3, "nowhere"),
        (student, tmp_path / "used", 2, "is not empty"),
        (student, student.parent, 2, "choose another output"),
    ):
        result = supra("export", model, "-o", output)
        assert (result.code, said in result.error) == (code, True), result.err
        assert not (tmp_path / "out").exists()
    assert supra("export", student, "-o", "out", "--dtype", "int4").code == 2


def test_weights_have_the_dtype_that_is_asked_for(supra, student, tmp_path):
    assert supra("export", student, "-o", "out", "--dtype", "bf16").code == 0
    assert checkpoint.load(tmp_path / "out").dtype == torch.bfloat16
    wanted = checkpoint.load_tokenizer(student)(TEXT)["input_ids"]
    assert AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)(TEXT)["input_ids"] == wanted


def test_an_export_that_is_exported_again_keeps_its_card(exported, tmp_path):
    again = export(exported, tmp_path / "again", dtype=torch.bfloat16)
    assert (again / "README.md").read_text() == (exported / "README.md").read_text()
