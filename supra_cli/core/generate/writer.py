"""From tokens to text: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Writer:
    """One completion's text from its tokens: whole characters only, and nothing of a stop string."""

    # Tokens of the prompt that are decoded along, because some decoders drop the space at the start of a text; more
    # where they would begin within a character, with which some decoders lose the bytes of all that follow.
    _CONTEXT = 8

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], stop: Sequence[str] = ()):
        self._tokenizer = tokenizer
        # Special tokens of the prompt decode to nothing, so they would leave the completion at the start of a text.
        ordinary = (token for token in reversed(prompt) if not self._special(token))
        self._ids = [*itertools.islice(ordinary, self._CONTEXT)][::-1]
        while self._text(self._ids).startswith("\ufffd") and (token := next(ordinary, None)) is not None:
            self._ids.insert(0, token)
        self._shown_from, self._shown_to = 0, len(self._ids)
        self._stop = tuple(stop)
        self._held: list[tuple[str, bool]] = []  # (character, whether it is shown)
        self.done = self.stopped = False

    def add(self, token: int) -> str:
        """The text that is certain after one more token: no half character, nothing that may become a stop."""
        if special := self._special(token):
            return self._release(special, shown=False)
        self._ids.append(token)
        before = self._text(self._ids[self._shown_from : self._shown_to])
        text = self._text(self._ids[self._shown_from :])
        if len(text) <= len(before) or text.endswith("\ufffd"):
            return ""
        del self._ids[: self._shown_from]
        self._shown_from, self._shown_to = self._shown_to - self._shown_from, len(self._ids)
        return self._release(text[len(before) :])

    def end(self, token: int) -> str:
        """What was held back before the token that ends the text, which is not shown but may complete a stop string."""
        return self._release(self._text([token], skip_special=False), shown=False) + self.close()

    def close(self) -> str:
        """What was held back, without an incomplete character; nothing comes after it."""
        if self.done:
            return ""
        before = self._text(self._ids[self._shown_from : self._shown_to])
        rest = self._release(self._text(self._ids[self._shown_from :])[len(before) :].rstrip("\ufffd"))
        held, self._held = self._held, []
        self.done = True
        return rest + "".join(character for character, shown in held if shown)

    def _text(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)

    def _special(self, token: int) -> str:
        """The text of a special token, which decoding leaves out; of any other one nothing."""
        return "" if self._text([token]) else self._text([token], skip_special=False)

    def _release(self, text: str, *, shown: bool = True) -> str:
        """What shows of `text` after what was held back, up to the first stop string or to what may become one.

        A stop string is looked for in the text with its special tokens, and in what of it is shown.
        """
        held = self._held + [(character, shown) for character in text]
        index = [at for at, (_, shows) in enumerate(held) if shows]
        whole = "".join(character for character, _ in held)
        visible = "".join(whole[at] for at in index)
        found = [at for at in map(whole.find, self._stop) if at >= 0]
        found += [index[at] for at in map(visible.find, self._stop) if at >= 0]
        if found:
            until, self._held, self.done, self.stopped = min(found), [], True, True
        else:
            possible = [len(whole) - _overlap(whole, stop) for stop in self._stop]
            possible += [index[-common] for stop in self._stop if (common := _overlap(visible, stop))]
            until = min(possible, default=len(held))
            self._held = held[until:]
        return "".join(character for character, shows in held[:until] if shows)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
