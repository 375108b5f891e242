"""`supra export`: a converted model for people without supra."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from supra_cli.commands import console


def run(
    model: Annotated[str, typer.Argument(help="Directory of a converted model or of a run, or hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write.")],
    dtype: Annotated[
        str, typer.Option("--dtype", help="Of the weights: float32, bfloat16, float16, or auto, their own.")
    ] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the output directory.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Write a model that torch and transformers alone load: weights, code and model card, for `hf upload`.

    It loads with `AutoModelForCausalLM.from_pretrained(OUTPUT, trust_remote_code=True)`.
    """
    from supra_cli.core import hub

    source = hub.resolve(model)
    console.note(f"model: {source}")

    from supra_cli.core import device, export

    number_format = None if dtype == "auto" else device.dtype(dtype, "cpu")
    path = export.export(hub.fetch(source), output, dtype=number_format, overwrite=overwrite)
    if json:
        console.document({"source": str(source), "path": str(path)})
        return
    console.note(f"to publish it: hf upload NAME {path}")
    console.result(str(path))
