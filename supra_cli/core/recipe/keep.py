"""The grammar of `keep`: which layers stay softmax attention."""

from __future__ import annotations

from collections.abc import Collection

from supra_cli.core.errors import UsageError

SOFTMAX = "softmax"
"""The kind of a layer that keeps the base's own attention."""

_EXPECTED = (
    "expected none, all, auto:N or, joined by commas, every:N, first:N, last:N (N from 1), sliding and layer numbers"
)


def layer_kinds(
    layers: int, mixer: str, keep: str, sliding: Collection[int] = (), ranked: Collection[int] = ()
) -> list[str]:
    """The kind of each layer: `mixer`, or softmax where `keep` says so.

    keep is `none`, `all`, `auto:N`, or rules joined by commas, of which each keeps some: `every:N` (layers N-1, 2N-1,
    ...), `first:N`, `last:N`, `sliding` (those that see a window, whose numbers are given) or a layer's number.
    `auto:N` are those that were `ranked` before, N of them. Anything else, a number outside the model, or `sliding`
    where none is, is a UsageError.
    """
    kept: set[int] = set()
    for rule, number in parse(keep):
        if number > (layers - 1 if rule == "number" else layers):
            raise UsageError(
                f"keep is '{keep}' and the model has {layers} layers; N goes from 1 to {layers}, layer numbers from 0 "
                f"to {layers - 1}"
            )
        if rule == "sliding" and not sliding:
            raise UsageError(f"keep is '{keep}' and the model has no sliding layers; leave out 'sliding'")
        if rule == "auto" and len(ranked) != number:
            raise UsageError(
                f"keep is '{keep}', which takes the layers that need it most, and no layer has been ranked; transfer "
                f"attention with keep = 'none' first, then `supra convert STUDENT --keep {keep}`, then go on from that"
            )
        chosen = {
            "none": (),
            "auto": ranked,
            "all": range(layers),
            "every": range(number - 1, layers, max(1, number)),
            "first": range(number),
            "last": range(layers - number, layers),
            "sliding": sliding,
            "number": (number,),
        }
        kept.update(chosen[rule])
    return [SOFTMAX if layer in kept else mixer for layer in range(layers)]


def parse(keep: str) -> list[tuple[str, int]]:
    """The rules with their numbers, 0 where one has none. UsageError for what means nothing for a model of any size."""
    if keep in ("none", "all"):
        return [(keep, 0)]
    if number := automatic(keep):
        return [("auto", number)]
    return [_rule(part.strip(), keep) for part in keep.split(",")]


def automatic(keep: str) -> int:
    """N of `auto:N`, 0 of anything else."""
    rule, _, number = keep.partition(":")
    return int(number) if rule == "auto" and _is_number(number) else 0


def _rule(part: str, keep: str) -> tuple[str, int]:
    rule, colon, number = part.partition(":")
    if part == "sliding":
        return part, 0
    if _is_number(part):
        return "number", int(part)
    if colon and rule in ("every", "first", "last") and _is_number(number) and int(number) >= 1:
        return rule, int(number)
    raise UsageError(f"keep is '{keep}', {_EXPECTED} like 0,5,7")


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10  # more digits than any model has layers
