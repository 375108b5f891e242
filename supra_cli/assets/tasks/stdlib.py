"""The data of the offline tasks, made from held-out documents of the standard library when a task is loaded.

The same Python version gives the same questions in the same order, whatever the model; lm-evaluation-harness alone
runs them too (`lm_eval --include_path <this folder>`) where supra is installed.
"""

from __future__ import annotations

import difflib
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from supra_cli.core.corpus import Document, documents

CONTEXT_LINES = 24
CONTEXT_CHARACTERS = (200, 700)
LINE_CHARACTERS = (20, 100)
QUESTIONS_PER_DOCUMENT = 40
SPREAD = 0.25  # the longest choice is at most this much longer than the shortest
ALIKE = 0.6


class Line(NamedTuple):
    document: int
    number: int
    text: str


def cloze(questions: int = 400, choices: int = 4, seed: int = 0, **_metadata):
    """{"test": questions}, in an order that any `--limit` may cut; the keyword arguments are lm-eval's task
    metadata."""
    from datasets import Dataset

    return {"test": Dataset.from_list(cloze_questions(list(documents("validation")), questions, choices, seed))}


def passages(characters: int = 6000, seed: int = 0, **_metadata):
    """{"test": the first `characters` of every held-out document, cut at a line's end}."""
    from datasets import Dataset

    rows = [
        {"name": document.name, "text": _beginning(document.text, characters)} for document in documents("validation")
    ]
    rows = [row for row in rows if row["text"].strip()]
    random.Random(seed).shuffle(rows)
    return {"test": Dataset.from_list(rows)}


def cloze_questions(held_out: list[Document], questions: int, choices: int, seed: int) -> list[dict]:
    """Questions {name, context, choices, answer}: which of `choices` lines follows the context.

    A distractor is a line of another held-out document, with the same indentation, not in the context and no
    near-duplicate of any other choice. True lines and distractors come from one pool (lines with three words or more,
    found once in all documents), and the lengths of all four lie in one window laid at random around the true line's
    (a window centred on it would make the true line neither the longest nor the shortest): a choice says nothing
    without its context.
    """
    draw = random.Random(seed)
    pool = _pool(held_out)
    by_indentation = defaultdict(list)
    for line in pool:
        by_indentation[_indentation(line.text)].append(line)
    draw.shuffle(pool)
    asked: Counter[int] = Counter()
    result = []
    for line in pool:
        context = _context(held_out[line.document].text, line.number)
        if context is None or asked[line.document] == QUESTIONS_PER_DOCUMENT:
            continue
        others = by_indentation[_indentation(line.text)]
        shortest = len(line.text) - draw.random() * SPREAD * len(line.text.strip())
        lengths = (shortest, shortest + SPREAD * len(line.text.strip()))
        distractors = _distractors(line, context, lengths, draw.sample(others, len(others)), choices - 1)
        if len(distractors) < choices - 1:
            continue
        answer = draw.randrange(choices)
        lines = [*distractors[:answer], line.text, *distractors[answer:]]
        result.append({"name": held_out[line.document].name, "context": context, "choices": lines, "answer": answer})
        asked[line.document] += 1
        if len(result) == questions:
            break
    return result


def _pool(held_out: list[Document]) -> list[Line]:
    lines = [
        Line(document, number, text.rstrip())
        for document, (_, body) in enumerate(held_out)
        for number, text in enumerate(body.split("\n"))
    ]
    found = Counter(line.text.strip() for line in lines)
    return [line for line in lines if found[line.text.strip()] == 1 and _is_telling(line.text.strip())]


def _is_telling(text: str) -> bool:
    shortest, longest = LINE_CHARACTERS
    letters = sum(character.isalpha() for character in text)
    return shortest <= len(text) <= longest and 2 * letters >= len(text) and len(re.findall(r"[^\W\d]{2,}", text)) >= 3


def _context(text: str, number: int) -> str | None:
    """As many whole lines before line `number` as the limits allow, or None where there are too few characters."""
    fewest, most = CONTEXT_CHARACTERS
    before = text.split("\n")[max(0, number - CONTEXT_LINES) : number]
    while before and sum(len(line) + 1 for line in before) > most:
        before = before[1:]
    context = "\n".join(before) + "\n"
    return context if len(context.strip()) >= fewest else None


def _distractors(
    line: Line, context: str, lengths: tuple[float, float], others: Iterable[Line], count: int
) -> list[str]:
    taken: list[str] = []
    for other in others:
        if len(taken) == count:
            break
        if (
            other.document != line.document
            and lengths[0] <= len(other.text) <= lengths[1]
            and other.text.strip() not in context
            and not any(_are_alike(other.text, text) for text in [line.text, *taken])
        ):
            taken.append(other.text)
    return taken


def _are_alike(a: str, b: str) -> bool:
    return difflib.SequenceMatcher(None, a.strip(), b.strip(), autojunk=False).ratio() > ALIKE


def _indentation(text: str) -> int:
    return len(text) - len(text.lstrip())


def _beginning(text: str, characters: int) -> str:
    if len(text) <= characters:
        return text
    return text[: text.rfind("\n", 0, characters) + 1] or text[:characters]
