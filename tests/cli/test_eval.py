"""`supra eval` and `supra prefetch` as a user meets them: stdout, exit codes, files."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys

import pytest
from tiny import save_base
from transformers import AutoModelForCausalLM

from supra_cli.__main__ import main
from supra_cli.commands import eval
from supra_cli.core import checkpoint, corpus
from supra_cli.core.evaluate.harness import Model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and its student under runs/, both random, and what is no teacher for every question: a model with the
    same tokenizer and 128 learned positions, one with a wider head, one with another tokenizer.
    """
    root = tmp_path_factory.mktemp("work")
    texts = [text for _, text in list(corpus.documents("validation"))[:20]]
    save_base(root / "base", texts, num_hidden_layers=2, max_position_embeddings=256)
    save_base(root / "learned", texts, "gpt2", num_hidden_layers=2, max_position_embeddings=128)
    save_base(root / "other", [text.upper() for text in texts], num_hidden_layers=2)
    shutil.copytree(root / "base", root / "wide")
    wide = AutoModelForCausalLM.from_pretrained(root / "base")
    wide.resize_token_embeddings(308)
    wide.save_pretrained(root / "wide")
    checkpoint.convert(
        root / "base", root / "runs/student", mixer="supra", options={}, keep="none", seed=0, base=str(root / "base")
    )
    return root


@pytest.fixture(autouse=True)
def here(models, tmp_path, monkeypatch):
    monkeypatch.chdir(models)
    monkeypatch.setenv("SUPRA_CACHE", str(tmp_path / "cache"))


def supra(capsys, *arguments):
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def told(err):
    """The error, which is one line."""
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    return line


def test_the_newest_output_is_scored_beside_the_base_that_it_came_from(models, capsys):
    code, out, err = supra(
        capsys, "eval", "--tasks", "stdlib_cloze,stdlib_ppl", "--limit", "4", "--json", "-o", "out/scores.json"
    )
    assert code == 0, err
    document = json.loads(out)
    assert json.loads((models / "out/scores.json").read_text()) == document
    assert set(document["results"]) == {"stdlib_cloze", "stdlib_ppl"}
    for rows in document["results"].values():
        for row in rows.values():
            assert {"student", "teacher", "recovery", "stderr"} <= row.keys()
            assert row["teacher"] is not None
    assert set(document["results"]["stdlib_cloze"]) == {"acc", "acc_norm"}
    assert document["results"]["stdlib_ppl"]["nats_per_token"]["difference"] is not None
    assert document["student"]["model"] == "runs/student"
    assert document["teacher"]["model"] == str(models / "base")
    assert document["student"]["weights"] != document["teacher"]["weights"]
    assert document["tasks"]["stdlib_cloze"]["num_fewshot"] == 0
    assert document["tasks"]["stdlib_cloze"]["bos"] is True
    assert document["settings"] == {
        "limit": 4,
        "num_fewshot": None,
        "batch_size": 8,
        "batch_size_auto": False,
        "apply_chat_template": False,
        "max_length": 256,
        "seed": 1234,
    }
    assert {"lm_eval", "torch", "transformers", "python"} <= document["versions"].keys()
    assert "model: directory runs/student" in err

    kept = json.loads((models / "runs/student/eval/stdlib_cloze.json").read_text())
    assert kept["results"][document["student"]["weights"]]["metrics"] == document["results"]["stdlib_cloze"]
    assert not (models / "base/eval").exists()

    code, again, err = supra(capsys, "eval", "runs/student", "--limit", "4", "--json")
    assert code == 0
    assert err.count("already scored") == 2
    assert json.loads(again)["results"] == document["results"]


def test_a_report_shows_a_run_before_and_after_beside_its_teacher(models, tmp_path, capsys):
    """In a run directory as `uptrain` leaves it, whichever was scored last."""
    run, base = tmp_path / "run", models / "base"
    given = {"mixer": "supra", "options": {}, "keep": "none", "base": str(base)}
    for seed, name in enumerate(("converted", "step-000001")):
        checkpoint.convert(base, run / name, seed=seed, **given)
    (run / "recipe.toml").touch()
    (run / "last").symlink_to("step-000001")
    spent = run / "last" / "supra.json"
    spent.write_text(json.dumps(json.loads(spent.read_text()) | {"tokens": 64, "seconds": 2.0}))
    scores = {}
    measured = {}
    for name in ("last", "converted"):
        asked = ["--tasks", "stdlib_ppl,repeats", "--limit", "2", "--lengths", "0"]
        code, out, err = supra(capsys, "eval", str(run / name), *asked, "--json")
        assert code == 0, err
        scores[name] = json.loads(out)["results"]["stdlib_ppl"]["nats_per_token"]
        measured[name] = json.loads(out)["measures"]["repeats"]["text, gap 0"]
    code, out, err = supra(capsys, "report", str(run), "--json")
    assert code == 0, err
    told = json.loads(out)
    (nats,) = (line for line in told["lines"] if line["metric"] == "nats_per_token")
    assert nats["teacher"] == scores["last"]["teacher"]
    assert nats["before"] == scores["converted"]["student"]
    assert nats["after"] == scores["last"]["student"] != nats["before"]
    assert (nats["questions"], nats["after_stderr"]) == (2, scores["last"]["stderr"])
    assert {"word_perplexity", "byte_perplexity", "bits_per_byte"} < {line["metric"] for line in told["lines"]}
    repeats = told["measures"]["repeats"]["text, gap 0"]
    assert list(repeats) == ["teacher", "after", "before", "untrained window"]
    assert repeats["after"] == measured["last"]["student"] != repeats["before"] == measured["converted"]["student"]
    assert (told["tokens"], told["seconds"]) == (64, 2.0)
    assert not told["notes"]
    shown = supra(capsys, "report", str(run))[1]
    assert re.search(r"stdlib_ppl +nats_per_token +0 +2 +[\d.]+ ± [\d.]+ ", shown)
    assert re.search(r"repeats +text, gap 0 +2 +[\d.]+ \[", shown)


def test_people_get_a_table(capsys):
    code, out, _ = supra(capsys, "eval", "runs/student", "--tasks", "stdlib_cloze", "--limit", "4")
    assert code == 0
    header, *rows = out.splitlines()
    assert header.split() == ["task", "metric", "n-shot", "questions", "student", "teacher", "recovery"]
    assert [row.split()[:4] for row in rows] == [["stdlib_cloze", metric, "0", "4"] for metric in ("acc", "acc_norm")]


@pytest.mark.parametrize("arguments", [["base"], ["runs/student", "--teacher", "none"]])
def test_without_a_teacher_there_is_no_column_for_one(capsys, arguments):
    code, out, _ = supra(capsys, "eval", *arguments, "--tasks", "stdlib_ppl", "--limit", "2")
    assert code == 0
    assert out.splitlines()[0].split() == ["task", "metric", "n-shot", "questions", "score"]


def test_a_model_is_its_own_best_student(capsys):
    code, out, _ = supra(capsys, "eval", "base", "--teacher", "base", "--tasks", "stdlib_ppl", "--limit", "3", "--json")
    assert code == 0
    row = json.loads(out)["results"]["stdlib_ppl"]["nats_per_token"]
    assert (row["difference"], row["difference_stderr"], row["student"]) == (0, 0, row["teacher"])


def test_quiet_leaves_stderr_empty(capsys):
    code, out, err = supra(capsys, "eval", "base", "--tasks", "stdlib_ppl", "--limit", "2", "--quiet", "--fresh")
    assert (code, err) == (0, "")
    assert "nats_per_token" in out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--tasks", "mmlu,hellaswag"], 3, "supra prefetch --tasks mmlu,hellaswag"),
        (["--tasks", "stdlib_cloz"], 3, "did you mean 'stdlib_cloze'"),
        (["--tasks", ","], 2, "no task was named"),
        (["--limit", "3", "--limit", "4"], 2, "--limit is given 2 times"),
        (["-o", "a.json", "--output=b.json"], 2, "--output/-o is given 2 times"),
        (["--tasks", "stdlib_ppl", "--limit", "0"], 2, "--limit"),
        (["--tasks", "stdlib_ppl", "--batch-size", "0"], 2, "--batch-size"),
        (["--tasks", "stdlib_ppl", "--batch-size", "-3"], 2, "--batch-size"),
        (["--tasks", "stdlib_ppl", "--batch-size", "automatic"], 2, "expected a number from 1, or auto"),
        (["--tasks", "stdlib_ppl", "--include-path", "nowhere"], 3, "--include-path"),
        (["--tasks", "stdlib_ppl", "--teacher", "nobody"], 3, "nobody"),
        (["--tasks", "stdlib_ppl", "--dtype", "int3"], 2, "int3"),
        (["--tasks", "stdlib_ppl", "--device", "toaster"], 2, "toaster"),
        (["--tasks", "stdlib_ppl", "-o", "runs"], 2, "folder"),
        (["--tasks", "stdlib_ppl", "-o", "base/config.json/x.json"], 2, "cannot be written (base/config.json: "),
        (["--tasks", "repeats", "--teacher", "learned", "--lengths", "99"], 2, "repeats has no row that fits"),
        (["--tasks", "repeat"], 3, "did you mean 'repeats'"),
        (["--tasks", "stdlib_ppl,agreement", "--lengths", "512"], 2, "--lengths is for positions, recall_pairs"),
        (["--tasks", "repeats", "--num-fewshot", "0"], 2, "--num-fewshot is for tasks of lm-eval"),
        (["--tasks", "repeats", "--include-path", "runs"], 2, "--include-path is for tasks of lm-eval"),
        (["--tasks", "repeats", "--baselines"], 2, "--baselines is for tasks of lm-eval"),
    ],
)
def test_a_mistake_is_one_sentence_and_its_exit_code(capsys, arguments, code, words):
    got, out, err = supra(capsys, "eval", "runs/student", *arguments)
    assert got == code
    assert words in told(err)
    assert out == ""
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["agreement", "--teacher", "none"], "agreement compares with a teacher and there is none"),
        (["positions", "--lengths", "1"], "rows of 2 tokens or more, got 1"),
        (["positions,stdlib_ppl", "--lengths", "0"], "rows of 2 tokens or more, got 0"),
        (["repeats", "--teacher", "other"], "teacher other has another tokenizer than the student"),
        (["agreement", "--teacher", "wide"], "teacher wide has a vocabulary of 308, the student 300"),
        (["stdlib_ppl", "--teacher", "learned", "--max-length", "129"], "learned has 128 positions"),
    ],
)
def test_what_models_cannot_be_asked_is_told_before_one_is_loaded(capsys, monkeypatch, arguments, words):
    monkeypatch.setattr(checkpoint, "load", lambda *given, **named: pytest.fail("a model was loaded"))
    code, _, err = supra(capsys, "eval", "runs/student", "-t", *arguments)
    assert code == 2
    assert words in told(err)


def test_a_teacher_with_fewer_positions_shortens_what_both_are_asked(capsys):
    asked = ["-t", "positions,stdlib_ppl", "--limit", "2", "--teacher", "learned", "--json"]
    code, out, err = supra(capsys, "eval", "runs/student", *asked)
    assert code == 0, err
    document = json.loads(out)
    assert document["settings"]["max_length"] == 128
    assert list(document["measures"]["positions"])[-1] == "64–127"
    code, _, err = supra(capsys, "eval", "learned", "-t", "stdlib_ppl", "--limit", "2", "--max-length", "129")
    assert code == 2
    assert "--max-length is 129 and learned has 128 positions" in told(err)


def test_names_are_checked_before_a_model_is_read(models, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    code, _, err = supra(capsys, "eval", str(broken), "--tasks", "stdlib_cloz")
    assert code == 3
    assert "stdlib_cloze" in told(err)


def test_without_any_model_that_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, _, err = supra(capsys, "eval", "--tasks", "mmlu,hellaswag")
    assert code == 3
    assert "supra convert" in told(err)


def test_a_teacher_that_is_gone_is_told_with_the_way_out(models, tmp_path, capsys):
    student = tmp_path / "student"
    checkpoint.convert("base", student, mixer="supra", options={}, keep="none", seed=0, base=str(tmp_path / "gone"))
    code, _, err = supra(capsys, "eval", str(student), "--tasks", "stdlib_ppl")
    assert code == 3
    assert "--teacher none" in told(err)


def test_prefetch_says_what_it_could_not_reach(capsys):
    code, _, err = supra(capsys, "prefetch", "--tasks", "mmlu")
    assert code == 3
    assert "'mmlu'" in told(err)
    code, _, err = supra(capsys, "prefetch")
    assert code == 2
    code, out, _ = supra(capsys, "prefetch", "base", "--tasks", "stdlib_ppl,stdlib_cloze", "--json")
    assert code == 0
    assert json.loads(out)["tasks"]["stdlib_cloze"] == 400
    code, out, err = supra(capsys, "prefetch", "--tasks", "repeats")
    assert code == 0, err
    assert "needs no download" in out


@pytest.mark.parametrize("tasks", [["-t", "stdlib_cloze", "-t", "stdlib_ppl"], ["--tasks", "stdlib_cloze, stdlib_ppl"]])
def test_tasks_may_be_named_one_by_one_and_together(capsys, tasks):
    code, out, err = supra(capsys, "eval", "runs/student", *tasks, "--limit", "2", "--teacher", "none", "--json")
    assert code == 0, err
    assert set(json.loads(out)["results"]) == {"stdlib_cloze", "stdlib_ppl"}
    code, out, err = supra(capsys, "prefetch", *tasks, "--json")
    assert code == 0, err
    assert set(json.loads(out)["tasks"]) == {"stdlib_cloze", "stdlib_ppl"}


def test_a_batch_size_of_our_own_choice_is_recorded_with_its_number(capsys):
    arguments = ["eval", "runs/student", "-t", "stdlib_ppl", "--limit", "2", "--batch-size"]
    code, out, err = supra(capsys, *arguments, "auto", "--json")
    assert code == 0, err
    settings = json.loads(out)["settings"]
    assert settings["batch_size_auto"] is True
    assert settings["batch_size"] in (1, 2, 4, 8, 16, 32, 64)
    code, out, err = supra(capsys, *arguments, str(settings["batch_size"]), "--json")
    assert json.loads(out)["settings"]["batch_size_auto"] is False
    assert "already scored" in err  # the same number is the same score, whoever chose it
    assert f"{settings['batch_size']} rows a pass (auto)" in supra(capsys, *arguments, "auto")[2]


def test_what_has_no_effect_or_was_cut_is_said(capsys):
    arguments = ["eval", "runs/student", "-t", "stdlib_cloze", "--limit", "2", "--teacher", "none"]
    code, _, err = supra(capsys, *arguments, "--num-fewshot", "3", "--max-length", "64")
    assert code == 0, err
    assert "the task fixes 0 examples; --num-fewshot 3 has no effect" in err
    assert "2 prompts lost their beginning, being longer than 64 tokens" in err
    code, _, err = supra(capsys, "prefetch", "base", "--include-path", ".")
    assert code == 2
    assert "no task is named" in told(err)


def test_long_work_shows_that_it_goes_on(capsys, monkeypatch):
    monkeypatch.setattr(eval, "_SECONDS_A_LINE", 0.05)
    arguments = ["eval", "runs/student", "-t", "stdlib_ppl", "--limit", "4", "--teacher", "none", "--fresh"]
    code, out, err = supra(capsys, *arguments)
    assert code == 0, err
    assert "runs/student: loading, for " in err
    assert re.search(r"runs/student: stdlib_ppl: \d+ of \d+ requests in \d+ s", err)
    assert "requests" not in out


def test_scores_of_a_model_in_the_hubs_cache_are_not_written_there(models, tmp_path, capsys):
    snapshot = tmp_path / "hub/models--a--b/snapshots/0123abc"
    shutil.copytree(models / "runs/student", snapshot, ignore=shutil.ignore_patterns("eval"))
    code, _, err = supra(capsys, "eval", str(snapshot), "-t", "stdlib_ppl", "--limit", "2", "--teacher", "none")
    assert code == 0, err
    assert not (snapshot / "eval").exists()
    assert list((tmp_path / "cache/eval").glob("*/stdlib_ppl.json"))


@pytest.mark.parametrize("model", ["base", "runs/student"])
def test_what_cannot_be_kept_is_shown_and_said_to_be_lost(tmp_path, capsys, monkeypatch, model):
    """Where the cache's folder cannot be made, the model's own or its teacher's."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("SUPRA_CACHE", str(tmp_path / "file"))
    code, out, err = supra(capsys, "eval", model, "-t", "stdlib_ppl,repeats", "--lengths", "0", "--limit", "2")
    assert code == 0, err
    assert "stdlib_ppl" in out
    assert len([line for line in err.splitlines() if "scores cannot be kept in" in line]) == 1
    assert "not all was kept" in err
    assert "kept in " not in err.replace("cannot be kept in", "")


def test_questions_are_asked_in_the_chat_template_and_scored_apart(models, capsys, tmp_path, monkeypatch):
    tuned = tmp_path / "tuned"
    shutil.copytree(models / "base", tuned)
    asked = ("eval", str(tuned), "-t", "stdlib_cloze", "--limit", "2", "--teacher", "none", "--json")
    assert supra(capsys, *asked, "--apply-chat-template")[0] == 2
    tokenizer = checkpoint.load_tokenizer(tuned)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(tuned)
    prompts, original = [], Model._loglikelihood_tokens

    def spy(lm, requests, *given, **named):
        prompts.extend(texts[0] for texts, _, _ in requests)
        return original(lm, requests, *given, **named)

    monkeypatch.setattr(Model, "_loglikelihood_tokens", spy)
    for flags, said in (([], False), (["--apply-chat-template"], True), (["--apply-chat-template"], None)):
        prompts.clear()
        code, out, err = supra(capsys, *asked, *flags)
        assert code == 0, err
        assert json.loads(out)["settings"]["apply_chat_template"] is bool(flags)
        # The third time nothing is asked again.
        assert {prompt.startswith("[user]") for prompt in prompts} == (set() if said is None else {said})


def test_a_measure_stands_beside_its_baselines(models, capsys):
    """Those that were made of the same base in memory, and the student before its training, which `tokens` tells."""
    trained = models / "trained"
    checkpoint.convert("base", trained, mixer="supra", options={}, keep="1", seed=7, base=str(models / "base"))
    spent = trained / "supra.json"
    spent.write_text(json.dumps(json.loads(spent.read_text()) | {"tokens": 64}))
    asked = ["-t", "repeats,agreement,stdlib_cloze", "--limit", "4", "--lengths", "0,16", "--baselines"]
    code, out, err = supra(capsys, "eval", str(trained), *asked, "--json")
    assert code == 0, err
    document = json.loads(out)
    roles = ["student", "teacher", "untrained window", "before training"]
    assert list(document["subjects"]) == roles
    repeats = document["measures"]["repeats"]
    assert list(repeats) == [f"{kind}, gap {gap}" for kind in ("random", "text") for gap in (0, 16)]
    for figures in repeats.values():
        assert list(figures) == roles
        assert all(figure["low"] <= figure["value"] <= figure["high"] for figure in figures.values())
        assert {figure["n"] for figure in figures.values()} == {4}
        # Nothing but supra.json says that it was trained, so it is the one that is converted again, number for number.
        assert figures["before training"] == figures["student"] != figures["teacher"]
    assert set(document["measures"]["agreement"]["kl"]) == set(roles) - {"teacher"}
    for row in document["results"]["stdlib_cloze"].values():
        assert row["baselines"]["before training"]["score"] == row["student"]
        assert list(row["baselines"]) == roles[2:]

    code, again, err = supra(capsys, "eval", str(trained), *asked, "--json")
    assert json.loads(again)["measures"] == document["measures"]
    assert all("repeats" in subject["reused"] for subject in json.loads(again)["subjects"].values())
    code, out, err = supra(capsys, "eval", "base", "-t", "recall_pairs", "--limit", "2")
    assert code == 0, err
    assert out.splitlines()[0].split() == ["measure", "of", "n", "score"]


@pytest.mark.parametrize("tokens_before", [0, 64])
def test_before_training_is_what_the_run_began_with_where_that_was_not_trained(models, tmp_path, capsys, tokens_before):
    """A run that began with a trained model has none such; then it is converted again."""
    run, base = tmp_path / "run", models / "base"
    spent_on = {"converted": {"tokens": tokens_before}, "step-000001": {"tokens": 128, "tokens_before": tokens_before}}
    for seed, (name, tokens) in zip((3, 7), spent_on.items(), strict=True):
        checkpoint.convert(base, run / name, mixer="supra", options={}, keep="1", seed=seed, base=str(base))
        spent = run / name / "supra.json"
        spent.write_text(json.dumps(json.loads(spent.read_text()) | tokens))
    asked = ["-t", "repeats", "--limit", "4", "--lengths", "0", "--json"]
    code, out, err = supra(capsys, "eval", str(run / "step-000001"), *asked)
    assert code == 0, err
    figures = json.loads(out)["measures"]["repeats"]["random, gap 0"]
    # Nothing but supra.json says that the student was trained, so it is the one that is converted again.
    assert (figures["before training"] == figures["student"]) is bool(tokens_before)


LENGTHS = """
from datasets import Dataset
def make(max_seq_lengths=(4096,), **_):
    rows = [{"text": "x" * 20, "max_length": n, "right": "y"} for n in max_seq_lengths for _ in range(9)]
    return {"test": Dataset.from_list(rows)}
def results(doc, answers):
    return {"4096": -1.0, str(doc["max_length"]): doc["max_length"] / 1024}
"""


def test_questions_of_each_length_are_asked_alike(tmp_path, capsys, monkeypatch, caplog):
    """As RULER's tasks make them: one length after the other, and −1 for a length of which there is none."""
    (tmp_path / "lengths.py").write_text(LENGTHS)
    (tmp_path / "lengths.yaml").write_text(
        "task: lengths\ncustom_dataset: !function lengths.make\ntest_split: test\noutput_type: generate_until\n"
        "doc_to_text: text\ndoc_to_target: right\nprocess_results: !function lengths.results\nmetric_list:\n"
        "  - metric: '4096'\n    aggregation: mean\n    higher_is_better: true\n"
        "generation_kwargs:\n  max_gen_toks: 2\n  until: []\n"
    )
    asked = ["-t", "lengths", "--include-path", str(tmp_path), "--teacher", "none", "--json"]
    code, out, err = supra(capsys, "eval", "runs/student", *asked, "--lengths", "512,1024", "--limit", "4")
    assert code == 0, err
    rows = json.loads(out)["results"]["lengths"]
    assert {metric: row["student"] for metric, row in rows.items()} == {"512": 0.5, "1024": 1.0}
    code, _, err = supra(capsys, "eval", "runs/student", *asked, "--lengths", "many")
    assert code == 2
    assert "512,1024" in told(err)
    monkeypatch.setattr(logging.getLogger("lm_eval"), "level", logging.NOTSET)
    with caplog.at_level(logging.WARNING):
        assert supra(capsys, "prefetch", *asked[:4])[0] == 0
    assert "--metadata" not in caplog.text  # an option of lm-eval's command line


def test_ruler_without_its_packages_names_the_extra(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ruler")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    code, _, err = supra(capsys, "eval", "runs/student", "-t", "niah_single_1", "--lengths", "512")
    assert code == 1
    assert "pip install '.[ruler]'" in told(err)


def alone(*arguments):
    """In a process of its own, as nltk and lm-eval write to the streams that they found when they were imported."""
    return subprocess.run([sys.executable, "-m", "supra_cli", *arguments], capture_output=True, text=True)


def test_a_ruler_task_without_lengths_is_told_how_to_be_asked():
    pytest.importorskip("wonderwords")
    done = alone("prefetch", "-t", "niah_single_1")
    assert done.returncode == 2
    assert "--tasks niah_single_1 --lengths 512,1024`, with nothing to prefetch" in told(done.stderr)


def test_a_ruler_task_is_scored_at_the_length_that_is_asked():
    """Where the packages of the extra `ruler` are, and without a network."""
    pytest.importorskip("wonderwords")
    asked = ["-t", "niah_single_1", "--lengths", "512", "--limit", "2", "--teacher", "none", "--json"]
    done = alone("eval", "tiny", *asked)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert list(document["results"]["niah_single_1"]) == ["512"]
    assert document["tasks"]["niah_single_1"]["samples"] == 2


def test_the_share_of_each_letter_is_told_beside_how_often_it_is_right(tmp_path, capsys):
    rows = [{"q": f"question {n}", "answer": n % 4} for n in range(8)]
    (tmp_path / "letters.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "letters.yaml").write_text(
        f"task: letters\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/letters.jsonl\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: [A, B, C, D]\n"
        "doc_to_target: answer\nmetric_list:\n  - metric: acc\n"
    )
    code, out, err = supra(capsys, "eval", "runs/student", "-t", "letters", "--include-path", str(tmp_path), "--json")
    assert code == 0, err
    shares = json.loads(out)["letters"]["letters"]
    assert list(shares) == ["A", "B", "C", "D"]
    for role in ("student", "teacher"):
        assert sum(share[role]["value"] for share in shares.values()) == pytest.approx(1)
    assert [share["right"]["value"] for share in shares.values()] == [0.25] * 4
