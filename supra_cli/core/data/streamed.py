"""A dataset on the hub, read as a stream: nothing is downloaded whole, and the position can be saved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import numpy as np
import pyarrow

from supra_cli.core import connection
from supra_cli.core.data.packing import pack
from supra_cli.core.data.tokens import encode, tokenizer_digest
from supra_cli.core.errors import NotAuthorisedError, NotFoundError, SupraError, first_line, near_miss
from supra_cli.core.recipe import Packing, Source

OpenAt = Callable[[str | None], tuple[datasets.IterableDataset, str]]
"""commit -> (the dataset as it is at that commit, the commit); None is what the source's revision names now."""


class Streamed:
    """Rows from the texts of an iterable dataset, in the dataset's own order; at its end it starts over.

    `state` holds the dataset's commit, its own position before the current document and how many of that document's
    tokens are used. A state of another commit opens the dataset anew at that one, so that a run goes on with the text
    that it was started with, whatever was pushed since. A record without text is passed over.
    """

    def __init__(
        self,
        open_at: OpenAt,
        source: Source,
        split: str,
        tokenizer,
        packing: Packing = "separate",
        commit: str | None = None,
    ):
        self._open_at = open_at
        self._path, self._field = source.path, source.text
        self._identity = [source.path, source.name, split, source.text, tokenizer_digest(tokenizer)]
        self._tokenizer = tokenizer
        self._packing = packing
        self._open(commit)
        self.state = {"commit": self._commit, "dataset": self._start, "offset": 0, "epoch": 0}

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps([*self._identity, self._commit]).encode()).hexdigest()

    @property
    def state(self) -> dict[str, Any]:
        return {"commit": self._commit, "dataset": self._before, "offset": self._offset, "epoch": self._epoch}

    @state.setter
    def state(self, saved: dict[str, Any]) -> None:
        if saved["commit"] != self._commit:
            self._open(saved["commit"])
        self._before, self._offset, self._epoch = saved["dataset"], saved["offset"], saved["epoch"]
        self._document: np.ndarray | None = None
        self._rewind(self._before)

    def row(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        return pack(self._take, length, self._packing)

    def text(self, random: np.random.Generator, length: int) -> np.ndarray:
        """The next `length` tokens, of as many records as it takes; nothing is drawn at random."""
        pieces, missing = [], length
        while missing:
            pieces.append(self._take(missing))
            missing -= len(pieces[-1])
        return np.concatenate([np.zeros(0, np.int64), *pieces])

    def _open(self, commit: str | None) -> None:
        self._dataset, self._commit = self._open_at(commit)
        self._start = self._dataset.state_dict()

    def _take(self, most: int) -> np.ndarray:
        if self._document is None:
            self._document = self._read()
        piece = self._document[self._offset : self._offset + most]
        self._offset += len(piece)
        if self._offset == len(self._document):
            self._before, self._offset, self._document = self._dataset.state_dict(), 0, None
        return piece

    def _read(self) -> np.ndarray:
        """The tokens of the next record with text; the first one again after the last."""
        started_over = False
        while True:
            with _told(self._path):
                record = next(self._records, None)
            if record is None:
                if started_over:
                    raise SupraError(f"dataset {self._path} has no record with text in '{self._field}' to train on")
                started_over, self._epoch, self._before = True, self._epoch + 1, self._start
                self._rewind(self._start)
                continue
            if self._field not in record:
                raise SupraError(f"dataset {self._path} has no field '{self._field}'{near_miss(self._field, record)}")
            text = record[self._field]
            if text is not None and not isinstance(text, str):
                kind = type(text).__name__
                raise SupraError(f"field '{self._field}' of dataset {self._path} is {kind}, expected text")
            if text and (ids := next(iter(encode([text], self._tokenizer)))):
                return np.asarray(ids, np.int64)
            self._before = self._dataset.state_dict()

    def _rewind(self, position: dict[str, Any]) -> None:
        self._dataset.load_state_dict(position)
        self._records = iter(self._dataset)


@contextmanager
def _told(path: str) -> Iterator[None]:
    """What breaks a stream off, as a sentence: a connection, a file that is not what the dataset says."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except (OSError, ValueError, HTTPError, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
        raise SupraError(
            f"dataset {path} cannot be read on: {first_line(error)}; go on from the last checkpoint with --resume"
        ) from error


def open_hub(source: Source, split: str, tokenizer, packing: Packing, commit: str | None = None) -> Streamed:
    """The stream of a hub dataset, pinned to `commit` or else to the one that its revision names now.

    Raises NotFoundError when it cannot be reached or does not exist, NotAuthorisedError when it is gated.
    """
    split = source.split or split
    return Streamed(lambda commit: _dataset(source, split, commit), source, split, tokenizer, packing, commit)


def _dataset(source: Source, split: str, commit: str | None) -> tuple[datasets.IterableDataset, str]:
    from huggingface_hub import HfApi, errors

    revision = commit or source.revision
    connection.check_token()
    try:
        with connection.answers():
            commit = HfApi().dataset_info(source.path, revision=revision).sha
        return datasets.load_dataset(source.path, source.name, split=split, revision=commit, streaming=True), commit
    except (errors.GatedRepoError, datasets.exceptions.DatasetNotFoundError) as error:
        if isinstance(error, errors.GatedRepoError) or "gated" in str(error):
            raise NotAuthorisedError(
                f"dataset {source.path} is gated: accept its terms on its hub page, "
                "then run `hf auth login` or set HF_TOKEN"
            ) from error
        raise NotFoundError(f"there is no dataset '{source.path}' on the hub: {first_line(error)}") from error
    except errors.RevisionNotFoundError as error:
        raise NotFoundError(f"dataset {source.path} has no revision '{revision}' (any more) on the hub") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise NotFoundError(f"there is no data '{source.path}', neither here nor on the hub; check the path") from error
    except errors.FileMetadataError as error:
        raise connection.no_hub() from error
    except (errors.OfflineModeIsEnabled, errors.HTTPError, ConnectionError, TimeoutError) as error:
        raise NotFoundError(
            f"dataset {source.path} cannot be reached: the hub is offline or switched off; "
            "copy its files to this machine and name them as the source's path"
        ) from error
    except ValueError as error:
        raise NotFoundError(f"dataset {source.path}: {first_line(error)}") from error
