"""`supra inspect`: what a model directory holds."""

from __future__ import annotations

import json as jsonlib
from typing import Annotated, Any

import typer

from supra_cli.commands import console, plan


def run(
    model: Annotated[str, typer.Argument(help="Directory, alias or hub id.")],
    verify: Annotated[bool, typer.Option("--verify", help="Hash every weight file and compare.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Show a model directory: base, mixer, layers, sizes, where it comes from. Checks that every tensor is there."""
    from supra_cli.core import hub

    source = hub.resolve(model)
    console.note(f"model: {source}")

    from supra_cli.core import accounting, checkpoint

    folder = hub.fetch(source)
    config = checkpoint.examine(folder)
    unread = checkpoint.verify(folder) if verify else []
    size = accounting.measure(config)
    provenance = checkpoint.read_provenance(folder)
    swap = config.swap
    if json:
        document = {
            "path": str(folder),
            "base_type": swap.base,
            "mixer": swap.mixer if swap.any else None,
            "options": swap.options,
            "verified": verify,
            "verified_by_header": unread,
            "provenance": provenance,
            **plan.model_document(size),
        }
        console.document(document)
        return
    rows = [("path", str(folder)), ("base architecture", swap.base)]
    if swap.any:
        options = ", ".join(f"{key} = {value}" for key, value in swap.options.items())
        rows.append(("mixer", swap.mixer + (f" ({options})" if options else "")))
    rows += plan.model_rows(size)
    rows += [
        (name, _short(provenance[name]))
        for name in ("base", "step", "tokens", "tokens_before", "seconds")
        if provenance.get(name)
    ]
    rows += [(f"written with {name}", version) for name, version in (provenance.get("versions") or {}).items()]
    if verify:
        rows.append(("verified", _verified(unread)))
    console.table(rows)


def _verified(unread: list[str]) -> str:
    """`unread` are the files whose content was hashed now for the first time."""
    if not unread:
        return "every weight file is what was saved"
    more = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
    return (
        f"every weight file is what was saved, {unread[0]}{more} by size and header alone, as converting read no more; "
        "the next time by the hash taken now"
    )


def _short(value: Any) -> str:
    if isinstance(value, int | float):
        return f"{value:,}"
    return value if isinstance(value, str) else jsonlib.dumps(value)
