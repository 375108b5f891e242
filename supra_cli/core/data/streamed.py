"""A dataset on the hub, read as a stream: nothing is downloaded whole, and the position can be saved."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import datasets
import numpy as np

from supra_cli.core.data.packing import pack
from supra_cli.core.data.tokens import encode, tokenizer_digest
from supra_cli.core.errors import NotAuthorisedError, NotFoundError, SupraError, first_line, near_miss
from supra_cli.core.recipe import Packing, Source


class Streamed:
    """Rows from the texts of an iterable dataset, in the dataset's own order; at its end it starts over.

    `state` holds the dataset's own position before the current document and how many of that document's tokens are
    used.
    """

    def __init__(
        self, dataset: datasets.IterableDataset, field: str, tokenizer, digest: str, packing: Packing = "separate"
    ):
        self._dataset = dataset
        self._field = field
        self._tokenizer = tokenizer
        self._packing = packing
        self._start = dataset.state_dict()
        self.digest = digest
        self.state = {"dataset": self._start, "offset": 0, "epoch": 0}

    @property
    def state(self) -> dict[str, Any]:
        return {"dataset": self._before, "offset": self._offset, "epoch": self._epoch}

    @state.setter
    def state(self, saved: dict[str, Any]) -> None:
        self._before, self._offset, self._epoch = saved["dataset"], saved["offset"], saved["epoch"]
        self._document: np.ndarray | None = None
        self._rewind(self._before)

    def row(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        return pack(self._take, length, self._packing)

    def _take(self, most: int) -> np.ndarray:
        if self._document is None:
            self._document = self._read()
        piece = self._document[self._offset : self._offset + most]
        self._offset += len(piece)
        if self._offset == len(self._document):
            self._before, self._offset, self._document = self._dataset.state_dict(), 0, None
        return piece

    def _read(self) -> np.ndarray:
        """The tokens of the next record; the first one again after the last."""
        record = next(self._records, None)
        if record is None:
            self._epoch += 1
            self._before = self._start
            self._rewind(self._start)
            record = next(self._records, None)
            if record is None:
                raise SupraError("the dataset has no record to train on")
        if self._field not in record:
            raise SupraError(f"the dataset has no field '{self._field}'{near_miss(self._field, record)}")
        return np.asarray(next(iter(encode([record[self._field] or ""], self._tokenizer))), np.int64)

    def _rewind(self, position: dict[str, Any]) -> None:
        self._dataset.load_state_dict(position)
        self._records = iter(self._dataset)


def open_hub(source: Source, split: str, tokenizer, packing: Packing) -> Streamed:
    """The stream of a hub dataset, pinned to the commit that its revision names now.

    Raises NotFoundError when it cannot be reached or does not exist, NotAuthorisedError when it is gated.
    """
    from huggingface_hub import HfApi, errors

    try:
        commit = HfApi().dataset_info(source.path, revision=source.revision).sha
        dataset = datasets.load_dataset(
            source.path, source.name, split=source.split or split, revision=commit, streaming=True
        )
    except (errors.GatedRepoError, datasets.exceptions.DatasetNotFoundError) as error:
        if isinstance(error, errors.GatedRepoError) or "gated" in str(error):
            raise NotAuthorisedError(
                f"dataset {source.path} is gated: accept its terms on its hub page, "
                "then run `hf auth login` or set HF_TOKEN"
            ) from error
        raise NotFoundError(f"there is no dataset '{source.path}' on the hub: {first_line(error)}") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise NotFoundError(f"there is no data '{source.path}', neither here nor on the hub; check the path") from error
    except (errors.OfflineModeIsEnabled, errors.HTTPError, ConnectionError, TimeoutError) as error:
        raise NotFoundError(
            f"dataset {source.path} cannot be reached: the hub is offline or switched off; "
            "copy its files to this machine and name them as the source's path"
        ) from error
    except ValueError as error:
        raise NotFoundError(f"dataset {source.path}: {first_line(error)}") from error
    identity = [source.path, commit, source.name, source.split or split, source.text, tokenizer_digest(tokenizer)]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    return Streamed(dataset, source.text, tokenizer, digest, packing)
