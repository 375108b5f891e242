"""From tokens to text: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Writer:
    """One completion's text from its tokens: whole characters only, and nothing of a stop string."""

    # Tokens of the prompt that are decoded along, because some decoders drop the space at the start of a text.
    _CONTEXT = 8

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], stop: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._ids = list(prompt[-self._CONTEXT :])
        self._shown_from, self._shown_to = 0, len(self._ids)
        self._stop = tuple(stop)
        self._held = ""
        self.done = False

    def add(self, token: int) -> str:
        """The text that is certain after one more token: no half character, nothing that may become a stop."""
        self._ids.append(token)
        shown = self._text(self._ids[self._shown_from : self._shown_to])
        text = self._text(self._ids[self._shown_from :])
        if len(text) <= len(shown) or text.endswith("\ufffd"):
            return ""
        del self._ids[: self._shown_from]
        self._shown_from, self._shown_to = self._shown_to - self._shown_from, len(self._ids)
        return self._release(text[len(shown) :])

    def close(self) -> str:
        """What was held back, without an incomplete character; nothing comes after it."""
        if self.done:
            return ""
        shown = self._text(self._ids[self._shown_from : self._shown_to])
        rest = self._release(self._text(self._ids[self._shown_from :])[len(shown) :].rstrip("\ufffd"))
        held, self._held = ("" if self.done else self._held), ""
        self.done = True
        return rest + held

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _release(self, text: str) -> str:
        """`text` after what was held back, up to the first stop string or to what may become one."""
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self._held, self.done = "", True
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
