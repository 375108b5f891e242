"""The errors a user may see: one sentence each, one exit code each.

A `SupraError` means that the user, their files or their machine must change something; its text says what was got, what
was expected and what to do. A programmer's mistake raises ValueError or TypeError instead.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SupraError(Exception):
    """Failed at run time: a damaged file, a full disk, a non-finite loss."""

    exit_code = 1
    lasting = False
    """Whether a process that is started again, with nothing mended, would end in the same way."""


class UsageError(SupraError):
    """The command line or the recipe asks for something that cannot be."""

    exit_code = 2
    lasting = True


class NotFoundError(SupraError):
    """A model, a data source or a task that is not there, or not reachable offline."""

    exit_code = 3
    lasting = True


class NotAuthorisedError(SupraError):
    """A gated or private repository without the right token."""

    exit_code = 4
    lasting = True


class ResourceError(SupraError):
    """Out of memory, or hardware that cannot do this."""

    exit_code = 5
    lasting = True


class NonFiniteError(SupraError):
    """A loss or gradient is not a number, and a run is not to go on without it."""

    lasting = True

    @classmethod
    def of(cls, what: str) -> NonFiniteError:
        """What a model that computes no numbers comes to; `what` begins the sentence, its verb included."""
        return cls(f"{what} not finite; check the model's weights and dtype")


class Stopped(SupraError):
    """Stopped by a signal after everything was saved; `--resume` goes on."""

    exit_code = 75


class Elsewhere(SupraError):
    """Ended because another rank of the run did, which has said why."""

    def __init__(self, exit_code: int):
        super().__init__()
        self.exit_code = exit_code


def first_line(error: BaseException) -> str:
    """The first line that another library's error says, for one sentence of ours; its type when it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def near_miss(name: str, known: Iterable[str]) -> str:
    """The words to append to "unknown name": `; did you mean 'supra'?`, or the known names when nothing is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(known)}" if known else ""
