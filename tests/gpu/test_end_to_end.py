"""The bundled teacher's whole way on each device: convert, uptrain, stop, resume, evaluate, generate from every cache.

`make gpu` runs it before anything is measured; a CPU runs the same lines with fewer tokens.
"""

from __future__ import annotations

import json
import math
import threading
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from supra_cli.core import checkpoint, corpus, evaluate, generate, hub
from supra_cli.core import recipe as recipes
from supra_cli.core.data import rows
from supra_cli.core.errors import Stopped
from supra_cli.core.lookup import lookup
from supra_cli.core.train import loop
from supra_cli.core.train.events import Finished, Step

TEACHER = hub.BUNDLED["tiny"]
PROMPTS = ["def read(self, size=-1):\n", "import os", "class Error(Exception):\n    def __init__(self, message):\n"]
NEW = 16
STEPS = {"cpu": 2, "cuda": 12}
"""Of each stage."""
needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed (extra 'lowbit')")
needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")
OPTIMIZERS = ["adamw", "adamw-offload", pytest.param("adamw8bit", marks=needs_torchao)]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training and held-out documents, most of which are shorter than a row."""
    folder = tmp_path_factory.mktemp("texts")
    for split in ("train", "validation"):
        documents = [text[:400] for _, text in islice(corpus.documents(split), 60)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in documents if text.strip())
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUPRA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher with recurrent layers for every other of its own, as `convert` leaves it."""
    settings: dict[str, Any] = {"mixer": "supra", "options": {"gain": "head"}, "keep": "every:2", "seed": 0}
    return checkpoint.convert(TEACHER, tmp_path_factory.mktemp("models") / "student", base="tiny", **settings)


def recipe(texts: Path, optimizer: str, device: str) -> recipes.Recipe:
    """Three stages of `STEPS` steps of two micro-batches of packed rows."""
    length, rows = (64, 1) if device == "cpu" else (256, 8)
    batch = {"batch_tokens": 2 * rows * length, "micro_batch_tokens": rows * length, "warmup_steps": 1}
    stage = {"tokens": STEPS[device] * 2 * rows * length, **batch}
    rates = {"lr": 3e-4, "mixer_lr": 3e-3, "weight_decay": 0.1, "optimizer": optimizer}
    raw = {
        "base": "tiny",
        "mixer": {"name": "supra", "gain": "head"},
        "keep": "every:2",
        "data": {
            "seq_len": length,
            "sources": [{"path": str(texts / "train.jsonl")}],
            "validation": [{"path": str(texts / "validation.jsonl")}],
            "validation_tokens": 4 * length,
        },
        "checkpoint": {"every_steps": 100, "keep_last": 3},
        "stages": [{"kind": kind, **stage, **rates} for kind in ("transfer", "distill", "finetune")],
    }
    return recipes.validate(raw, lookup=lookup)


def uptrain(recipe: recipes.Recipe, output: Path, student: Path, device: str, *stops: int) -> list:
    """The events of a run on `device` in bf16 that is stopped after each of these steps and resumed."""
    dtype = torch.bfloat16 if device == "cpu" else None  # on a GPU by default
    events: list = []
    for number, stop_after in enumerate([*stops, None]):
        stop = threading.Event()
        run = loop.uptrain(recipe, output, model=student, device=device, dtype=dtype, resume=number > 0, stop=stop)
        try:
            for event in run:
                events.append(event)
                if isinstance(event, Step) and event.step == stop_after:
                    stop.set()
        except Stopped:
            assert stop_after is not None
    assert isinstance(events[-1], Finished)
    return events


def optimizer_state(run: Path) -> dict[str, Tensor]:
    return load_file(run / "last" / "training" / "optimizer.safetensors")


def assert_same_training(run: Path, whole: Path, device: str) -> None:
    """To the bit on a CPU. A GPU sums gradients in no fixed order, which bf16 makes large, but a run that had lost its
    moments would be off by their whole size and one that had lost its count by whole steps.
    """
    ours, wanted = optimizer_state(run), optimizer_state(whole)
    assert ours.keys() == wanted.keys()
    counts = [name for name in wanted if name.startswith("step.")]
    assert counts
    assert all(ours[name].equal(wanted[name]) for name in counts)
    if device == "cpu":
        assert all(ours[name].equal(value) for name, value in wanted.items())
        return
    sizes = [name for name in wanted if name.startswith("exp_avg.") or "/scale." in name]
    ours, wanted = (torch.cat([part[name].flatten().double() for name in sizes]) for part in (ours, wanted))
    assert (ours - wanted).norm() < 0.1 * wanted.norm()


@torch.no_grad()
def read_anew(model, tokenizer, prompt: str) -> list[int]:
    """The likeliest next tokens of a prompt alone, the whole text read again for each: no cache, no padding."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=model.device)
    length = ids.shape[1]
    for _ in range(NEW):
        ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    return ids[0, length:].tolist()


def as_on_a_cpu(path: Path, device: str) -> None:
    """In fp32 the cached, padded batch on `device` is each prompt read anew at every token on a CPU."""
    tokenizer = checkpoint.load_tokenizer(path)
    on_cpu = checkpoint.load(path, dtype=torch.float32)
    wanted = [read_anew(on_cpu, tokenizer, prompt) for prompt in PROMPTS]
    model = checkpoint.load(path, device=device, dtype=torch.float32)
    assert {parameter.device.type for parameter in model.parameters()} == {device}
    ids, mask = generate.encode(tokenizer, PROMPTS, device)
    assert mask is not None
    tokens = []
    logits, cache = generate.prefill(model, ids, mask, piece=7)
    position = mask.sum(-1)
    for _ in range(NEW):
        tokens.append(logits.argmax(-1))
        mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
        logits, cache = generate.decode(model, tokens[-1], position, mask, cache)
        position = position + 1
    assert torch.stack(tokens, dim=1).tolist() == wanted


def test_greedy_text_of_the_teacher_is_that_of_a_cpu(device: str) -> None:
    as_on_a_cpu(TEACHER, device)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_student_is_trained_stopped_resumed_evaluated_and_read(
    optimizer: str, device: str, student: Path, texts: Path, tmp_path: Path
) -> None:
    """Through transfer, distill and finetune, stopped within the first, the second and the third."""
    plan = recipe(texts, optimizer, device)
    whole = uptrain(plan, tmp_path / "whole", student, device)
    events = uptrain(plan, tmp_path / "run", student, device, *(stage * STEPS[device] + 1 for stage in range(3)))
    taken = [event for event in events if isinstance(event, Step)]
    assert [step.step for step in taken] == list(range(1, 3 * STEPS[device] + 1))
    assert all(math.isfinite(step.loss) and math.isfinite(step.grad_norm) for step in taken)
    trained = (tmp_path / "run" / "last").resolve()
    checkpoint.verify(trained)
    record = json.loads((trained / "training" / "state.json").read_text(encoding="utf-8"))
    assert record["same"]["dtype"] == "bfloat16"
    assert_same_training(tmp_path / "run", tmp_path / "whole", device)
    assert events[-1].loss == pytest.approx(whole[-1].loss, rel=1e-6 if device == "cpu" else 1e-2)

    held_out = rows.held_out(plan.data, checkpoint.load_tokenizer(trained))
    assert ((held_out.position_ids == 0).sum(1) > 1).any(), "the test wants packed rows"
    before, after, on_cpu = (
        evaluate.perplexity(checkpoint.load(path, device=place, dtype=torch.float32), *held_out).nats
        for path, place in ((student, device), (trained, device), (trained, "cpu"))
    )
    assert after == pytest.approx(on_cpu, rel=1e-4)
    assert events[-1].loss == pytest.approx(after, rel=2e-2)  # of bf16 passes
    assert after < before
    as_on_a_cpu(trained, device)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static", "offloaded"])
def test_every_cache_carries_recurrent_and_kept_layers(kind: str, device: str, student: Path) -> None:
    """Of a padded batch, by transformers' own `generate`, which would compile the step of a static cache on a GPU."""
    if kind == "offloaded" and device == "cpu":
        pytest.skip("an offloaded cache needs an accelerator; tests/laws/test_caches.py simulates one")
    tokenizer = checkpoint.load_tokenizer(student)
    model = checkpoint.load(student, device=device, dtype=torch.float32)
    wanted = [read_anew(model, tokenizer, prompt) for prompt in PROMPTS]
    ids, mask = generate.encode(tokenizer, PROMPTS, device)
    call = {"do_sample": False, "eos_token_id": None, "max_new_tokens": NEW, "attention_mask": mask}
    implementation = {} if kind == "dynamic" else {"cache_implementation": kind}
    text = model.generate(ids, **implementation, **call)
    assert text[:, ids.shape[1] :].tolist() == wanted
    assert getattr(model, "_compiled_call", None) is None


@needs_lm_eval
def test_a_student_is_scored_beside_its_teacher(device: str, student: Path) -> None:
    def subject(path: Path, place: str) -> evaluate.Subject:
        def load() -> tuple:
            return checkpoint.load(path, device=place, dtype=torch.float32), checkpoint.load_tokenizer(path)

        return evaluate.Subject(path.name, path, load, device=place)

    tasks, settings = evaluate.find(["stdlib_ppl"]), evaluate.Settings(limit=4, max_length=256, batch_size=4)
    nats = {
        place: evaluate.evaluate(subject(student, place), subject(TEACHER, place), tasks, settings)["results"]
        for place in {device, "cpu"}
    }
    ours, on_cpu = (nats[place]["stdlib_ppl"]["nats_per_token"] for place in (device, "cpu"))
    assert 0 < ours["teacher"] < ours["student"]
    for name in ("teacher", "student"):
        assert ours[name] == pytest.approx(on_cpu[name], rel=1e-4)
