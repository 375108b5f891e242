"""Perplexity, recovery and the reuse of scores, against formulas written out here."""

from __future__ import annotations

import copy
import errno
import json
import logging
import math
import os
import random
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from supra_cli.core import checkpoint, corpus, evaluate, files
from supra_cli.core.data import tokenizer as bpe
from supra_cli.core.errors import NonFiniteError, NotFoundError, SupraError, UsageError
from supra_cli.core.evaluate import batch, keys, run, store, tasks, telling
from supra_cli.core.evaluate import nats as module
from supra_cli.core.evaluate.comparison import compare
from supra_cli.core.modeling import SupraConfig, SupraForCausalLM

VOCABULARY = 300


def small_llama(seed=0, vocabulary=VOCABULARY):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def as_supra(plain, mixer="softmax"):
    layers = [mixer] * plain.config.num_hidden_layers
    config = SupraConfig.from_base(plain.config, mixer=mixer, options={}, layers=layers)
    model = SupraForCausalLM._from_config(config).eval()
    for _, layer in model.swapped_layers():
        layer.mixer.reset_parameters()
    model.load_state_dict(plain.state_dict(), strict=mixer == "softmax")
    return model


def formula(model, row):
    """−ln p of row[1:], in float64, from the logits of one unpadded row."""
    with torch.no_grad():
        logits = model(input_ids=row[None].to(model.device)).logits[0].cpu().double()
    return -torch.log_softmax(logits, dim=-1)[:-1].gather(1, row[1:, None])[:, 0]


@pytest.fixture
def rows():
    return torch.randint(0, VOCABULARY, (5, 41), generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------ perplexity


def test_token_nats_are_the_formula_and_nan_where_nothing_follows(rows, device):
    plain = small_llama().to(device)
    nats = evaluate.token_nats(plain, rows, batch_size=2)
    for row, got in zip(rows, nats, strict=True):
        torch.testing.assert_close(got[:-1].double(), formula(plain, row), rtol=0, atol=2e-5)  # fp32 sums of 300 terms
    assert nats[:, -1].isnan().all()


@pytest.mark.parametrize("at_once", [1, 5 * 7 * VOCABULARY, 1 << 30])
def test_projecting_the_vocabulary_in_chunks_changes_nothing(rows, at_once, monkeypatch):
    plain = small_llama()
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", at_once)
    nats = evaluate.token_nats(as_supra(plain), rows, batch_size=5)
    torch.testing.assert_close(nats, evaluate.token_nats(plain, rows), rtol=0, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("mixer", ["softmax", "supra"])
def test_documents_in_one_row_score_as_they_do_alone(mixer, device):
    model = as_supra(small_llama(), mixer).to(device)
    lengths = (1, 17, 22)
    documents = [torch.randint(0, VOCABULARY, (n,)) for n in lengths]
    positions = torch.cat([torch.arange(n) for n in lengths])
    nats = evaluate.token_nats(model, torch.cat(documents)[None], positions[None])[0]
    alone = torch.cat([evaluate.token_nats(model, document[None])[0] for document in documents])
    torch.testing.assert_close(nats, alone, rtol=0, atol=1e-4, equal_nan=True)


def test_the_mean_is_over_tokens_not_over_rows_or_batches(rows):
    plain = small_llama()
    positions = torch.arange(41).expand(5, 41).clone()
    positions[0, 20:] = torch.arange(21)
    labels = module.next_tokens(rows, positions)
    labels[3, 5:] = -100
    known = [evaluate.token_nats(plain, rows, positions, labels)[n] for n in range(5)]
    expected = torch.cat([row[~row.isnan()] for row in known]).double()
    result = evaluate.perplexity(plain, rows, positions, labels, batch_size=3)
    assert result.tokens == len(expected) == 4 * 40 - 1 + 5
    assert result.nats == pytest.approx(float(expected.mean()), abs=1e-6)
    assert result.perplexity == pytest.approx(math.exp(result.nats))


def test_the_model_comes_back_in_the_mode_it_was_in(rows):
    model = as_supra(small_llama()).train()
    before = torch.random.get_rng_state()
    nats = evaluate.perplexity(model, rows).nats
    assert model.training
    assert torch.equal(before, torch.random.get_rng_state())
    assert evaluate.perplexity(model.eval(), rows).nats == nats


def test_a_loss_that_is_not_finite_is_an_error_that_names_the_row(rows, device):
    plain = small_llama().to(device)
    with torch.no_grad():
        plain.model.embed_tokens.weight[7] = math.nan
    rows[rows == 7] = 8
    rows[3, 2] = 7
    with pytest.raises(SupraError, match="row 3 is not finite"):
        evaluate.token_nats(plain, rows, batch_size=2)


# ------------------------------------------------------------------ the offline tasks


@pytest.fixture(scope="module")
def offline():
    return evaluate.find(["stdlib_cloze", "stdlib_ppl"])


@pytest.fixture(scope="module")
def questions(offline):
    return list(offline.leaves["stdlib_cloze"].eval_docs)


def test_the_true_line_follows_its_context_in_a_held_out_document(questions):
    texts = dict(corpus.documents("validation"))
    assert len(questions) == 400
    for question in questions:
        whole = "\n".join(line.rstrip() for line in texts[question["name"]].split("\n"))
        assert question["context"] + question["choices"][question["answer"]] in whole


def test_distractors_are_real_lines_from_elsewhere_that_look_like_the_true_one(questions):
    lines = {name: {line.rstrip() for line in text.split("\n")} for name, text in corpus.documents("validation")}
    for question in questions:
        choices, true = question["choices"], question["choices"][question["answer"]]
        assert len(set(choices)) == 4
        assert true in lines[question["name"]]
        assert len({len(choice) - len(choice.lstrip()) for choice in choices}) == 1
        sizes = [len(choice.strip()) for choice in choices]
        assert min(sizes) >= 20
        assert max(sizes) <= 1.25 * len(true.strip()) + 1
        for choice in set(choices) - {true}:
            assert choice not in lines[question["name"]]
            assert any(choice in others for others in lines.values())
            assert choice.strip() not in question["context"]


def test_neither_place_nor_length_gives_the_answer_away(questions):
    answers = np.bincount([question["answer"] for question in questions], minlength=4)
    longest = [np.argmax([len(choice) for choice in q["choices"]]) == q["answer"] for q in questions]
    shortest = [np.argmin([len(choice) for choice in q["choices"]]) == q["answer"] for q in questions]
    deviation = math.sqrt(400 * 0.25 * 0.75)
    assert (abs(answers - 100) < 3.5 * deviation).all()
    assert abs(sum(longest) - 100) < 3.5 * deviation
    assert abs(sum(shortest) - 100) < 3.5 * deviation


def test_the_choices_alone_tell_little():
    """Letter bigrams of the training text, no context: no better than guessing by more than its error allows."""
    counts = np.ones((128, 128))
    for _, text in corpus.documents("train"):
        codes = np.minimum(np.frombuffer(text.encode("ascii", "replace"), np.uint8), 127).astype(np.int64)
        counts += np.bincount(codes[:-1] * 128 + codes[1:], minlength=128 * 128).reshape(128, 128)
    log = np.log(counts / counts.sum(1, keepdims=True))

    def likelihood(line):
        codes = np.frombuffer(line.strip().encode("ascii", "replace"), np.uint8).astype(np.int64)
        return log[codes[:-1], codes[1:]].mean()

    found = evaluate.find(["stdlib_cloze"]).leaves["stdlib_cloze"].eval_docs
    right = [np.argmax([likelihood(choice) for choice in q["choices"]]) == q["answer"] for q in found]
    assert abs(np.mean(right) - 0.25) < 3.5 * math.sqrt(0.25 * 0.75 / len(right))


def test_questions_are_the_same_every_time(questions):
    again = evaluate.find(["stdlib_cloze"]).leaves["stdlib_cloze"].eval_docs
    assert list(again) == questions


@pytest.fixture(scope="module")
def words():
    return bpe.train((text for _, text in list(corpus.documents("validation"))[:20]), VOCABULARY)


def subject(name, model, words, folder):
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    loads = []

    def load():
        loads.append(name)
        return LlamaForCausalLM.from_pretrained(folder).eval(), words

    return evaluate.Subject(name, folder, load), loads


@pytest.fixture
def pair(words, tmp_path, monkeypatch):
    monkeypatch.setenv("SUPRA_CACHE", str(tmp_path / "cache"))
    return subject("student", small_llama(0, len(words)), words, tmp_path / "student"), subject(
        "teacher", small_llama(1, len(words)), words, tmp_path / "teacher"
    )


FEW = evaluate.Settings(limit=6, max_length=512, batch_size=4)


def on(subject, device):
    """The subject, loaded to a device."""

    def load():
        model, words = subject.load()
        return model.to(device), words

    return replace(subject, load=load, device=device)


def test_cloze_scores_are_the_likelihoods_of_the_lines(pair, words, offline, questions, device):
    student = on(pair[0][0], device)
    document = evaluate.evaluate(student, None, offline, FEW)
    model, _ = student.load()
    right = 0
    for question in questions[:6]:
        sums = []
        for choice in question["choices"]:
            whole = torch.tensor(words.encode(question["context"] + choice))
            known = len(
                words.encode(question["context"].rstrip())
            )  # the break between the lines counts as the choice's
            sums.append(-float(formula(model, whole)[known - 1 :].sum()))
        right += sums.index(max(sums)) == question["answer"]
    row = document["results"]["stdlib_cloze"]["acc"]
    assert row["student"] == pytest.approx(right / 6)
    assert (row["chance"], row["teacher"], row["recovery"]) == (0.25, None, None)
    assert sum(document["tasks"]["stdlib_cloze"]["choices"]["picked"]) == 6
    cut = sum(any(len(words.encode(q["context"] + choice)) > 513 for choice in q["choices"]) for q in questions[:6])
    assert document["tasks"]["stdlib_cloze"] | {"choices": None} == {
        "samples": 6, "num_fewshot": 0, "bos": True, "cut": cut, "outside": 0, "choices": None,
    }  # fmt: skip


def test_perplexity_is_told_in_nats_per_token_beside_the_teacher(pair, words, offline, device):
    student, teacher = (on(subject, device) for subject, _ in pair)
    settings = replace(FEW, max_length=10**6, batch_size=1, limit=2)
    rows = evaluate.evaluate(student, teacher, offline, settings)["results"]["stdlib_ppl"]
    sums = {}
    for one in (student, teacher):
        model, _ = one.load()
        nats, tokens = 0.0, 0
        for text in offline.leaves["stdlib_ppl"].eval_docs[:2]["text"]:
            row = torch.tensor(
                [words.bos_token_id, *words.encode(text)]
            )  # as lm-eval does: begin token, then the text with its own
            nats += float(formula(model, row).sum())
            tokens += len(row) - 1
        sums[one.name] = nats / tokens
    assert rows["nats_per_token"]["student"] == pytest.approx(sums["student"], abs=1e-4)
    assert rows["nats_per_token"]["teacher"] == pytest.approx(sums["teacher"], abs=1e-4)
    for row in rows.values():
        assert row["difference"] == pytest.approx(sums["student"] - sums["teacher"], abs=2e-4)
        assert row["recovery"] is None
    assert rows["nats_per_token"]["difference_stderr"] > 0


# ------------------------------------------------------------------ finding tasks


def test_local_tasks_never_read_the_fourteen_thousand_files_of_lm_eval(monkeypatch):
    import lm_eval.tasks

    whole = lm_eval.tasks.TaskManager

    def manager(*, include_path, include_defaults=True, **others):
        assert not include_defaults
        assert include_path == [evaluate.bundled()]
        return whole(include_path=include_path, include_defaults=False, **others)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    assert list(evaluate.find(["stdlib_ppl"]).leaves) == ["stdlib_ppl"]


def test_a_group_of_lm_eval_is_found_by_the_line_that_defines_it():
    shipped = tasks._look_through({"mmlu", "hellaswag", "ai2_arc", "no_such_task_anywhere"})
    assert {name: folder.name for name, folder in shipped.folders.items()} == {"mmlu": "mmlu", "hellaswag": "hellaswag"}
    assert shipped.mentioned == {
        "mmlu",
        "hellaswag",
        "ai2_arc",
    }  # the last is a tag, which only lm-eval itself resolves
    assert len(set(shipped.names)) > 10_000


def test_data_that_is_not_here_is_a_sentence_with_the_way_out():
    with pytest.raises(NotFoundError, match=r"'mmlu'.*supra prefetch --tasks mmlu,hellaswag"):
        evaluate.find(["mmlu", "hellaswag"])


def test_an_unknown_task_gets_its_nearest_name():
    with pytest.raises(NotFoundError, match="unknown task 'stdlib_clozee'; did you mean 'stdlib_cloze'"):
        evaluate.find(["stdlib_clozee"])


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(NotFoundError, match="include-path"):
        evaluate.find(["stdlib_ppl"], tmp_path / "nothing")


QUESTIONS = [{"q": f"{n} is", "c": ["odd", "even", "red", "blue"][: 2 + 2 * (n % 2)], "a": n % 2} for n in range(8)]


@pytest.fixture
def own(tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    for name, rows in (("own_a", QUESTIONS), ("own_b", QUESTIONS[1:2] * 4)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}}}\n"
            "test_split: test\noutput_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: c\ndoc_to_target: a\n"
        )
    (folder / "both.yaml").write_text(
        "group: own_both\ntask: [own_a, own_b]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    return folder


def test_a_users_own_tasks_and_groups_are_scored_with_the_chance_of_their_choices(own, pair):
    (student, _), (teacher, _) = pair
    found = evaluate.find(["own_both"], own)
    assert found.headline == ["own_both"]
    results = evaluate.evaluate(student, teacher, found, replace(FEW, limit=None))["results"]
    a, b, both = (results[name]["acc"] for name in ("own_a", "own_b", "own_both"))
    assert a["chance"] == pytest.approx((0.5 + 0.25) / 2)
    assert b["chance"] == pytest.approx(0.25)
    assert both["chance"] == pytest.approx((8 * a["chance"] + 4 * b["chance"]) / 12)
    assert both["student"] == pytest.approx((8 * a["student"] + 4 * b["student"]) / 12)
    assert both["teacher"] == pytest.approx((8 * a["teacher"] + 4 * b["teacher"]) / 12)


def test_a_task_file_that_cannot_be_read_is_named(own):
    (own / "broken.yaml").write_text("task: [broken\n")
    with pytest.raises(SupraError, match=r"broken\.yaml cannot be read"):
        evaluate.find(["broken"], own)


def test_a_task_whose_file_is_gone_is_told(own):
    (own / "own_a.jsonl").unlink()
    with pytest.raises(SupraError, match="own_a"):
        evaluate.find(["own_a"], own)


# ------------------------------------------------------------------ recovery


def record(answers, chance):
    value, deviation = np.mean(answers), np.std(answers, ddof=1) / math.sqrt(len(answers))
    return {
        "task": "t",
        "samples": len(answers),
        "num_fewshot": 0,
        "bos": True,
        "cut": 0,
        "outside": 0,
        "metrics": {"acc,none": float(value), "acc_stderr,none": float(deviation), "sample_len": len(answers)},
        "chance": {"acc,none": chance},
        "documents": {"acc,none": [float(answer) for answer in answers]},
        "choices": None,
    }


LEAF = evaluate.Tasks(("t",), {"t": None}, {}, None)


def test_recovery_is_corrected_for_chance_and_its_error_is_that_of_a_paired_bootstrap():
    random = np.random.default_rng(0)
    teacher = random.random(800) < 0.7
    student = np.where(random.random(800) < 0.8, teacher, random.random(800) < 0.25)  # agrees on most questions
    row = compare(LEAF, {"t": record(student, 0.25)}, {"t": record(teacher, 0.25)})["t"]["acc"]
    assert row["recovery"] == pytest.approx((student.mean() - 0.25) / (teacher.mean() - 0.25))
    draws = random.integers(0, 800, (4000, 800))
    again = (student[draws].mean(1) - 0.25) / (teacher[draws].mean(1) - 0.25)
    assert row["recovery_stderr"] == pytest.approx(again.std(), rel=0.06)  # 4,000 draws know it to about 1 %
    assert row["stderr"] == pytest.approx(math.sqrt(student.mean() * (1 - student.mean()) / 799))


def test_a_teacher_no_better_than_chance_leaves_nothing_to_recover():
    random = np.random.default_rng(0)
    guesses = random.random(200) < 0.2
    row = compare(LEAF, {"t": record(~guesses, 0.25)}, {"t": record(guesses, 0.25)})["t"]["acc"]
    assert row["recovery"] is None
    assert row["teacher"] < 0.25


# ------------------------------------------------------------------ what was scored before


def test_a_score_is_taken_again_only_when_something_it_depends_on_changed(pair, words):
    offline = evaluate.find(["stdlib_cloze"])
    (student, student_loads), (teacher, teacher_loads) = pair
    first = evaluate.evaluate(student, teacher, offline, FEW)
    again = evaluate.evaluate(student, teacher, offline, FEW)
    assert (student_loads, teacher_loads) == (["student"], ["teacher"])
    assert again["results"] == first["results"]
    assert again["student"]["reused"] == ["stdlib_cloze"]
    evaluate.evaluate(student, None, offline, replace(FEW, limit=5))
    assert len(student_loads) == 2
    evaluate.evaluate(student, None, offline, FEW, fresh=True)
    assert len(student_loads) == 3
    small_llama(5, len(words)).save_pretrained(student.path)
    other = evaluate.evaluate(student, None, offline, FEW)
    assert len(student_loads) == 4
    assert other["student"]["weights"] != first["student"]["weights"]


def test_an_evaluation_that_was_stopped_goes_on_after_its_last_task(pair, offline, monkeypatch):
    (student, _), _ = pair
    score = evaluate.score

    def stopped(lm, name, *rest, **options):
        if name == "stdlib_ppl":
            raise KeyboardInterrupt
        return score(lm, name, *rest, **options)

    monkeypatch.setattr(run, "score", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(student, None, offline, FEW)
    monkeypatch.setattr(run, "score", score)
    assert evaluate.evaluate(student, None, offline, FEW)["student"]["reused"] == ["stdlib_cloze"]


def test_scores_of_a_run_lie_in_the_run_and_those_of_other_models_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SUPRA_CACHE", str(tmp_path / "cache"))
    run, converted, foreign = tmp_path / "run", tmp_path / "converted", tmp_path / "foreign"
    (run / "step-000500").mkdir(parents=True)
    (run / "recipe.toml").touch()
    (run / "last").symlink_to("step-000500")
    converted.mkdir()
    (converted / "supra.json").touch()
    foreign.mkdir()
    assert store.folder_of(run / "last", "a" * 64, owned=True) == run / "eval"
    assert store.folder_of(converted, "a" * 64, owned=True) == converted / "eval"
    assert store.folder_of(foreign, "a" * 64, owned=True) == tmp_path / "cache/eval" / ("a" * 16)
    assert store.folder_of(converted, "a" * 64, owned=False) == tmp_path / "cache/eval" / ("a" * 16)


def test_a_damaged_file_of_scores_is_scored_again(tmp_path):
    kept = store.Store(tmp_path)
    kept.add("t", {"k": 1}, {"metrics": {"acc,none": 0.5}})
    assert kept.find("t", {"k": 1})["metrics"] == {"acc,none": 0.5}
    assert kept.find("t", {"k": 2}) is None
    (tmp_path / "t.json").write_text("{")
    assert kept.find("t", {"k": 1}) is None


def test_what_cannot_be_kept_is_said_once_and_leaves_nothing(tmp_path, monkeypatch, caplog):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    kept = store.Store(tmp_path)
    kept.add("t", {"k": 1}, {"metrics": {}})
    assert kept.place == str(tmp_path)
    before = (tmp_path / "t.json").read_text()
    monkeypatch.setattr(files, "sync", full)
    monkeypatch.setattr(logging.getLogger("supra_cli"), "propagate", True)
    for task in ("t", "u"):
        kept.add(task, {"k": 2}, {"metrics": {}})
    assert kept.place is None
    again = store.Store(tmp_path)  # as measures have one and tasks another
    again.add("t", {"k": 2}, {"metrics": {}})
    assert again.place is None
    assert caplog.text.count("cannot be kept") == 1
    assert [(path.name, path.read_text()) for path in tmp_path.glob("[!.]*")] == [("t.json", before)]


def test_who_scores_at_the_same_time_keeps_what_each_found(tmp_path):
    """Every step of a run puts its scores into the same file."""

    def keep(step):
        for n in range(25):
            store.Store(tmp_path).add("t", {"step": step, "n": n}, {"metrics": {}})

    with ThreadPoolExecutor(4) as pool:  # a lock belongs to what opened it, not to the process
        list(pool.map(keep, range(4)))
    kept = store.Store(tmp_path)
    assert all(kept.find("t", {"step": step, "n": n}) for step in range(4) for n in range(25))


def test_scores_that_may_not_be_read_are_taken_again_and_left_alone(tmp_path, monkeypatch, caplog):
    def refused(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(logging.getLogger("supra_cli"), "propagate", True)
    store.Store(tmp_path).add("t", {"k": 1}, {"metrics": {}})
    before = (tmp_path / "t.json").read_bytes()
    with monkeypatch.context() as denied:
        denied.setattr(Path, "read_text", refused)
        kept = store.Store(tmp_path)
        assert kept.find("t", {"k": 1}) is None
        kept.add("t", {"k": 2}, {"metrics": {}})
        assert kept.place is None
    assert (tmp_path / "t.json").read_bytes() == before
    assert "Permission denied" in caplog.text


# ------------------------------------------------------------------ as lm-eval scores

SUMS = [{"question": f"{n} + {n} =", "answer": str(2 * n)} for n in range(12)]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_task(folder, name, rows=SUMS, train=None, **changes):
    """A task file in JSON, which is YAML too, with its data beside it; None leaves a field out."""
    folder.mkdir(exist_ok=True)
    write_rows(folder / f"{name}.jsonl", rows)
    files = {"test": str(folder / f"{name}.jsonl")}
    if train is not None:
        write_rows(folder / f"{name}.train.jsonl", train)
        files["train"] = str(folder / f"{name}.train.jsonl")
    fields = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "test_split": "test",
        "training_split": "train" if train is not None else None,
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": {"max_gen_toks": 4, "until": ["\n"], "do_sample": False},
        **changes,
    }
    text = json.dumps({key: value for key, value in fields.items() if value is not None}, indent=1)
    (folder / f"{name}.yaml").write_text(re.sub(r'"(!function [\w.]+)"', r"\1", text))
    return folder


CHOSEN = {
    "output_type": "multiple_choice",
    "doc_to_choice": ["0", "2", "4", "6"],
    "doc_to_target": "{{ answer|int // 2 % 4 }}",
    "generation_kwargs": None,
    "metric_list": [{"metric": "acc"}],
}


def test_scores_are_those_of_simple_evaluate(pair, words, tmp_path):
    """With examples in the prompt, drawn by the seed, and with sampled answers."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    (student, _), _ = pair
    folder = write_task(tmp_path / "own", "sums", train=SUMS[6:], num_fewshot=2)
    drawn = {"max_gen_toks": 4, "until": ["\n"], "do_sample": True, "temperature": 1.0}
    write_task(folder, "drawn", doc_to_target="{{question[0]}}", generation_kwargs=drawn)
    write_task(folder, "chosen", train=SUMS[6:], **CHOSEN)
    found = evaluate.find(["stdlib_cloze", "stdlib_ppl", "sums", "drawn", "chosen"], folder)
    settings = replace(FEW, num_fewshot=3)
    lm = evaluate.language_model(*student.load(), settings)
    ours = {name: evaluate.score(lm, name, found, settings) for name in found.leaves}
    assert [record["num_fewshot"] for record in ours.values()] == [0, 0, 3, 3, 3]
    assert found.leaves["sums"].config.num_fewshot == 2

    plain = HFLM(student.load()[0], backend="causal", tokenizer=words, batch_size=4, max_length=512)
    for name, task in found.leaves.items():
        answer = evaluator.simple_evaluate(
            plain, tasks=[task], task_manager=found.manager, num_fewshot=3, limit=6, fewshot_random_seed=1234
        )
        theirs = {key: value for key, value in answer["results"][name].items() if isinstance(value, float | int)}
        assert theirs.items() <= ours[name]["metrics"].items()
        assert answer["n-shot"][name] == ours[name]["num_fewshot"]


def test_examples_of_a_chat_are_turns_as_on_lm_evals_command_line(pair, words, tmp_path):
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    words = copy.deepcopy(words)
    words.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    model, _ = pair[0][0].load()
    found = evaluate.find(["chosen"], write_task(tmp_path / "own", "chosen", train=SUMS[6:], **CHOSEN))
    settings = replace(FEW, limit=2, num_fewshot=2, apply_chat_template=True)
    evaluate.score(evaluate.language_model(model, words, settings), "chosen", found, settings)
    task = found.leaves["chosen"]
    ours = [request.args for request in task.instances]
    assert ours[0][0].count("[user]") == 3
    assert ours[0][0].count("[assistant]") == 2

    plain = HFLM(model, backend="causal", tokenizer=words, batch_size=4, max_length=512)
    given = {"num_fewshot": 2, "limit": 2, "fewshot_random_seed": settings.seed, "apply_chat_template": True}
    evaluator.simple_evaluate(plain, tasks=[task], task_manager=found.manager, fewshot_as_multiturn=True, **given)
    assert ours == [request.args for request in task.instances]


def test_nats_per_token_are_of_the_tokens_that_were_scored(pair, words, tmp_path):
    """After an empty context a begin token is what the first token of a text follows, the text's own if it has one."""
    (student, _), _ = pair
    rows = [{"text": "1 + 1 = 2"}, {"text": f"{words.bos_token}2 + 2 = 4"}]
    changes = {"output_type": "loglikelihood", "doc_to_text": "", "doc_to_target": "text", "generation_kwargs": None}
    folder = write_task(tmp_path / "own", "texts", rows=rows, metric_list=[{"metric": "perplexity"}], **changes)
    document = evaluate.evaluate(student, None, evaluate.find(["texts"], folder), FEW)
    model, _ = student.load()
    nats = [
        formula(model, torch.tensor(words.encode(text))) for text in ("1 + 1 = 2", "2 + 2 = 4")
    ]  # begin token first
    expected = float(torch.cat(nats).mean())
    assert document["results"]["texts"]["nats_per_token"]["student"] == pytest.approx(expected, abs=1e-4)


LETTERS = {"output_type": "multiple_choice", "doc_to_choice": ["a", "b", "c", "d"], "generation_kwargs": None}
TARGET = "answer|int // 2 % 4"


@pytest.mark.parametrize(
    ("target", "right", "metrics"),
    [
        (f"{{{{ {TARGET} }}}}", [3, 3, 3, 3], ["acc", "acc_mutual_info"]),
        (f"{{{{ 'abcd'[{TARGET}] }}}}", [3, 3, 3, 3], ["acc"]),
        (f"[{{{{ {TARGET} }}}}, 3]", [3, 3, 3, 12], ["acc"]),
    ],
    ids=["numbers", "texts", "lists"],
)
def test_what_is_picked_and_right_is_counted_over_the_choices(pair, tmp_path, target, right, metrics):
    (student, _), _ = pair
    changes = {**LETTERS, "doc_to_target": target, "metric_list": [{"metric": metric} for metric in metrics]}
    folder = write_task(tmp_path / "own", "sums", **changes)
    document = evaluate.evaluate(student, None, evaluate.find(["sums"], folder), replace(FEW, limit=None))
    choices = document["tasks"]["sums"]["choices"]
    assert choices["right"] == right
    model, words = student.load()
    picked = [0] * 4
    for row in SUMS:  # each choice is one token after a space that is another
        whole = [torch.tensor(words.encode(f"{row['question']} {choice}")) for choice in LETTERS["doc_to_choice"]]
        known = len(words.encode(row["question"]))
        sums = [float(formula(model, ids)[known - 1 :].sum()) for ids in whole]
        picked[sums.index(min(sums))] += 1
    assert choices["picked"] == picked


def test_each_text_of_a_batch_opens_with_one_begin_token(words):
    lm = evaluate.language_model(small_llama(0, len(words)), words, FEW)
    own = words.bos_token + "def read"
    for texts in ([own, "def read(self"], ["def read(self", own]):
        ids, mask = lm.tok_batch_encode(texts)
        for row, kept, text in zip(ids, mask, texts, strict=True):
            tokens = row[kept.bool()].tolist()
            assert tokens.count(words.bos_token_id) == 1
            assert tokens == words.encode(text.removeprefix(words.bos_token))
    ids, mask = lm.tok_batch_encode([own, "a"], left_truncate_len=2)
    assert ids.shape == (2, 2)
    assert lm.cut == {own}


def test_a_padding_token_without_an_embedding_pads_nothing_and_is_refused_in_a_text(words):
    words = copy.deepcopy(words)
    words.add_special_tokens({"pad_token": "[PAD]"})
    model = small_llama(0, len(words) - 1)
    lm = evaluate.language_model(model, words, FEW)
    ids, mask = lm.tok_batch_encode(["def read(self", "def"])
    assert ids.max() < model.config.vocab_size
    assert (ids[1][~mask[1].bool()] == 0).all()
    with pytest.raises(SupraError, match=r"the text holds token \d+, '\[PAD\]'"):
        lm.tok_batch_encode(["def [PAD]"])
    with pytest.raises(SupraError, match="the text holds token"):
        lm._loglikelihood_tokens([(("", "[PAD]"), [1], [len(words) - 1])])


def test_progress_counts_every_request_to_its_end(pair, tmp_path):
    (student, _), _ = pair
    folder = write_task(tmp_path / "own", "sums")
    found = evaluate.find(["stdlib_cloze", "stdlib_ppl", "sums"], folder)
    seen = {}
    evaluate.evaluate(
        student,
        None,
        found,
        replace(FEW, max_length=300),
        progress=lambda model, what, done, total: seen.setdefault(what, []).append((done, total)),
    )
    assert "loading" in seen
    for name, requests in (("stdlib_cloze", 6 * 4), ("sums", 6)):
        assert seen[name][-1] == (requests, requests)
    done, total = seen["stdlib_ppl"][-1]
    assert done == total > 6  # windows, not documents
    for name in found.leaves:
        assert [done for done, _ in seen[name]] == sorted(done for done, _ in seen[name])


def test_a_dozen_questions_are_resampled_in_one_process_and_not_a_hundred_thousand_times(pair, tmp_path, monkeypatch):
    import lm_eval.api.metrics

    (student, _), _ = pair
    asked, iterations = lm_eval.api.metrics.bootstrap_stderr, []

    def bootstrap(function, values, iters):
        iterations.append((len(values), iters, os.environ["DISABLE_MULTIPROC"]))
        return asked(function, values, iters)

    monkeypatch.delenv("DISABLE_MULTIPROC", raising=False)
    monkeypatch.setattr(lm_eval.api.metrics, "bootstrap_stderr", bootstrap)
    changes = {"doc_to_choice": ["no", "yes"], "doc_to_target": "{{ answer|int // 2 % 2 }}"}
    folder = write_task(tmp_path / "own", "sums", **{**CHOSEN, **changes, "metric_list": [{"metric": "f1"}]})
    found = evaluate.find(["sums"], folder)
    row = evaluate.evaluate(student, None, found, replace(FEW, limit=None))["results"]["sums"]["f1"]
    assert iterations == [(12, 200, "1")]
    assert row["stderr"] is not None
    assert "DISABLE_MULTIPROC" not in os.environ


def test_a_likelihood_that_is_no_number_is_an_error_not_a_score(words):
    model = small_llama(0, len(words))
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    found = evaluate.find(["stdlib_cloze"])
    with pytest.raises(SupraError, match=r"stdlib_cloze.*not finite.*weights and dtype"):
        evaluate.score(evaluate.language_model(model, words, FEW), "stdlib_cloze", found, FEW)


@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"do_sample": True, "temperature": 1.0}])
def test_a_text_is_not_generated_from_logits_that_are_no_numbers(words, tmp_path, sampling):
    model = small_llama(0, len(words))
    with torch.no_grad():
        model.model.norm.weight[5] = math.nan
    changes = {"generation_kwargs": {"max_gen_toks": 4, "until": ["\n"], **sampling}}
    found = evaluate.find(["sums"], write_task(tmp_path / "own", "sums", **changes))
    with pytest.raises(NonFiniteError, match=r"sums.*not finite.*weights and dtype"):
        evaluate.score(evaluate.language_model(model, words, FEW), "sums", found, FEW)
    assert not model._forward_hooks


@pytest.mark.parametrize("name", ["stdlib_cloze", "sums"])
def test_what_a_model_raises_is_not_told_as_the_tasks_fault(words, tmp_path, monkeypatch, name):
    model = small_llama(0, len(words))

    def broken(*args, **options):
        raise ValueError("a bug of ours")

    monkeypatch.setattr(model.model, "forward", broken)
    found = evaluate.find([name], write_task(tmp_path / "own", "sums"))
    with pytest.raises(ValueError, match=r"^a bug of ours$"):
        evaluate.score(evaluate.language_model(model, words, FEW), name, found, FEW)


# ------------------------------------------------------------------ what a score depends on

GENERATING = (
    "def text(doc):\n    return doc['question'] + tail()\n\nfrom pathlib import Path\ndef tail():\n    return ''\n"
)


@pytest.fixture
def sums(tmp_path):
    folder = write_task(tmp_path / "own", "base", task=None)
    (folder / "base.yaml").rename(folder / "_base")
    write_rows(folder / "train.jsonl", SUMS[6:])
    (folder / "words.py").write_text(GENERATING)
    (folder / "stop.json").write_text("[]")
    fields = {
        "task": "sums",
        "include": "_base",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "base.jsonl"), "train": str(folder / "train.jsonl")},
        },
        "training_split": "train",
        "num_fewshot": 1,
        "doc_to_text": "!function words.text",
    }
    (folder / "sums.yaml").write_text(json.dumps(fields).replace('"!function words.text"', "!function words.text"))
    return folder


def key_of(path, folder, **changes):
    """The whole key, as if by another process: modules and data are read again."""
    settings = replace(FEW, **changes)
    task = evaluate.find(["sums"], folder).leaves["sums"]
    of_model = keys.model_key(path, checkpoint.identity(path), device="cpu", dtype="float32")
    return json.dumps({**of_model, **keys.task_key(task, settings, run.shots(task, settings))}, sort_keys=True)


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 10**9))


def replace_rows(path, rows):
    write_rows(path, rows)
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 10**9))


@pytest.mark.parametrize(
    "change",
    [
        lambda model, own: edit(model / "generation_config.json", "{", '{"repetition_penalty": 9.0,'),
        lambda model, own: edit(model / "config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-02'),
        lambda model, own: edit(model / "tokenizer_config.json", "{", '{"padding_side": "left",'),
        lambda model, own: (model / "chat_template.jinja").write_text("{{ messages }}"),
        lambda model, own: (model / "added_tokens.json").write_text('{"<x>": 299}'),
        lambda model, own: edit(own / "_base", '"max_gen_toks": 4', '"max_gen_toks": 5'),
        lambda model, own: edit(own / "sums.yaml", '"num_fewshot": 1', '"num_fewshot": 2'),
        lambda model, own: edit(own / "words.py", "return ''", "return '!'"),
        lambda model, own: (own / "stop.json").write_text('["and"]'),
        lambda model, own: replace_rows(own / "base.jsonl", [{**SUMS[0], "answer": "1"}, *SUMS[1:]]),
        lambda model, own: replace_rows(own / "train.jsonl", [{**SUMS[6], "answer": "1"}, *SUMS[7:]]),
    ],
    ids=[
        "generation config",
        "config",
        "tokenizer",
        "chat template",
        "added tokens",
        "included file",
        "task file",
        "the task's python",
        "a file beside it",
        "data",
        "data of the examples",
    ],
)
def test_a_key_changes_with_every_file_that_is_read(pair, sums, change):
    (student, _), _ = pair
    before = key_of(student.path, sums)
    assert key_of(student.path, sums) == before
    change(student.path, sums)
    assert key_of(student.path, sums) != before


def test_a_key_changes_with_the_arithmetic_and_the_code(pair, sums, tmp_path, monkeypatch):
    (student, _), _ = pair
    seen = {key_of(student.path, sums)}
    with monkeypatch.context() as patch:
        patch.setenv("SUPRA_KERNEL", "naive")
        seen.add(key_of(student.path, sums))
    torch.set_float32_matmul_precision("high")
    try:
        seen.add(key_of(student.path, sums))
    finally:
        torch.set_float32_matmul_precision("highest")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/their_mixer.py").write_text("class Mixer: ...\n")
    monkeypatch.syspath_prepend(tmp_path / "theirs")
    point = metadata.EntryPoint("theirs", "their_mixer:Mixer", "supra.mixers")
    monkeypatch.setattr(keys, "entry_points", lambda group: [point] if group == "supra.mixers" else [])
    for text in ("class Mixer: ...\n", "class Mixer: pass\n"):
        (tmp_path / "theirs/their_mixer.py").write_text(text)
        keys._code.cache_clear()
        seen.add(key_of(student.path, sums))
    keys._code.cache_clear()
    monkeypatch.setattr(keys, "versions", lambda *names: {"lm_eval": "0"})
    seen |= {key_of(student.path, sums), key_of(student.path, sums, num_fewshot=0)}
    seen |= {key_of(student.path, sums, **{name: 5}) for name in ("batch_size", "max_length", "seed", "limit")}
    assert len(seen) == 11


@pytest.mark.parametrize("group", ["supra.mixers", "supra.archs", "supra.measures"])
def test_a_key_changes_with_what_another_package_brings(tmp_path, monkeypatch, group):
    monkeypatch.syspath_prepend(tmp_path)
    point = metadata.EntryPoint("theirs", "their_part:Part", group)
    monkeypatch.setattr(keys, "entry_points", lambda group: [point] if group == point.group else [])
    seen = set()
    for text in ("class Part: ...\n", "class Part: pass\n"):
        (tmp_path / "their_part.py").write_text(text)
        keys._code.cache_clear()
        seen.add(keys._code())
    keys._code.cache_clear()
    assert len(seen) == 2


def test_a_folder_of_ones_own_is_no_installed_package(pair, sums):
    """Whatever it holds: all beside the task's Python is read."""
    (student, _), _ = pair
    (sums / "__init__.py").touch()
    before = key_of(student.path, sums)
    (sums / "helper.py").write_text("END = '!'\n")
    assert key_of(student.path, sums) != before


def test_a_key_is_made_where_a_process_named_its_precision_in_the_newer_way(pair, sums):
    """After it PyTorch raises for whoever reads an older name."""
    (student, _), _ = pair
    matmul = torch.backends.cuda.matmul
    before, plain = matmul.fp32_precision, key_of(student.path, sums)
    try:
        matmul.fp32_precision = "tf32"
        assert key_of(student.path, sums) != plain
    finally:
        matmul.fp32_precision = before


def test_a_key_names_no_place_and_nothing_that_is_not_read(pair, sums, tmp_path):
    (student, _), _ = pair
    before = key_of(student.path, sums)
    (student.path / "README.md").write_text("words")
    (student.path / "eval").mkdir()
    shutil.copytree(student.path, tmp_path / "elsewhere")
    sums.rename(tmp_path / "moved")
    edit(tmp_path / "moved/sums.yaml", str(sums), str(tmp_path / "moved"))
    (tmp_path / "moved/other.yaml").write_text("task: other\n")
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert key_of(tmp_path / "elsewhere", tmp_path / "moved") == before
    finally:
        torch.set_num_threads(threads)


def test_a_task_that_makes_its_documents_is_known_by_them_not_by_what_it_was_told(tmp_path):
    folder = write_task(tmp_path / "own", "sums")
    told = ({"tokenizer": name, "max_seq_lengths": [length]} for name, length in (("a", 1), ("b", 2)))
    first, second = (evaluate.find(["sums"], folder, metadata=each).leaves["sums"] for each in told)
    assert keys.task_key(first, FEW, 0) == keys.task_key(second, FEW, 0)


DRAWN = """
import random
import numpy
from datasets import Dataset
random.random()
OWN = random.Random(1)
def make(own=False, **_):
    draw = OWN.random if own else random.random
    return {"test": Dataset.from_list([{"q": str(draw()), "a": str(numpy.random.rand())}])}
"""


@pytest.mark.parametrize(("module", "own"), [("drawn", "false"), ("lm_eval/tasks/ruler/cwe_utils", "true")])
def test_documents_that_are_drawn_are_the_same_each_time_and_disturb_no_other_draw(tmp_path, module, own):
    """As RULER's are: from the generators that all share, whatever an import draws; of ruler_cwe from its module's."""
    file = tmp_path / f"{module}.py"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(DRAWN)
    file.with_name("drawn.yaml").write_text(
        f"task: drawn\ncustom_dataset: !function {file.stem}.make\nmetadata:\n  own: {own}\n"
        "test_split: test\noutput_type: generate_until\n"
        "doc_to_text: q\ndoc_to_target: a\nmetric_list:\n  - metric: exact_match\n"
    )
    before = random.getstate(), np.random.get_state()[1].tolist()
    seen = {json.dumps(evaluate.find(["drawn"], tmp_path).leaves["drawn"].eval_docs[0]) for _ in range(2)}
    assert len(seen) == 1
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


def test_data_that_a_ruler_task_fetches_is_not_to_be_prefetched(tmp_path, monkeypatch):
    requests = pytest.importorskip("requests")
    request = requests.Request("GET", "https://far.example/data.json").prepare()
    pool = requests.exceptions.ConnectionError("HTTPSConnectionPool(host='far.example')", request=request)
    way_out = r"reachable \(far\.example does not answer\); .*run `supra eval MODEL --tasks niah --lengths 512,1024`"
    with pytest.raises(NotFoundError, match=way_out), telling.told("niah", None, of_ruler=True):
        raise pool
    with pytest.raises(NotFoundError, match="`supra prefetch --tasks mine`"), telling.told("mine", None, ("mine",)):
        raise pool
    folder = tmp_path / "lm_eval/tasks/ruler"
    folder.mkdir(parents=True)
    for name in ("niah", "mine"):
        kind = {"tag": ["long"]} if name == "niah" else {}
        place = folder if name == "niah" else tmp_path
        (place / f"{name}.yaml").write_text(json.dumps({"task": name, "dataset_path": "far/away", **kind}))
    monkeypatch.setattr(tasks.connection, "reach", lambda: "cannot be reached")
    with pytest.raises(NotFoundError, match="`supra prefetch --tasks mine`"):
        evaluate.find(["mine", "niah", "long"], tmp_path)
    with pytest.raises(NotFoundError, match="run `supra eval MODEL --tasks long --lengths"):
        evaluate.find(["long"], tmp_path)


def test_a_changed_generation_config_is_scored_again(pair, words, tmp_path):
    (student, loads), _ = pair
    found = evaluate.find(["sums"], write_task(tmp_path / "own", "sums"))
    evaluate.evaluate(student, None, found, FEW)
    assert evaluate.evaluate(student, None, found, FEW)["student"]["reused"] == ["sums"]
    edit(student.path / "generation_config.json", "{", '{"repetition_penalty": 9.0,')
    assert evaluate.evaluate(student, None, found, FEW)["student"]["reused"] == []
    assert len(loads) == 2


# ------------------------------------------------------------------ what a task says wrong

BOOM = "def text(doc):\n    return 1 / 0\n\ndef results(doc, answers):\n    raise LookupError('late')\n"
EXACT = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"doc_to_text": "{{questin}}"}, "doc_to_text: the documents have no 'questin'; did you mean 'question'"),
        ({"doc_to_text": "questin"}, "doc_to_text names 'questin'.*did you mean 'question'"),
        ({"doc_to_text": None}, "doc_to_text is missing"),
        ({"doc_to_text": "{{question"}, "doc_to_text: unexpected end of template"),
        ({"doc_to_text": "!function boom.text"}, r"doc_to_text: boom\.py, line 2, raised ZeroDivisionError"),
        ({"doc_to_text": "!function boom.no"}, "no function 'no'"),
        ({"doc_to_txt": "x"}, "no field 'doc_to_txt'; did you mean 'doc_to_text'"),
        ({"doc_to_target": "answr"}, "doc_to_target names 'answr'.*did you mean 'answer'"),
        ({"doc_to_target": "{{answr}}"}, "doc_to_target: the documents have no 'answr'"),
        ({**CHOSEN, "doc_to_choice": "{{choices}}"}, "doc_to_choice: the documents have no 'choices'"),
        ({**CHOSEN, "doc_to_choice": ["a", ""]}, "doc_to_choice: a choice has no text"),
        ({**CHOSEN, "doc_to_target": 7}, "doc_to_target is no choice"),
        ({**CHOSEN, "metric_list": [{"metric": "bleu"}]}, "'bleu' of metric_list is not one that.*multiple_choice"),
        ({"metric_list": [{**EXACT, "metric": "exact_mach"}]}, "'exact_mach'.*did you mean 'exact_match'"),
        ({"metric_list": [{**EXACT, "aggregation": "meen"}]}, "aggregation 'meen'.*did you mean 'mean'"),
        ({"metric_list": [{"metric": "exact_mach"}]}, "'exact_mach'.*did you mean 'exact_match'"),
        (
            {"process_results": "!function boom.results", "metric_list": [{"metric": "mine"}]},
            "metric_list names no aggregation for 'mine'.*`aggregation: mean`",
        ),
        ({"filter_list": [{"name": "x", "filter": [{"function": "regx"}]}]}, "filter_list: Unknown filter 'regx'"),
        ({"process_results": "!function boom.results"}, r"process_results: boom\.py, line 5, raised LookupError: late"),
        ({"generation_kwargs": {"do_sampl": False}}, "generation_kwargs has 'do_sampl'.*did you mean 'do_sample'"),
        ({"output_type": "generate"}, "output_type 'generate'"),
        ({"test_split": "tset"}, "test_split: there is no 'tset'; did you mean 'test'"),
        ({"test_split": None}, "must have valid or test docs"),
        ({"dataset_path": None}, "no dataset_path"),
        ({"rows": []}, "not one document"),
        ({"rows": [*SUMS[:5], {"answer": "1"}]}, "doc_to_text asks for 'question', which document 5 does not have"),
        ({"rows": [*SUMS[:5], {"question": "1"}]}, "doc_to_target asks for 'answer', which document 5 does not have"),
        ({"unsafe_code": True}, "runs code that a model writes"),
    ],
)
def test_a_mistake_in_a_task_names_its_file_and_its_field_before_a_model_is_read(tmp_path, changes, sentence):
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "boom.py").write_text(BOOM)
    write_task(folder, "sums", **changes)
    with pytest.raises(SupraError, match=sentence) as raised:
        evaluate.find(["sums"], folder)
    assert str(folder / "sums.yaml") in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_column_that_some_documents_lack_may_be_asked_for(tmp_path):
    rows = [{**SUMS[0], "hint": None}, *({**row, "hint": "add"} for row in SUMS[1:])]
    text = "{% if hint %}{{hint}}: {% endif %}{{question}}"
    found = evaluate.find(["sums"], write_task(tmp_path / "own", "sums", rows=rows, doc_to_text=text))
    assert list(found.leaves) == ["sums"]


def test_what_only_the_last_document_brings_out_is_told_with_the_task(pair, tmp_path):
    (student, _), _ = pair
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "boom.py").write_text("def text(doc):\n    return str(1 / (int(doc['answer']) - 4))\n")
    found = evaluate.find(["sums"], write_task(folder, "sums", rows=SUMS * 2, doc_to_text="!function boom.text"))
    with pytest.raises(SupraError, match=r"'sums'.*doc_to_text: boom\.py, line 2, raised ZeroDivisionError"):
        evaluate.evaluate(student, None, found, FEW)


@pytest.mark.parametrize(
    ("changes", "settings", "sentence"),
    [
        ({}, {"num_fewshot": 12}, "12 documents to draw examples from, too few for 12 examples"),
        ({"fewshot_split": "test"}, {"num_fewshot": 12}, "too few for 12 examples and a question"),
        ({"train": SUMS[6:8]}, {"num_fewshot": 3}, "2 documents to draw examples from, too few for 3 examples;"),
        ({"generation_kwargs": {"max_gen_toks": 600}}, {}, "up to 600 tokens.*512 tokens of context"),
    ],
)
def test_settings_that_a_task_cannot_have_are_told_before_a_model_is_read(pair, tmp_path, changes, settings, sentence):
    (student, loads), _ = pair
    found = evaluate.find(["sums"], write_task(tmp_path / "own", "sums", **changes))
    with pytest.raises(UsageError, match=sentence):
        evaluate.evaluate(student, None, found, replace(FEW, **settings))
    assert not loads


@pytest.mark.parametrize(
    "examples",
    [
        {"train": SUMS[6:8]},
        {"train": SUMS[6:8], "fewshot_split": "train", "fewshot_config": {"sampler": "first_n"}},
        {"fewshot_config": {"sampler": "first_n", "samples": SUMS[6:8]}},
    ],
    ids=["training split", "split of their own", "in the task file"],
)
def test_examples_from_elsewhere_may_all_be_shown(pair, tmp_path, examples):
    """As mmlu's five of each subject, and the eight that gsm8k_cot brings."""
    (student, _), _ = pair
    found = evaluate.find(["sums"], write_task(tmp_path / "own", "sums", num_fewshot=2, **examples))
    document = evaluate.evaluate(student, None, found, replace(FEW, limit=2))
    assert document["tasks"]["sums"]["num_fewshot"] == 2
    shown = found.leaves["sums"].instances[0].args[0]
    assert all(f"{row['question']} {row['answer']}" in shown for row in SUMS[6:8])


def test_two_files_with_one_task_are_told_and_so_is_a_task_that_a_group_redefines(own):
    (own / "again.yaml").write_text((own / "own_a.yaml").read_text())
    with pytest.raises(SupraError, match=r"two files define 'own_a': .*again\.yaml and .*own_a\.yaml"):
        evaluate.find(["own_a"], own)
    (own / "again.yaml").unlink()
    (own / "both.yaml").write_text("group: own_both\ntask: [{task: own_a, doc_to_text: 'odd? {{q}}'}, own_b]\n")
    with pytest.raises(UsageError, match="'own_a' is asked for in two ways"):
        evaluate.find(["own_a", "own_both"], own)


def test_right_answers_outside_the_choices_are_counted(pair, tmp_path):
    (student, _), _ = pair
    folder = write_task(tmp_path / "own", "sums", **{**CHOSEN, "doc_to_target": "{{ answer|int // 2 }}"})
    document = evaluate.evaluate(student, None, evaluate.find(["sums"], folder), replace(FEW, limit=None))
    assert document["tasks"]["sums"]["outside"] == 8


# ------------------------------------------------------------------ rows by the memory


def test_rows_are_what_a_quarter_of_the_memory_holds_and_the_same_each_time(pair, monkeypatch):
    (student, _), _ = pair
    config = small_llama(0, len(student.load()[1])).config
    token = 4 * (3 * config.vocab_size + 16 * config.hidden_size + 4 * config.intermediate_size)
    numbers = sum(parameter.numel() for parameter in student.load()[0].parameters())

    def rows(whole, free=None, length=100, dtype="float32"):
        monkeypatch.setattr(batch, "_memory", lambda device: (whole, free))
        return evaluate.rows_that_fit(student.path, length, "cpu", dtype)

    weights = 4 * numbers
    assert rows(weights + 4 * 8 * 100 * token) == 8
    assert rows(weights + 4 * 8 * 100 * token - 4) == 4
    assert rows(weights + 4 * 8 * 100 * token, length=400) == 2
    assert rows(weights // 2 + 4 * 8 * 100 * token, dtype="bfloat16") == 8
    assert rows(1 << 50) == 64
    assert rows(10) == rows(None) == 1
    assert rows(weights + 4 * 8 * 100 * token, free=weights + 3 * 100 * token) == 2
    monkeypatch.undo()
    assert evaluate.rows_that_fit(student.path, 512, "cpu", "float32") in (1, 2, 4, 8, 16, 32, 64)
