"""Interpolated n-gram models over token ids: what a language model of the same text has to beat.

Fitted on documents (each begins with a begin token, which is never predicted) and asked for the probability of every
other token of other documents, given at most two tokens of the same document before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_TUNING_SHARE = 20
_BUCKETS = 24
_LEAST = 1e-4
"""What the lower orders keep at least, however sure the upper one is: no token is impossible."""


class Table(NamedTuple):
    """A sparse function of integer codes: `values` at the sorted `codes`, zero elsewhere."""

    codes: np.ndarray
    values: np.ndarray

    def __call__(self, codes: np.ndarray) -> np.ndarray:
        place = np.minimum(np.searchsorted(self.codes, codes), len(self.codes) - 1)
        return np.where(self.codes[place] == codes, self.values[place], 0)


class Text(NamedTuple):
    """Aligned arrays over all predicted tokens: the token and the two before it (the begin token stands for both at
    first).
    """

    token: np.ndarray
    before: np.ndarray
    earlier: np.ndarray

    @staticmethod
    def of(documents: Sequence[Sequence[int]]) -> Text:
        padded = [np.asarray([document[0], *document], np.int64) for document in documents if len(document) > 1]
        parts = [(ids[2:], ids[1:-1], ids[:-2]) for ids in padded]
        return Text(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def count(codes: np.ndarray) -> Table:
    return Table(*np.unique(codes, return_counts=True))


class Interpolated:
    """Jelinek-Mercer: p_n(z | h) = λ_b c(h z)/c(h) + (1 − λ_b) p_{n−1}(z | h'), down to the uniform distribution.

    One weight λ_b for each power-of-two bucket b of c(h), by maximum likelihood (EM) on every twentieth document of
    the training text under counts of the others; the counts are then taken from all of it. (Chen and Goodman 1999,
    section 2.3.)
    """

    def __init__(self, documents: Sequence[Sequence[int]], order: int, vocabulary: int):
        self.order, self.vocabulary = order, vocabulary
        self._count([document for n, document in enumerate(documents) if n % _TUNING_SHARE])
        self.weights = np.zeros((order, _BUCKETS))
        tuning = Text.of(documents[::_TUNING_SHARE])
        below = np.full(len(tuning.token), 1 / vocabulary)
        for n in range(order):
            estimate, bucket = self._estimate(tuning, n)
            self.weights[n] = _best_weights(estimate, below, bucket)
            below = _mixed(self.weights[n][bucket], estimate, below)
        self._count(documents)

    def probabilities(self, documents: Sequence[Sequence[int]]) -> np.ndarray:
        """p of every token but the first of each document, in order."""
        text = Text.of(documents)
        result = np.full(len(text.token), 1 / self.vocabulary)
        for n in range(self.order):
            estimate, bucket = self._estimate(text, n)
            result = _mixed(self.weights[n][bucket], estimate, result)
        return result

    def _count(self, documents: Sequence[Sequence[int]]) -> None:
        text = Text.of(documents)
        self._joint = [count(self._code(text, n, token=True)) for n in range(self.order)]
        self._history = [count(self._code(text, n, token=False)) for n in range(self.order)]

    def _code(self, text: Text, n: int, *, token: bool) -> np.ndarray:
        """One integer for the history of n tokens, followed by the token itself if wanted."""
        code = np.zeros_like(text.token)
        for part in (text.earlier, text.before)[2 - n :]:
            code = code * self.vocabulary + part
        return code * self.vocabulary + text.token if token else code

    def _estimate(self, text: Text, n: int) -> tuple[np.ndarray, np.ndarray]:
        """(c(h z)/c(h), bucket of c(h)) for histories of n tokens; bucket 0 is c(h) = 0."""
        history = self._history[n](self._code(text, n, token=False))
        joint = self._joint[n](self._code(text, n, token=True))
        bucket = np.where(history > 0, 1 + np.log2(np.maximum(history, 1)).astype(int), 0)
        return joint / np.maximum(history, 1), np.minimum(bucket, _BUCKETS - 1)


class KneserNey:
    """Interpolated Kneser-Ney with one discount D = n1 / (n1 + 2 n2) for each order: the strongest of the classical
    trigrams.

    p(z|xy) = max(c(xyz) − D, 0)/c(xy) + D N(xy·)/c(xy) p(z|y), where the lower orders count distinct histories
    instead of occurrences: p(z|y) from N(·yz), p(z) from N(·z), and what p(z) leaves goes to the uniform
    distribution.
    """

    def __init__(self, documents: Sequence[Sequence[int]], vocabulary: int):
        text, v = Text.of(documents), vocabulary
        self.vocabulary = vocabulary
        trigrams = count((text.earlier * v + text.before) * v + text.token)
        bigrams = count(trigrams.codes % (v * v))
        unigrams = count(bigrams.codes % v)
        self._levels = [_level(table, v) for table in (unigrams, bigrams, trigrams)]

    def probabilities(self, documents: Sequence[Sequence[int]]) -> np.ndarray:
        text, v = Text.of(documents), self.vocabulary
        result = np.full(len(text.token), 1 / v)
        histories = (np.zeros_like(text.token), text.before, text.earlier * v + text.before)
        for history, (joint, total, kinds, discount) in zip(histories, self._levels, strict=True):
            seen = total(history)
            kept = np.maximum(joint(history * v + text.token) - discount, 0)
            rest = discount * kinds(history)
            result = np.where(seen > 0, (kept + rest * result) / np.maximum(seen, 1), result)
        return result


def _level(joint: Table, vocabulary: int) -> tuple[Table, Table, Table, float]:
    """(c(h z), c(h), N(h·), D) from the counts of one order."""
    histories, first = np.unique(joint.codes // vocabulary, return_index=True)
    ones, twos = (np.count_nonzero(joint.values == n) for n in (1, 2))
    return (
        joint,
        Table(histories, np.add.reduceat(joint.values, first)),
        Table(histories, np.diff([*first, len(joint.codes)])),
        max(_LEAST, ones / max(1, ones + 2 * twos)),
    )


def _mixed(weight: np.ndarray, upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    return weight * upper + (1 - weight) * lower


def _best_weights(upper: np.ndarray, lower: np.ndarray, bucket: np.ndarray, rounds: int = 50) -> np.ndarray:
    """λ_b that maximise Σ ln(λ_b upper + (1 − λ_b) lower) over each bucket; a history never seen (bucket 0) has λ =
    0.
    """
    weights = np.full(_BUCKETS, 0.5)
    weights[0] = 0
    for _ in range(rounds):
        share = weights[bucket] * upper / _mixed(weights[bucket], upper, lower)
        sizes = np.bincount(bucket, minlength=_BUCKETS)
        sums = np.bincount(bucket, share, minlength=_BUCKETS)
        weights[1:] = np.where(sizes[1:] > 0, sums[1:] / np.maximum(sizes[1:], 1), weights[1:])
    return np.minimum(weights, 1 - _LEAST)
