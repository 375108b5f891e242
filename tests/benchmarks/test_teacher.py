"""The n-gram models that the teacher is measured against, beside the textbook's formulas with dictionaries."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.ngrams import Interpolated, KneserNey
from benchmarks.teacher import surprise_of_repeats, wilson, windows

VOCABULARY = 6


@pytest.fixture(scope="module")
def documents():
    random = np.random.default_rng(0)
    moves = random.dirichlet(np.full(VOCABULARY - 1, 0.3), (VOCABULARY, VOCABULARY))
    result = []
    for length in random.integers(2, 40, 60):
        document = [0, 0]
        while len(document) < length + 2:
            document.append(1 + int(random.choice(VOCABULARY - 1, p=moves[document[-2], document[-1]])))
        result.append(document[1:])
    return result


def triples(documents):
    for document in documents:
        padded = [document[0], *document]
        yield from zip(padded, padded[1:], padded[2:], strict=False)


@pytest.mark.parametrize("order", [1, 2, 3, "kneser-ney"])
def test_probabilities_of_all_next_tokens_sum_to_one(documents, order):
    train = documents[:50]
    model = KneserNey(train, VOCABULARY) if order == "kneser-ney" else Interpolated(train, order, VOCABULARY)
    for context in ([0], [0, 3], [0, 1, 2], [0, 5, 5], [0, 2, 4]):
        last = [model.probabilities([[*context, token]])[-1] for token in range(VOCABULARY)]
        assert sum(last) == pytest.approx(1)
        assert min(last) > 0


def test_kneser_ney_is_the_textbooks(documents):
    train, asked = documents[:50], documents[50:]
    three = Counter(triples(train))
    two = Counter((y, z) for _, y, z in three)
    one = Counter(z for _, z in two)

    def discount(counts):
        ones, twos = (sum(value == n for value in counts.values()) for n in (1, 2))
        return max(1e-4, ones / max(1, ones + 2 * twos))

    def level(counts, history, token, below):
        of_history = {key: value for key, value in counts.items() if key[:-1] == history}
        total, d = sum(of_history.values()), discount(counts)
        if total == 0:
            return below
        return max(of_history.get((*history, token), 0) - d, 0) / total + d * len(of_history) / total * below

    expected = []
    for x, y, z in triples(asked):
        p = level({(key,): value for key, value in one.items()}, (), z, 1 / VOCABULARY)
        expected.append(level(three, (x, y), z, level(two, (y,), z, p)))
    np.testing.assert_allclose(KneserNey(train, VOCABULARY).probabilities(asked), expected, rtol=1e-12)


def test_interpolation_is_the_formula_with_its_weights(documents):
    train, asked = documents[:50], documents[50:]
    model = Interpolated(train, 3, VOCABULARY)
    all_triples = list(triples(train))
    expected = []
    for x, y, z in triples(asked):
        p = 1 / VOCABULARY
        for n, history in enumerate(((), (y,), (x, y))):
            same = [third for first, second, third in all_triples if (first, second)[2 - n :] == history]
            weight = model.weights[n][int(np.log2(len(same))) + 1 if same else 0]
            p = weight * (same.count(z) / len(same) if same else 0) + (1 - weight) * p
        expected.append(p)
    np.testing.assert_allclose(model.probabilities(asked), expected, rtol=1e-12)


def test_weights_are_those_of_highest_likelihood_on_the_tuning_documents(documents):
    tuning, rest = documents[::20], [document for n, document in enumerate(documents) if n % 20]
    model = Interpolated(documents, 3, VOCABULARY)
    chosen = model.weights.copy()
    model._count(rest)
    best = np.log(model.probabilities(tuning)).sum()
    for bucket in range(1, 6):
        for change in (-0.02, 0.02):
            model.weights = chosen.copy()
            model.weights[2, bucket] = np.clip(chosen[2, bucket] + change, 0, 1 - 1e-4)
            assert np.log(model.probabilities(tuning)).sum() <= best + 1e-3  # 50 rounds of EM are near the top


def test_on_text_with_memory_longer_context_is_better(documents):
    train, asked = documents[:50], documents[50:]
    nats = [-np.log(Interpolated(train, n, VOCABULARY).probabilities(asked)).mean() for n in (1, 2, 3)]
    assert nats[2] < nats[0]
    assert -np.log(KneserNey(train, VOCABULARY).probabilities(asked)).mean() < nats[0]


def test_windows_predict_every_token_but_the_first_once(documents):
    tokens, labels = windows(documents, 8, fill=-1)
    predicted = labels[labels != -100].tolist()
    assert predicted == [token for document in documents for token in document[1:]]
    seen = tokens[labels != -100].tolist()
    assert seen == [token for document in documents for token in document[:-1]]


def test_the_interval_is_wilsons():
    interval = wilson(0.4, 100)
    for end in interval.values():  # its ends solve |p − x| = z √(x (1 − x) / n)
        assert abs(0.4 - end) == pytest.approx(1.959964 * np.sqrt(end * (1 - end) / 100))


WORDS = 300


class Copier(torch.nn.Module):
    """Says the token that followed the last time, with probability 0.9 + 0.1/V; all tokens alike the first time."""

    device = torch.device("cpu")

    def forward(self, input_ids, position_ids=None, use_cache=False):
        probabilities = torch.full((*input_ids.shape, WORDS), 1 / WORDS)
        for n, row in enumerate(input_ids.tolist()):
            followed = {}
            for t, token in enumerate(row):
                if token in followed:
                    probabilities[n, t] = 0.1 / WORDS
                    probabilities[n, t, followed[token]] += 0.9
                if t + 1 < len(row):
                    followed[token] = row[t + 1]
        return SimpleNamespace(logits=probabilities.log())


@pytest.mark.parametrize("between", [0, 7])
def test_a_repeated_passage_surprises_a_copier_once(between):
    tokens = torch.stack([torch.randperm(WORDS, generator=torch.Generator().manual_seed(n)) for n in range(3)])
    before, passage, middle = tokens[:, :4], tokens[:, 4:36], tokens[:, 36 : 36 + between]
    repeat = surprise_of_repeats(Copier(), before, passage, middle)
    assert repeat.first == pytest.approx((math.log(WORDS), 3 * 32))
    known = 0.9 + 0.1 / WORDS
    # Nothing tells where the second passage begins: the token before it came for the first time, whatever the gap.
    expected = (math.log(WORDS) + 31 * -math.log(known)) / 32
    assert repeat.second.nats == pytest.approx(expected, abs=1e-5)
    assert repeat.ratio == pytest.approx(repeat.second.nats / repeat.first.nats)
