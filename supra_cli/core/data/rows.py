"""Rows of `seq_len` tokens, mixed from several sources, in an order that depends on the seed alone.

The position in the data is a handful of integers (`Mixture.state`): restoring them yields exactly the rows that would
have come. A row is filled from one source; a document is cut where the row ends and goes on in another row.
"""

from __future__ import annotations

import itertools
import logging
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from supra_cli.core.data import sources
from supra_cli.core.data.packing import Batch, collate, pack
from supra_cli.core.data.tokens import Tokens, tokenised
from supra_cli.core.errors import SupraError
from supra_cli.core.parallel import ALONE, World
from supra_cli.core.recipe import Data, Packing, Source

if TYPE_CHECKING:
    from supra_cli.core.data.streamed import Streamed

_log = logging.getLogger(__name__)


class Stream(Protocol):
    """One source of rows; `state` is what `restore` needs to go on from here."""

    digest: str
    state: dict[str, Any]

    def row(self, length: int) -> tuple[np.ndarray, np.ndarray]: ...


class Epoch(NamedTuple):
    """One pass over a token file: its documents in an order, and the rows of `length` that they fill in another."""

    number: int
    length: int
    documents: np.ndarray
    ends: np.ndarray
    """Where each document ends in that order: in tokens, or in rows where no two share one (`cut`)."""
    rows: np.ndarray


class Documents:
    """Rows of a token file's documents.

    Each epoch has the documents in a new order, and the rows that they fill in another: the rows of a long document one
    after the other would be steps of nothing else. For validation (`seed` None) all stay in their own order. What no
    longer fills a row at an epoch's end is left out of it; rows of another length begin an epoch of their own.
    """

    def __init__(self, tokens: Tokens, seed: tuple[int, ...] | None, packing: Packing = "separate"):
        self._tokens = tokens
        self._seed = seed
        self._packing = packing
        self._epoch: Epoch | None = None
        self.digest = tokens.digest
        self.state = {"epoch": 0, "row": 0, "length": 0}

    def row(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        state, cut = self.state, self._packing == "cut"
        if state["length"] not in (0, length):
            state |= {"epoch": state["epoch"] + 1, "row": 0}
        state["length"] = length
        if self._epoch is None or self._epoch[:2] != (state["epoch"], length):
            self._epoch = self._lay_out(state["epoch"], length)
        epoch = self._epoch
        number = int(epoch.rows[state["row"]])
        state["row"] += 1
        if state["row"] == len(epoch.rows):
            state |= {"epoch": epoch.number + 1, "row": 0}
        place = number if cut else number * length
        turn = int(np.searchsorted(epoch.ends, place, side="right"))
        offset = (place - (int(epoch.ends[turn - 1]) if turn else 0)) * (length if cut else 1)

        def take(most: int) -> np.ndarray:
            nonlocal turn, offset
            document, ends = int(epoch.documents[turn]), self._tokens.ends
            start, end = int(ends[document - 1]) if document else 0, int(ends[document])
            piece = self._tokens.ids[start + offset : min(start + offset + most, end)]
            turn, offset = (turn + 1, 0) if start + offset + len(piece) == end else (turn, offset + len(piece))
            return piece

        return pack(take, length, self._packing)

    def rows_in_an_epoch(self, length: int) -> int:
        return len(self._lay_out(0, length).rows)

    def _lay_out(self, number: int, length: int) -> Epoch:
        sizes = np.diff(self._tokens.ends, prepend=0)
        cut = self._packing == "cut"
        sizes, documents = -(-sizes // length) if cut else sizes, np.arange(len(sizes))
        rows = np.arange(sizes.sum() if cut else sizes.sum() // length)
        if self._seed is not None:
            random = _random(*self._seed, number)
            documents, rows = random.permutation(documents), random.permutation(rows)
        return Epoch(number, length, documents, np.cumsum(sizes[documents]), rows)


class Text(Protocol):
    """Running text to make rows of; `state` is what it needs to go on from here."""

    digest: str
    state: dict[str, Any]

    def text(self, random: np.random.Generator, length: int) -> np.ndarray:
        """The next tokens, `length` of them unless there are fewer in all."""
        ...


class Windows:
    """A token file's text, from places drawn at random."""

    def __init__(self, tokens: Tokens):
        self._ids = tokens.ids
        self.digest = tokens.digest
        self.state: dict[str, Any] = {}

    def text(self, random: np.random.Generator, length: int) -> np.ndarray:
        length = min(length, len(self._ids))
        start = int(random.integers(0, len(self._ids) - length + 1))
        return self._ids[start : start + length]


class Repeats:
    """Rows for learning to recall: a passage, some text, the passage again.

    The passage is text too or, given a `vocabulary`, tokens drawn uniformly from it. Lengths are drawn between 8 and
    128 for the passage and 0 and 64 for what stands between. Such a piece is a document of its own.
    """

    def __init__(
        self,
        source: Text,
        seed: tuple[int, ...],
        packing: Packing = "separate",
        vocabulary: np.ndarray | None = None,
    ):
        self._source = source
        self._seed = seed
        self._packing = packing
        self._vocabulary = vocabulary
        self._row = 0

    @property
    def digest(self) -> str:
        return self._source.digest

    @property
    def state(self) -> dict[str, Any]:
        return {"row": self._row, **self._source.state}

    @state.setter
    def state(self, saved: dict[str, Any]) -> None:
        self._row = saved["row"]
        self._source.state = {key: value for key, value in saved.items() if key != "row"}

    def row(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        random = _random(*self._seed, self._row)
        self._row += 1
        return pack(lambda most: self._piece(random)[:most], length, self._packing)

    def _piece(self, random: np.random.Generator) -> np.ndarray:
        size = int(random.integers(8, 129))
        drawn = self._vocabulary is not None
        passage = random.choice(self._vocabulary, size) if drawn else self._source.text(random, size)
        return np.concatenate([passage, self._source.text(random, int(random.integers(0, 65))), passage])


class Mixture:
    """Rows from several streams. The next row comes from the stream that is furthest behind its weight's share."""

    def __init__(self, streams: list[Stream], weights: list[float], names: list[str]):
        self._streams = streams
        self._weights = np.asarray(weights) / sum(weights)
        self.names = names
        self._rows = [0] * len(streams)
        self._tokens = [0] * len(streams)

    def batch(self, rows: int, length: int) -> Batch:
        pairs = [self._next(length).row(length) for _ in range(rows)]
        return collate([ids for ids, _ in pairs], [positions for _, positions in pairs])

    def _next(self, length: int) -> Stream:
        behind = self._weights * (sum(self._rows) + 1) - self._rows
        chosen = int(behind.argmax())
        self._rows[chosen] += 1
        self._tokens[chosen] += length
        return self._streams[chosen]

    def tokens_by_source(self) -> dict[str, int]:
        return dict(zip(self.names, self._tokens, strict=True))

    def digests(self) -> dict[str, str]:
        return {name: stream.digest for name, stream in zip(self.names, self._streams, strict=True)}

    def state(self) -> dict:
        return {
            "rows": list(self._rows),
            "tokens": list(self._tokens),
            "streams": [dict(stream.state) for stream in self._streams],
            # In the sources' order and without their paths: text that was moved is the same text.
            "digests": [stream.digest for stream in self._streams],
        }

    def restore(self, state: dict) -> None:
        """Go on from `state`. SupraError when the text or the tokenizer is no longer what it was saved with."""
        changed = ["the number of sources"] if len(state["streams"]) != len(self._streams) else []
        for name, stream, saved, digest in zip(
            self.names, self._streams, state["streams"], state["digests"], strict=False
        ):
            if stream.state and stream.state.keys() != saved.keys():  # an older supra's, of another order of rows
                changed += [name]
                continue
            stream.state = dict(saved)  # before its digest is read: a dataset on the hub goes back to its commit
            changed += [name] if stream.digest != digest else []
        if changed:
            raise SupraError(
                f"the data changed since the checkpoint was written ({', '.join(changed)}), or how supra reads it; "
                "put back the same files, tokenizer and version of supra, or start a new run"
            )
        self._rows, self._tokens = list(state["rows"]), list(state["tokens"])


class Sent:
    """A stream that rank 0 alone reads, and sends to the others row by row.

    For datasets on the hub, which are not to be downloaded once a rank. `state` is rank 0's, and so is what is saved.
    """

    def __init__(self, stream: Stream | None, world: World):
        self._stream = stream
        self._world = world
        self.digest: str = world.shared(getattr(stream, "digest", None))

    @property
    def state(self) -> dict[str, Any]:
        return {} if self._stream is None else self._stream.state

    @state.setter
    def state(self, saved: dict[str, Any]) -> None:
        if self._stream is not None:
            self._stream.state = saved
        self.digest = self._world.shared(getattr(self._stream, "digest", None))

    def row(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        return self._world.shared(None if self._stream is None else self._stream.row(length))


def training(data: Data, tokenizer, seed: int, longest: int = 0, world: World = ALONE) -> Mixture:
    """The training rows of a recipe, the same ones on every rank, `longest` being the most tokens that will be asked of
    one, if not its seq_len.
    """
    longest = max(longest, data.seq_len)
    streams: list[Stream] = []
    for number, source in enumerate(data.sources):
        vocabulary = _ordinary(tokenizer) if source.repeat == "random" else None
        # As rank 0 sees it: a folder that lies on one machine alone is a name on the hub for another.
        if world.shared(sources.is_on_hub(source) if world.leads else None):
            opened = _open_hub(source, "train", tokenizer, data.documents) if world.leads else None
            if opened is not None and source.repeat != "no":
                opened = Repeats(opened, (seed, number), data.documents, vocabulary)
            streams.append(opened if world.size == 1 else Sent(opened, world))
            continue
        with world.first():
            tokens = tokenised(source, tokenizer, "train", data.skip_share)
        if len(tokens.ids) < longest and data.documents != "cut":  # where every document has rows of its own
            raise SupraError(
                f"{source.path} has only {len(tokens.ids)} tokens, fewer than one row of {longest}; "
                "add text or lower seq_len"
            )
        if source.repeat == "no":
            streams.append(Documents(tokens, (seed, number), data.documents))
        else:
            streams.append(Repeats(Windows(tokens), (seed, number), data.documents, vocabulary))
    return Mixture(streams, [source.weight for source in data.sources], _names(data.sources))


def held_out(data: Data, tokenizer, commits: dict[str, str] | None = None) -> Batch | None:
    """The validation rows of a recipe, the same ones at every call: spread evenly over a local source's text.

    `commits`, by a source's number, are those at which datasets on the hub are read; what it lacks is put there.
    """
    pairs, commits = [], {} if commits is None else commits
    for sentence in sources.overlap(data):
        _log.warning(sentence)
    for number, source in enumerate(data.validation):
        wanted = data.validation_tokens // len(data.validation) // data.seq_len
        pairs += _spread_rows(source, tokenizer, data, wanted, commits, str(number))
    return collate([ids for ids, _ in pairs], [positions for _, positions in pairs]) if pairs else None


def _spread_rows(
    source: Source, tokenizer, data: Data, wanted: int, commits: dict[str, str], number: str
) -> list[tuple[np.ndarray, np.ndarray]]:
    if sources.is_on_hub(source):
        stream = _open_hub(source, "validation", tokenizer, data.documents, commits.get(number))
        commits[number] = stream.state["commit"]
        drawn = (stream.row(data.seq_len) for _ in range(wanted))
        # A row in which the dataset has started over is left out, and what would follow.
        rows = list(itertools.takewhile(lambda _: stream.state["epoch"] == 0, drawn))
        there = len(rows)
    else:
        stream = Documents(tokenised(source, tokenizer, "validation", data.skip_share), None, data.documents)
        there = stream.rows_in_an_epoch(data.seq_len)
        rows = (stream.row(data.seq_len) for _ in range(there))
    if min(wanted, there) == 0:
        raise SupraError(
            f"{source.path} gives {there} rows of {data.seq_len} tokens for validation and data.validation_tokens asks "
            f"for {wanted}; at least one is needed"
        )
    chosen = set(np.linspace(0, there - 1, min(wanted, there)).round().astype(int).tolist())
    return [row for number, row in enumerate(rows) if number in chosen]


def _open_hub(source: Source, split: str, tokenizer, packing: Packing, commit: str | None = None) -> Streamed:
    from supra_cli.core.data.streamed import open_hub  # importing datasets takes a second that local text need not pay

    return open_hub(source, split, tokenizer, packing, commit)


def _ordinary(tokenizer) -> np.ndarray:
    """Every token but the special ones."""
    return np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)


def _names(group) -> list[str]:
    """One name a source: its path, numbered where two share it."""
    names: list[str] = []
    for source in group:
        name = source.path
        count = sum(1 for other in names if other == name or other.startswith(f"{name}#"))
        names.append(f"{name}#{count + 1}" if count else name)
    return names


def _random(*seed: int) -> np.random.Generator:
    return np.random.default_rng(list(seed))
