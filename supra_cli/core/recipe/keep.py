"""The grammar of `keep`: which layers stay softmax attention."""

from __future__ import annotations

from supra_cli.core.errors import UsageError

SOFTMAX = "softmax"
"""The kind of a layer that keeps the base's own attention."""


def layer_kinds(layers: int, mixer: str, keep: str) -> list[str]:
    """The kind of each layer: `mixer`, or softmax where `keep` says so.

    keep is `none`, `all`, `every:N` (layers N-1, 2N-1, ...), `first:N`, `last:N` or layer numbers like `0,5,7`;
    anything else, or a number outside the model, is a UsageError.
    """
    rule, numbers = parse(keep)
    count = numbers[0] if numbers else 0
    if max(numbers, default=0) > (layers - 1 if rule == "numbers" else layers):
        raise UsageError(
            f"keep is '{keep}' and the model has {layers} layers; N goes from 1 to {layers}, layer numbers from 0 to "
            f"{layers - 1}"
        )
    match rule:
        case "every":
            kept = range(count - 1, layers, count)
        case "last":
            kept = range(layers - count, layers)
        case "numbers":
            kept = numbers
        case _:
            kept = range({"none": 0, "all": layers}.get(rule, count))
    return [SOFTMAX if layer in kept else mixer for layer in range(layers)]


def parse(keep: str) -> tuple[str, list[int]]:
    """(rule, its numbers), the rule being none, all, every, first, last or numbers.

    UsageError for what means nothing for a model of any size.
    """
    rule, colon, number = keep.partition(":")
    if keep in ("none", "all"):
        return keep, []
    if colon and rule in ("every", "first", "last") and _is_number(number) and int(number) >= 1:
        return rule, [int(number)]
    numbers = [number.strip() for number in keep.split(",")]
    if all(map(_is_number, numbers)):
        return "numbers", [int(number) for number in numbers]
    raise UsageError(
        f"keep is '{keep}', expected none, all, every:N, first:N, last:N (N from 1) or layer numbers like 0,5,7"
    )


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10  # more digits than any model has layers
