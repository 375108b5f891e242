"""The measures, on models whose answers are known."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from tiny import save_base, tiny_model
from transformers.modeling_outputs import CausalLMOutput

from supra_cli.core import checkpoint, corpus, evaluate, recipe
from supra_cli.core.data import tokenizer as bpe
from supra_cli.core.errors import NonFiniteError, UsageError
from supra_cli.core.evaluate import measuring
from supra_cli.core.evaluate.measures import Material, measures, ratio
from supra_cli.core.lookup import lookup
from supra_cli.core.mixers import mixers
from supra_cli.core.train.loop import uptrain

CERTAIN = 50.0
TEXT = "def read(self): return self\n" * 50


@dataclass
class Config:
    vocab_size: int


class Model(torch.nn.Module):
    """Logits by a formula: `Copying` expects what followed the newest earlier meeting of the last token."""

    device = torch.device("cpu")

    def __init__(self, vocabulary: int):
        super().__init__()
        self.config = Config(vocabulary)

    def forward(self, input_ids, position_ids=None, use_cache=False):
        return CausalLMOutput(logits=self.logits(input_ids))

    def logits(self, ids):
        return torch.zeros(*ids.shape, self.config.vocab_size)


class Copying(Model):
    def logits(self, ids):
        logits = super().logits(ids)
        for row, tokens in enumerate(ids.tolist()):
            after = {}
            for at, token in enumerate(tokens):
                if at:
                    after[tokens[at - 1]] = token
                if token in after:
                    logits[row, at, after[token]] = CERTAIN
        return logits


class Fixed(Model):
    """The first token likelier by `bias` than each other one, everywhere."""

    def __init__(self, vocabulary, bias):
        super().__init__(vocabulary)
        self.bias = bias

    def logits(self, ids):
        logits = super().logits(ids)
        logits[..., 0] = self.bias
        return logits


@pytest.fixture(scope="module")
def material():
    texts = [text for _, text in list(corpus.documents("validation"))[:20]]
    return Material(bpe.train(texts, 300), rows=6, train_length=32, batch_size=4)


@pytest.fixture(scope="module")
def vocabulary(material):
    return len(material.tokenizer)


def ask(name, model, material, **others):
    return measures.get(name)(model, material, **others)


def test_a_model_without_memory_finds_the_second_meeting_as_hard_as_the_first(material, vocabulary):
    for label, figure in ask("repeats", Model(vocabulary), material).items():
        assert figure.value == pytest.approx(1), label
        assert (figure.low, figure.high, figure.n) == (pytest.approx(1), pytest.approx(1), 6)


def test_a_model_that_copies_pays_for_the_first_token_alone(material, vocabulary):
    """The first token of the second meeting cannot be foretold, and may even be foretold wrongly."""
    figures = ask("repeats", Copying(vocabulary), material)
    random = [figure.value for label, figure in figures.items() if label == "random, gap 0"]
    uniform = math.log(vocabulary)
    assert random == [pytest.approx(uniform / (32 * uniform), rel=1e-3)]


def test_a_model_that_copies_knows_every_pair_and_one_that_does_not_none(material, vocabulary):
    for label, figure in ask("recall_pairs", Copying(vocabulary), material).items():
        if label.endswith("gap 0"):
            assert figure.value == pytest.approx(1 if "accuracy" in label else 0, abs=1e-3), label
    for label, figure in ask("recall_pairs", Model(vocabulary), material).items():
        assert figure.value == pytest.approx(0 if "accuracy" in label else math.log(vocabulary), abs=1e-4), label


def test_loss_by_position_covers_each_token_once_in_doubling_bins(material, vocabulary):
    figures = ask("positions", Model(vocabulary), material)
    bins = [tuple(map(int, label.split("–"))) for label in figures]
    assert [edge for low, high in bins for edge in (low, high + 1)] == [
        1, *(edge for edge in (16, 32, 64, 128, 256) for _ in range(2)), 512,
    ]  # fmt: skip
    assert all(figure.value == pytest.approx(math.log(vocabulary)) for figure in figures.values())


def test_the_divergence_is_the_closed_form(material, vocabulary):
    """p = (e^b, 1, ..., 1) / (e^b + V − 1) against the uniform one: Σ p ln p + ln V."""
    bias = 2.0
    total = math.exp(bias) + vocabulary - 1
    p = math.exp(bias) / total
    entropy = -p * math.log(p) - (1 - p) * math.log(1 / total)
    figures = ask("agreement", Model(vocabulary), material, teacher=Fixed(vocabulary, bias))
    assert figures["kl"].value == pytest.approx(math.log(vocabulary) - entropy, abs=1e-5)
    assert figures["top-1"].value == 1  # a tie of all, which the first token wins
    figures = ask("agreement", Fixed(vocabulary, -1.0), material, teacher=Fixed(vocabulary, 1.0))
    assert figures["top-1"].value == 0


def test_a_model_of_ours_is_asked_through_its_head_as_any_other(material):
    """`objective` and whole logits are two ways to the same figures, and the mode of the model is left as it was."""
    model = tiny_model(mixer="window", vocab_size=len(material.tokenizer)).train()

    class Plain(Model):
        def logits(self, ids):
            return model.eval()(input_ids=ids, use_cache=False).logits

    for name in measures:
        whole = ask(name, Plain(len(material.tokenizer)), material, teacher=model)
        ours = ask(name, model.train(), material, teacher=model)
        assert model.training
        for label, figure in ours.items():
            assert figure.value == pytest.approx(whole[label].value, rel=1e-4, abs=1e-5), (name, label)


def test_rows_are_the_same_again_and_ordinary_tokens(material):
    one, other = (material.distinct(50, 20, material.generator(3)) for _ in range(2))
    assert torch.equal(one, other)
    assert not set(one.unique().tolist()) & set(material.tokenizer.all_special_ids)
    assert all(len(row.unique()) == 20 for row in one)
    assert not torch.equal(one, material.distinct(50, 20, material.generator(4)))
    with pytest.raises(UsageError, match="vocabulary"):
        material.distinct(1, 10_000, material.generator(0))


def test_a_question_is_of_what_a_measure_reads(material):
    """So that a model before training, of no recipe, and one after it can be asked the same."""
    longer, given = replace(material, train_length=999), replace(material, lengths=(7,))
    alike = {
        name: {
            "train_length": measuring._questions(name, material, "t") == measuring._questions(name, longer, "t"),
            "lengths": measuring._questions(name, material, "t") == measuring._questions(name, given, "t"),
            "teacher": measuring._questions(name, material, "t") == measuring._questions(name, material, "u"),
        }
        for name in ("repeats", "recall_pairs", "positions", "agreement")
    }
    recall = {"train_length": True, "lengths": False, "teacher": True}
    assert alike == {
        "repeats": recall,
        "recall_pairs": recall,
        "positions": {**recall, "train_length": False},
        "agreement": {"train_length": False, "lengths": True, "teacher": False},
    }
    both = (measuring._questions("positions", replace(each, lengths=(7,)), None) for each in (material, longer))
    assert next(both) == next(both)


def test_the_interval_is_that_of_a_mean():
    """Of a normal sample: ± 1.96 standard errors, to what 1,000 resamples tell."""
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    figure, error = ratio(values), float(values.std() / 20)
    assert figure.value == pytest.approx(float(values.double().mean()))
    assert (figure.high - figure.low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    assert ratio(values * 2, torch.full((400,), 4.0)).value == pytest.approx(figure.value / 2)


@pytest.mark.parametrize("name", ["agreement", "recall_pairs", "repeats", "positions"])
def test_no_figure_is_given_that_is_no_number(material, vocabulary, name):
    model = Fixed(vocabulary, math.nan)
    with pytest.raises(NonFiniteError, match="not finite"):
        ask(name, model, material, teacher=Model(vocabulary))


def test_learned_positions_end_the_rows(material):
    short = Material(material.tokenizer, rows=4, train_length=32, longest=200)
    model = tiny_model("gpt2", "supra", vocab_size=len(material.tokenizer), max_position_embeddings=200)
    assert list(ask("repeats", model, short)) == [
        f"{kind}, gap {gap}" for kind in ("random", "text") for gap in (0, 32, 96)
    ]
    assert list(ask("positions", model, short))[-1] == "128–199"
    ask("recall_pairs", model, short)


@pytest.mark.parametrize("mixer", ["supra", "gated"])
def test_a_model_converted_in_memory_is_the_one_that_convert_writes(tmp_path, mixer):
    base = save_base(tmp_path / "base", ["def read(self): return self"] * 50)
    given = {"mixer": mixer, "options": {}, "keep": "1", "seed": 3}
    checkpoint.convert(base, tmp_path / "student", **given)
    ids = torch.arange(3, 40)[None]
    memory, disk = checkpoint.converted(base, **given), checkpoint.load(tmp_path / "student")
    with torch.no_grad():
        torch.testing.assert_close(memory(ids).logits, disk(ids).logits, rtol=0, atol=0)
    assert memory.config.swap == disk.config.swap
    assert not memory.training


def test_before_training_is_the_conversion_whatever_the_seed_of_later_runs(tmp_path):
    base = save_base(tmp_path / "base", [TEXT])
    (tmp_path / "text.txt").write_text(TEXT)
    student = checkpoint.convert(
        base, tmp_path / "student", mixer="supra", options={}, keep="none", seed=3, base=str(base)
    )
    for seed in (7, 8):
        raw = {
            "base": str(base),
            "seed": seed,
            "data": {"seq_len": 16, "sources": [{"path": str(tmp_path / "text.txt")}]},
            "stages": [{"kind": "finetune", "tokens": 32, "batch_tokens": 32, "lr": 1e-3}],
        }
        run = tmp_path / str(seed)
        list(uptrain(recipe.validate(raw, lookup=lookup), run, model=student))
        student = (run / "last").resolve()
    ours, theirs = (evaluate.Subject(path.name, path, load=lambda: None) for path in (student, base))
    assert evaluate.baselines(ours, theirs)["before training"].changes["seed"] == 3


def test_each_branch_of_a_mixer_is_asked_alone(tmp_path, monkeypatch):
    base = save_base(tmp_path / "base", ["def read(self): return self"] * 50)
    checkpoint.convert(base, tmp_path / "student", mixer="supra", options={}, keep="1", seed=0)
    monkeypatch.setattr(mixers.get("supra"), "branches", ("window", "recurrence"))
    student = evaluate.Subject("student", tmp_path / "student", lambda: (checkpoint.load(tmp_path / "student"), None))
    found = evaluate.baselines(student, None)
    assert list(found) == ["window only", "recurrence only"]
    for role, subject in found.items():
        model, _ = subject.load()
        assert {layer.mixer.only for _, layer in model.swapped_layers()} == {role.removesuffix(" only")}
        assert subject.changes == {"only": role.removesuffix(" only")}  # another key than the student's
