"""What the loop does with its numbers: sums, refusals, links, logs."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from supra_cli.core import checkpoint
from supra_cli.core import recipe as recipes
from supra_cli.core.data import packing, rows
from supra_cli.core.errors import NotFoundError, SupraError, UsageError
from supra_cli.core.evaluate import perplexity
from supra_cli.core.lookup import lookup
from supra_cli.core.parallel import World
from supra_cli.core.stages import stages
from supra_cli.core.swap import mixer_names
from supra_cli.core.train import loop
from supra_cli.core.train.build import build, prepare
from supra_cli.core.train.events import Finished, Note, Saved, Step, Validated
from supra_cli.core.train.held_out import held_out_loss
from supra_cli.core.train.optimizer import adamw
from supra_cli.core.train.step import Computing, take

Write = Callable[..., Path]


def run(recipe: Path, output: Path, **settings) -> list:
    return list(loop.uptrain(recipes.load(recipe, lookup=lookup), output, **settings))


def steps(events: list) -> list[Step]:
    return [event for event in events if isinstance(event, Step)]


def one_stage(kind: str = "finetune", **settings) -> list[dict]:
    return [{"kind": kind, "tokens": 256, "batch_tokens": 64, "lr": 1e-3, **settings}]


def test_micro_batches_of_any_size_are_one_step(device: str, recipe_file: Write, tmp_path: Path) -> None:
    taken = []
    for micro in (128, 64, 32):
        recipe = recipe_file(stages=one_stage(batch_tokens=128, micro_batch_tokens=micro))
        run(recipe, tmp_path / str(micro), device=device, dtype=torch.float32)
        taken.append(load_file(tmp_path / str(micro) / "last" / "model-mixers.safetensors"))
    for other in taken[1:]:
        for name, value in taken[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-6)


def test_every_stage_lowers_its_own_loss(device: str, recipe_file: Write, raw_recipe: dict, tmp_path: Path) -> None:
    longer = [stage | {"tokens": 3200, "lr": 3e-3, "mixer_lr": 1e-2} for stage in raw_recipe["stages"]]
    events = steps(run(recipe_file(stages=longer), tmp_path / "run", device=device))
    for number in range(3):
        losses = [event.loss for event in events if event.stage == number]
        assert sum(losses[-10:]) < sum(losses[:10]), number


def test_transfer_leaves_the_base_as_it_was(recipe_file: Write, base: Path, tmp_path: Path) -> None:
    run(recipe_file(stages=one_stage("transfer")), tmp_path / "run")
    before, after = load_file(base / "model.safetensors"), {}
    for file in (tmp_path / "run" / "last").glob("*.safetensors"):
        after |= load_file(file)
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("more", "linked"),
    [({}, True), ({"train": "mixer"}, True), ({"train": "all"}, False), ({"train": "mixer", "untie": True}, False)],
)
def test_a_base_that_did_not_move_is_linked(more: dict, linked: bool, recipe_file: Write, tmp_path: Path) -> None:
    """In bf16 checkpoints too: the base's own shards are exact, whatever their dtype. The whole run resumes from it."""
    stages = one_stage("transfer", tokens=64) + (one_stage("finetune", tokens=64, **more) if more else [])
    settings = {"stages": stages, "checkpoint": {"every_steps": 1, "keep_last": 2, "dtype": "bfloat16"}}
    run(recipe_file(**settings), tmp_path / "run")
    shard = "model-base.safetensors"
    base = tmp_path / "run" / "converted" / shard
    assert (tmp_path / "run" / "step-000001" / shard).samefile(base)
    assert (tmp_path / "run" / "last" / shard).samefile(base) == linked
    masters = load_file(tmp_path / "run" / "last" / "training" / "masters.safetensors")
    assert all(".mixer." in name for name in masters) == linked
    checkpoint.verify(tmp_path / "run" / "last")


def test_a_base_that_was_converted_anew_is_not_linked(recipe_file: Write, base: Path, tmp_path: Path) -> None:
    """`--model` names a folder that others may write to while the run goes on."""
    settings = {"mixer": "supra", "options": {}, "keep": "none", "seed": 0}
    folder = checkpoint.convert(base, tmp_path / "student", **settings)
    recipe = recipes.load(recipe_file(stages=one_stage("transfer")), lookup=lookup)
    events = loop.uptrain(recipe, tmp_path / "run", model=folder)
    next(event for event in events if isinstance(event, Step))
    model = checkpoint.load(base)
    before = model.get_input_embeddings().weight.detach().clone()
    model.get_input_embeddings().weight.data.zero_()
    checkpoint.save(model, tmp_path / "other", source=base, provenance={})
    checkpoint.convert(tmp_path / "other", folder, **settings, overwrite=True)
    assert isinstance(list(events)[-1], Finished)
    assert torch.equal(checkpoint.load(tmp_path / "run" / "last").get_input_embeddings().weight, before)


def damage_shard(file: Path) -> None:
    """A shorter file in its place; the bytes of the old one are the base's too."""
    short = file.read_bytes()[:-4]
    file.unlink()
    file.write_bytes(short)


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: (folder / "model-base.safetensors").unlink(),
        lambda folder: damage_shard(folder / "model-base.safetensors"),
        lambda folder: (folder / "model.safetensors.index.json").unlink(),
        lambda folder: (folder / "supra.json").write_text("{"),
        lambda folder: shutil.rmtree(folder),
    ],
    ids=["a shard is gone", "a shard is cut", "the index is gone", "the record is damaged", "all is gone"],
)
def test_a_converted_model_that_is_no_longer_whole_is_not_linked(
    harm: Callable[[Path], object], recipe_file: Write, tmp_path: Path
) -> None:
    recipe = recipe_file(stages=one_stage("transfer"), checkpoint={"every_steps": 1, "keep_last": 4})
    run(recipe, tmp_path / "whole")
    events = loop.uptrain(recipes.load(recipe, lookup=lookup), tmp_path / "run")
    next(event for event in events if isinstance(event, Saved))
    harm(tmp_path / "run" / "converted")
    assert isinstance(list(events)[-1], Finished)
    checkpoint.verify(tmp_path / "run" / "last")
    ours, wanted = (checkpoint.load(tmp_path / name / "last").state_dict() for name in ("run", "whole"))
    assert all(value.equal(wanted[name]) for name, value in ours.items())


def test_held_out_losses_are_those_of_the_models(device: str, recipe_file: Write, base: Path, tmp_path: Path) -> None:
    """Recomputed row by row on the saved model, and on the base through transformers alone."""
    from transformers import LlamaForCausalLM

    recipe = recipes.load(recipe_file(), lookup=lookup)
    events = loop.uptrain(recipe, tmp_path / "run", device=device, dtype=torch.float32)
    last = [event for event in events if isinstance(event, Validated)][-1]
    held_out = rows.held_out(recipe.data, checkpoint.load_tokenizer(base))
    models = checkpoint.load((tmp_path / "run" / "last").resolve()), LlamaForCausalLM.from_pretrained(base)
    for model, told in zip(models, (last.loss, last.teacher), strict=True):
        total = count = 0.0
        for ids, positions, labels in zip(*held_out, strict=True):
            starts = [*(positions == 0).nonzero()[:, 0].tolist(), len(ids)]
            for start, end in itertools.pairwise(starts):
                logits = model(ids[None, start:end]).logits[0].double()
                wanted = labels[start:end]
                losses = nn.functional.cross_entropy(logits, wanted, ignore_index=packing.IGNORED, reduction="sum")
                total, count = total + losses.item(), count + (wanted != packing.IGNORED).sum().item()
        assert told == pytest.approx(total / count, rel=1e-5)


def test_held_out_losses_during_a_transfer_are_the_students(device: str, recipe_file: Write, tmp_path: Path) -> None:
    """Not those of the softmax path, which answers for every layer while the loss is taken."""
    recipe = recipes.load(recipe_file(stages=one_stage("transfer")), lookup=lookup)
    events = loop.uptrain(recipe, tmp_path / "run", device=device, dtype=torch.float32)
    last = [event for event in events if isinstance(event, Validated)][-1]
    saved = (tmp_path / "run" / "last").resolve()
    held_out = rows.held_out(recipe.data, checkpoint.load_tokenizer(saved))
    close = 1e-6 if device == "cpu" else 1e-5
    assert last.loss == pytest.approx(perplexity(checkpoint.load(saved), *held_out).nats, rel=close)
    assert abs(last.loss - last.teacher) > 1e-4


def test_a_new_run_clears_the_old_one_only_when_it_can_start(recipe_file: Write, base: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run(recipe_file(stages=one_stage()), output)
    before = sorted(output.rglob("*"))
    with pytest.raises(NotFoundError):
        run(recipe_file(base="no-such-model"), output, overwrite=True)
    for model in (output / "converted", output / "last"):
        with pytest.raises(UsageError, match="which a new run clears"):
            run(recipe_file(), output, overwrite=True, model=model)
    teaching = recipe_file(stages=one_stage("distill", teacher=str(output / "last")))
    with pytest.raises(UsageError, match="which a new run clears"):
        run(teaching, output, overwrite=True)
    assert sorted(output.rglob("*")) == before
    (output / "notes.txt").write_text("kept")
    run(recipe_file(stages=one_stage(tokens=64)), output, overwrite=True)
    assert (output / "last").resolve().name == "step-000001"
    assert (output / "notes.txt").exists()


def test_old_checkpoints_go_and_the_newest_and_the_best_stay(recipe_file: Write, tmp_path: Path) -> None:
    output = tmp_path / "run"
    events = run(recipe_file(checkpoint={"every_steps": 1, "keep_last": 2}), output)
    assert len([event for event in events if isinstance(event, Saved)]) == 12
    left = {path.name for path in output.glob("step-*")}
    assert {"step-000011", "step-000012", (output / "best").resolve().name} == left
    assert (output / "last").resolve().name == "step-000012"
    assert isinstance(events[-1], Finished)


def test_provenance_says_what_was_spent_on_what(recipe_file: Write, base: Path, tmp_path: Path) -> None:
    run(recipe_file(), tmp_path / "run")
    told = checkpoint.read_provenance((tmp_path / "run" / "last").resolve())
    assert told["base"] == str(base)
    assert told["tokens"] == sum(told["tokens_by_source"].values()) == 768
    assert len(told["data"]) == 2
    assert recipes.validate(__import__("tomllib").loads(told["recipe"]), lookup=lookup)


def plant_nan(monkeypatch: pytest.MonkeyPatch, at: set[int]) -> None:
    """Make the finetune loss of the given calls NaN."""
    kind = stages.get("finetune")
    original, calls = kind.loss, iter(range(10**6))

    def loss(self, *args):
        result = original(self, *args)
        return result._replace(sum=result.sum * math.nan) if next(calls) in at else result

    monkeypatch.setattr(kind, "loss", loss)


def test_a_loss_that_is_not_finite_stops_before_it_does_harm(
    recipe_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_nan(monkeypatch, {2})
    output = tmp_path / "run"
    with pytest.raises(SupraError, match=r"stage 0 \(finetune\), step 3; nothing was updated"):
        run(recipe_file(stages=one_stage()), output)
    kept = output / "non-finite" / "step-000003"
    assert load_file(kept / "batch.safetensors")["input_ids"].shape == (2, 32)
    assert json.loads((kept / "facts.json").read_text())["loss"] == "nan"


def test_a_batch_that_is_not_finite_can_be_left_out(
    recipe_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_nan(monkeypatch, {2})
    events = run(recipe_file(stages=one_stage(), non_finite="skip"), tmp_path / "run")
    assert [event.step for event in steps(events)] == [1, 2, 3, 4]
    assert any("step 3; nothing was updated" in event.text for event in events if isinstance(event, Note))
    weights = load_file(tmp_path / "run" / "last" / "model-mixers.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def test_metrics_are_json_whatever_the_numbers_are(
    recipe_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_nan(monkeypatch, {2})
    run(recipe_file(stages=one_stage(), non_finite="skip"), tmp_path / "run")

    def strict(line: str) -> dict:
        return json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))

    records = list(map(strict, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()))
    assert [record["loss"] is None for record in records if record["event"] == "step"] == [False, False, True, False]


def test_data_that_vanishes_while_training_is_not_missed(recipe_file: Write, raw_recipe: dict, tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    text.write_text("one two three four five " * 200)
    recipe = recipe_file(data=raw_recipe["data"] | {"sources": [{"path": str(text)}]}, stages=one_stage())
    run(recipe, tmp_path / "whole")
    events = loop.uptrain(recipes.load(recipe, lookup=lookup), tmp_path / "run")
    next(event for event in events if isinstance(event, Step))
    text.unlink()
    shutil.rmtree(os.environ["SUPRA_CACHE"])
    assert isinstance(list(events)[-1], Finished)
    files = [tmp_path / output / "last" / "model-mixers.safetensors" for output in ("whole", "run")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_stopped_run_goes_on_past_the_batch_with_non_finite_skip(
    recipe_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_nan(monkeypatch, {2})
    stage = {"stages": one_stage(), "checkpoint": {"every_steps": 1, "keep_last": 2}}
    with pytest.raises(SupraError, match="non_finite=skip"):
        run(recipe_file(**stage), tmp_path / "run")
    plant_nan(monkeypatch, {0})
    events = run(recipe_file(**stage, non_finite="skip"), tmp_path / "run", resume=True)
    assert isinstance(events[-1], Finished)


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_nan_in_a_weight_is_no_fault_of_the_batch(
    policy: str, recipe_file: Write, raw_recipe: dict, base: Path, tmp_path: Path
) -> None:
    folder = checkpoint.convert(base, tmp_path / "student", mixer="supra", options={}, keep="none", seed=0)
    mixers = load_file(folder / "model-mixers.safetensors")
    name = sorted(mixers)[0]
    mixers[name].flatten()[0] = math.nan
    save_file(mixers, folder / "model-mixers.safetensors", metadata={"format": "pt"})
    unseen = raw_recipe["data"] | {"validation": []}
    recipe = recipe_file(stages=one_stage(), data=unseen, non_finite=policy)
    with pytest.raises(SupraError, match=f"step 1; nothing was updated .* the weight {re.escape(name)} is not finite"):
        run(recipe, tmp_path / "run", model=folder)


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_nan_in_a_gradient_updates_nothing(
    policy: str, device: str, recipe_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient of one weight in the third step; the loss itself stays finite."""
    original, calls = checkpoint.materialise, iter(range(10**6))

    def materialise(model, *given):
        original(model, *given)
        for name in sorted(mixer_names(model))[:1]:  # the teacher has none
            model.get_parameter(name).register_hook(lambda gradient: gradient * (math.nan if next(calls) == 2 else 1))

    monkeypatch.setattr(checkpoint, "materialise", materialise)
    recipe = recipe_file(stages=one_stage(), non_finite=policy)
    told = r"loss \d.* and gradient norm nan in stage 0 \(finetune\), step 3; nothing was updated"
    if policy == "stop":
        with pytest.raises(SupraError, match=told):
            run(recipe, tmp_path / "run", device=device)
        return
    events = run(recipe, tmp_path / "run", device=device)
    assert any(re.match(told, event.text) for event in events if isinstance(event, Note))
    assert [math.isfinite(event.grad_norm) for event in steps(events)] == [True, True, False, True]
    weights = load_file(tmp_path / "run" / "last" / "model-mixers.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def test_rows_with_nothing_to_predict_are_a_step_of_loss_zero(device: str, base: Path) -> None:
    """As where a document is one token longer than a row and rows hold one piece each."""
    student, kind = checkpoint.load(base, device=device), stages.get("finetune")
    spec = recipes.Stage(kind="finetune", tokens=1, lr=1e-3)
    stage = kind(kind.Options())
    optimizer = adamw(student, prepare(student, stage, spec), spec)
    nothing = torch.zeros(1, 8, dtype=torch.int64)
    rows = packing.Batch(nothing, nothing, torch.full_like(nothing, packing.IGNORED))
    outcome = take(stage, student, None, optimizer, rows, Computing(torch.device(device), torch.float32, 1), 1.0)
    assert (outcome.loss, outcome.grad_norm, outcome.finite) == (0.0, 0.0, True)


@pytest.mark.parametrize(("rank", "row"), [(0, 2), (1, 3), (2, 5)])
def test_a_held_out_row_that_is_not_finite_has_the_same_number_on_every_rank(rank: int, row: int, base: Path) -> None:
    """Row `row` alone of seven has anything to predict, and the model's losses are all NaN."""
    model, ids = checkpoint.load(base), torch.randint(8, 16, (7, 12))
    labels = torch.full_like(ids, packing.IGNORED)
    labels[row] = ids[row]
    nn.init.constant_(model.get_output_embeddings().weight, math.nan)
    world = World(rank=rank, size=2 if rank < 2 else 3)
    rows = packing.Batch(ids, torch.arange(12).expand_as(ids), labels)
    with pytest.raises(SupraError, match=f"row {row} is not finite"):
        held_out_loss(model, rows, torch.device("cpu"), torch.float32, world)


@pytest.mark.parametrize("kind", ["distill", "finetune"])
def test_activation_checkpointing_changes_no_bit(kind: str, recipe_file: Write, tmp_path: Path) -> None:
    kept = {}
    for flag in (False, True):
        output = tmp_path / str(flag)
        run(recipe_file(stages=one_stage(kind, activation_checkpointing=flag)), output)
        kept[flag] = (output / "last" / "model-mixers.safetensors").read_bytes()
    assert kept[False] == kept[True]


def test_activation_checkpointing_saves_activations(base: Path, tmp_path: Path) -> None:
    folder = checkpoint.convert(base, tmp_path / "student", mixer="supra", options={}, keep="none", seed=0)
    student = checkpoint.load(folder).train()
    batch = packing.Batch(
        torch.zeros(2, 64, dtype=torch.long), torch.arange(64).expand(2, 64), torch.ones(2, 64).long()
    )
    kind = stages.get("finetune")
    stage = kind(kind.Options())
    saved = {}
    for flag in (False, True):
        prepare(student, stage, recipes.Stage(kind="finetune", tokens=1, activation_checkpointing=flag))
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            stage.loss(student, None, batch, lambda part: part)
        saved[flag] = sum(sizes)
    assert saved[True] < 0.5 * saved[False]


def test_a_converted_model_with_another_mixer_is_refused(recipe_file: Write, base: Path, tmp_path: Path) -> None:
    options = {"gain": "head"}
    folder = checkpoint.convert(base, tmp_path / "student", mixer="supra", options=options, keep="none", seed=0)
    for mixer in ({"name": "retention"}, {"name": "supra"}):
        with pytest.raises(UsageError, match="the recipe asks for"):
            run(recipe_file(mixer=mixer), tmp_path / mixer["name"], model=folder)


def test_starting_from_a_converted_model_is_starting_from_its_base(
    recipe_file: Write, base: Path, tmp_path: Path
) -> None:
    folder = checkpoint.convert(base, tmp_path / "student", mixer="supra", options={}, keep="none", seed=0)
    run(recipe_file(stages=one_stage()), tmp_path / "a", model=folder)
    run(recipe_file(stages=one_stage()), tmp_path / "b")
    name = "last/model-mixers.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_model_from_scratch_has_the_bases_shape_and_weights_of_its_own(
    recipe_file: Write, base: Path, tmp_path: Path
) -> None:
    run(recipe_file(init="scratch", seed=5, stages=one_stage()), tmp_path / "run")
    student = checkpoint.load((tmp_path / "run" / "last").resolve())
    original = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    assert student.get_input_embeddings().weight.shape == original.shape
    assert not torch.allclose(student.get_input_embeddings().weight, original, atol=1e-2)


def test_a_plain_model_is_trained_and_saved_as_a_plain_model(recipe_file: Write, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    run(recipe_file(mixer={"name": "softmax"}, stages=one_stage()), tmp_path / "run")
    assert type(LlamaForCausalLM.from_pretrained((tmp_path / "run" / "last").resolve())) is LlamaForCausalLM
    assert json.loads((tmp_path / "run" / "last" / "config.json").read_text())["model_type"] == "llama"


def test_untied_students_are_saved_and_loaded_untied(recipe_file: Write, tmp_path: Path) -> None:
    run(recipe_file(stages=one_stage("distill", untie=True)), tmp_path / "run")
    student = checkpoint.load((tmp_path / "run" / "last").resolve())
    assert not torch.equal(student.get_input_embeddings().weight, student.get_output_embeddings().weight)


def test_a_head_that_a_later_stage_unties_begins_as_the_embeddings_own_master(
    recipe_file: Write, tmp_path: Path
) -> None:
    checkpointed = {"every_steps": 100, "keep_last": 2, "dtype": "bfloat16"}
    run(recipe_file(stages=one_stage(), checkpoint=checkpointed), tmp_path / "run")
    untying = recipes.load(recipe_file(stages=one_stage(untie=True)), lookup=lookup).stages[0]
    built = build(untying, tmp_path / "run" / "last", None, World(), torch.device("cpu"), torch.float32)
    head, embedding = built.student.lm_head.weight, built.student.get_input_embeddings().weight
    assert head is not embedding
    assert torch.equal(head, embedding)
    assert not torch.equal(head, head.bfloat16().float())


def test_a_save_tells_what_its_model_had_learned_from_before_the_run(recipe_file: Write, tmp_path: Path) -> None:
    started = None
    for number, before in enumerate((0, 256, 512)):
        run(recipe_file(stages=one_stage()), output := tmp_path / str(number), model=started)
        provenance = checkpoint.read_provenance(output / "last")
        assert (provenance["tokens"], provenance["tokens_before"]) == (256, before)
        started = (output / "last").resolve()


def test_a_token_without_an_embedding_is_refused_by_name_where_the_text_holds_it(
    recipe_file: Write, raw_recipe: dict, base: Path, text_file: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    shutil.copytree(base, tmp_path / "base")
    words = AutoTokenizer.from_pretrained(base)
    words.add_tokens(["<image>"])
    words.save_pretrained(tmp_path / "base")
    run(recipe_file(base=str(tmp_path / "base"), stages=one_stage()), tmp_path / "without")
    held = tmp_path / "held.txt"
    held.write_text(text_file.read_text(encoding="utf-8").replace(" ", " <image> "), encoding="utf-8")
    data = raw_recipe["data"]
    for part in ("sources", "validation"):
        with pytest.raises(SupraError, match="the text holds token 300, '<image>'"):
            run(recipe_file(base=str(tmp_path / "base"), data=data | {part: [{"path": str(held)}]}), tmp_path / part)


def test_a_missing_tracker_is_a_sentence(recipe_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match="pip install wandb"):
        run(recipe_file(track=["wandb"]), tmp_path / "run")


class LostConnection(Exception):
    """A library's own kind."""


def test_a_tracker_hears_every_step(recipe_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[int, dict]] = []
    handle = SimpleNamespace(log=lambda figures, step: heard.append((step, figures)))
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=lambda **_: handle))
    run(recipe_file(track=["trackio"], stages=one_stage("transfer")), tmp_path / "run")
    assert [step for step, figures in heard if "loss" in figures] == [1, 2, 3, 4]
    assert {"layer.0", "layer.1", "output", "lr", "grad_norm"} <= set(heard[1][1])


@pytest.mark.parametrize("kind", [ConnectionError, LostConnection])
def test_a_tracker_that_fails_on_the_way_does_not_end_the_run(
    kind: type[Exception], recipe_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[int] = []

    def log(figures: dict, step: int) -> None:
        heard.append(step)
        if step == 2:
            raise kind("gone")

    library = SimpleNamespace(init=lambda **_: SimpleNamespace(log=log), Error=LostConnection)
    monkeypatch.setitem(sys.modules, "wandb", library)
    events = run(recipe_file(track=["wandb"], stages=one_stage()), tmp_path / "run")
    assert isinstance(events[-1], Finished)
    assert heard == [0, 1, 2]
    told = [event.text for event in events if isinstance(event, Note)]
    assert len(told) == 1
    assert "'wandb' failed (gone); the run goes on without it" in told[0]


def test_tensorboard_is_written_into_the_run_that_it_is_about(
    recipe_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are the new run's, not among those that a new run clears."""

    class Writer:
        def __init__(self, folder: Path):
            self.file = Path(folder) / "events"
            self.file.parent.mkdir(exist_ok=True)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(f"{name} {step}\n")

        def flush(self) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    for _ in range(2):
        run(recipe_file(track=["tensorboard"], stages=one_stage()), tmp_path / "run", overwrite=True)
        written = (tmp_path / "run" / "tensorboard" / "events").read_text(encoding="utf-8").splitlines()
        assert [line for line in written if line.startswith("loss ")] == [f"loss {step}" for step in (1, 2, 3, 4)]


def test_no_row_is_drawn_twice(recipe_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage begins on rows that its first step takes as they are: to rewind a hub stream is to read it again."""
    restored = []
    monkeypatch.setattr(rows.Mixture, "restore", lambda *given: restored.append(given))
    run(recipe_file(), tmp_path / "run")
    assert restored == []


def test_an_unknown_teacher_vocabulary_is_a_sentence(recipe_file: Write, base: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    other = LlamaConfig.from_pretrained(base, vocab_size=512)
    LlamaForCausalLM(other).save_pretrained(tmp_path / "other")
    with pytest.raises(UsageError, match="one vocabulary"):
        run(recipe_file(stages=one_stage("distill", teacher=str(tmp_path / "other"))), tmp_path / "run")


def other_teacher(base: Path, folder: Path, change: Callable[[dict], None]) -> Path:
    """The base under another tokenizer: its file, changed."""
    shutil.copytree(base, folder)
    words = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(words)
    (folder / "tokenizer.json").write_text(json.dumps(words), encoding="utf-8")
    return folder


def swap_two(words: dict) -> None:
    numbers = words["model"]["vocab"]
    numbers["a"], numbers["b"] = numbers["b"], numbers["a"]


def swap_special(words: dict) -> None:
    """Added tokens are no part of the model's vocabulary alone."""
    one, two = words["added_tokens"][:2]
    one["id"], two["id"] = two["id"], one["id"]
    numbers = words["model"]["vocab"]
    numbers[one["content"]], numbers[two["content"]] = one["id"], two["id"]
    words["post_processor"] = None


@pytest.mark.parametrize("change", [swap_two, swap_special])
def test_a_teacher_of_another_tokenizer_and_the_same_size_is_refused(
    change: Callable[[dict], None], recipe_file: Write, base: Path, tmp_path: Path
) -> None:
    teacher = other_teacher(base, tmp_path / "teacher", change)
    with pytest.raises(UsageError, match=r"another tokenizer than the student: token '.*' is number \d+ for the"):
        run(recipe_file(stages=one_stage("distill", teacher=str(teacher))), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_knows_further_tokens_is_taken_and_one_without_a_tokenizer_is_not(
    recipe_file: Write, base: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    teacher = tmp_path / "teacher"
    shutil.copytree(base, teacher)
    words = AutoTokenizer.from_pretrained(base)
    assert words.add_tokens(["<further>"]) == 1
    words.save_pretrained(teacher)
    recipe = recipe_file(stages=one_stage("distill", tokens=64, teacher=str(teacher)))
    run(recipe, tmp_path / "run")
    for file in teacher.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(NotFoundError, match="teacher has no tokenizer"):
        run(recipe, tmp_path / "other")


@pytest.mark.parametrize("name", ["converted", "recipe.toml"])
def test_what_no_run_has_written_is_not_taken_for_its_own(name: str, recipe_file: Write, tmp_path: Path) -> None:
    theirs = tmp_path / "run" / name
    theirs.mkdir(parents=True) if name == "converted" else theirs.parent.mkdir()
    kept = theirs / "model.safetensors" if theirs.is_dir() else theirs
    kept.write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match="is not empty"):
        run(recipe_file(), tmp_path / "run")
    assert kept.read_text(encoding="utf-8") == "mine"


def test_a_model_with_options_by_layer_is_the_one_that_the_recipe_asks_for(
    base: Path, recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    options = {"key_width": [1, 2]}
    student = tmp_path / "student"
    checkpoint.convert(base, student, mixer="gated_delta", options=options, keep="none", seed=0)
    run(recipe_file(mixer={"name": "gated_delta", **options}, stages=one_stage()), tmp_path / "run", model=student)
    with pytest.raises(UsageError, match=r"key_width': \[1.0, 2.0\]"):
        run(recipe_file(mixer={"name": "gated_delta"}), tmp_path / "other", model=student)
