"""Perplexity, recovery and the reuse of scores, against formulas written out here."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from supra_cli.core import corpus, evaluate
from supra_cli.core.data import tokenizer as bpe
from supra_cli.core.errors import NotFoundError, SupraError
from supra_cli.core.evaluate import nats as module
from supra_cli.core.evaluate import run, store, tasks
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
        logits = model(input_ids=row[None]).logits[0].double()
    return -torch.log_softmax(logits, dim=-1)[:-1].gather(1, row[1:, None])[:, 0]


@pytest.fixture
def rows():
    return torch.randint(0, VOCABULARY, (5, 41), generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------ perplexity


def test_token_nats_are_the_formula_and_nan_where_nothing_follows(rows):
    plain = small_llama()
    nats = evaluate.token_nats(plain, rows, batch_size=2)
    for row, got in zip(rows, nats, strict=True):
        torch.testing.assert_close(got[:-1].double(), formula(plain, row), rtol=0, atol=2e-5)  # fp32 sums of 300 terms
    assert nats[:, -1].isnan().all()


@pytest.mark.parametrize("at_once", [1, 5 * 7 * VOCABULARY, 1 << 30])
def test_projecting_the_vocabulary_in_chunks_changes_nothing(rows, at_once, monkeypatch):
    plain = small_llama()
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", at_once)
    nats = evaluate.token_nats(as_supra(plain), rows, batch_size=5)
    torch.testing.assert_close(nats, evaluate.token_nats(plain, rows), rtol=0, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("mixer", ["softmax", "supra"])
def test_documents_in_one_row_score_as_they_do_alone(mixer):
    model = as_supra(small_llama(), mixer)
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


def test_a_loss_that_is_not_finite_is_an_error_that_names_the_row(rows):
    plain = small_llama()
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
        assert (
            question["context"] + question["choices"][question["answer"]]
            in "\n".join(line.rstrip() for line in ("\n" + texts[question["name"]]).split("\n"))
            or question["context"] in texts[question["name"]]
        )


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


def test_cloze_scores_are_the_likelihoods_of_the_lines(pair, words, offline, questions):
    (student, _), _ = pair
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


def test_perplexity_is_told_in_nats_per_token_beside_the_teacher(pair, words, offline):
    (student, _), (teacher, _) = pair
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

    def manager(*, include_path, include_defaults=True):
        assert not include_defaults
        assert include_path == [evaluate.bundled()]
        return whole(include_path=include_path, include_defaults=False)

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
