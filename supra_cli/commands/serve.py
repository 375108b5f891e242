"""`supra serve`: any model, converted or not, behind an OpenAI-compatible address."""

from __future__ import annotations

from typing import Annotated

import typer

from supra_cli.commands import console


def run(
    model: Annotated[
        str | None,
        typer.Argument(help="Directory, alias or hub id.", show_default="the newest finished output under runs/"),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 lets every machine in, without a password.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes a free one.")] = 8000,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (bf16 on CUDA), float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Answer OpenAI's chat, completion and responses requests, streamed or not, by transformers' own server."""
    from supra_cli.core import hub

    source = hub.chosen(model)
    console.note(f"model: {source}")

    from supra_cli.core import checkpoint, serve
    from supra_cli.core import device as devices

    serve.check_installed()
    serve.check_free(host, port)
    target = devices.resolve(device)
    number = devices.dtype(dtype, target)
    folder = hub.fetch(source)
    tokenizer = checkpoint.load_tokenizer(folder, checkpoint.examine(folder))
    if tokenizer.chat_template is None:
        console.note("the tokenizer has no chat template, so only /v1/completions can answer")
    console.note(f"its name in requests: {folder}")
    serve.serve(folder, host=host, port=port, device=target, dtype=number)
