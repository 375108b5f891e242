"""`supra generate`: text from any model, converted or not."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from supra_cli.commands import console

if TYPE_CHECKING:
    from supra_cli.core.generate import Sampling, Stats


def run(
    model: Annotated[
        str | None,
        typer.Argument(help="Directory, alias or hub id.", show_default="the newest finished output under runs/"),
    ] = None,
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Text to go on from, - for stdin; repeat it for a batch.")
    ] = None,
    prompt_files: Annotated[
        list[str] | None, typer.Option("--prompt-file", help="File of one prompt in UTF-8; repeatable.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--apply-chat-template", help="Put each prompt into the model's chat template first.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest completion, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from this many most probable tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the fewest tokens with this probability.")] = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: the likelier new words, from 1.1 or so on clearly.")
    ] = 1.0,
    num_beams: Annotated[int, typer.Option(help="Beam search with this many beams; not streamed.")] = 1,
    seed: Annotated[int, typer.Option(help="Prompt number i draws with seed + i.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text, also a special token's; repeatable.")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Print the text as it comes.")] = True,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the decode step first; worth it from thousands of tokens on.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (bf16 on CUDA), float32, bfloat16 or float16.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Complete one or several prompts; stdout is the completion alone, figures go to stderr."""
    from supra_cli.core import hub
    from supra_cli.core.errors import UsageError

    if not prompts and not prompt_files:
        raise UsageError(
            "nothing to go on from: give a text with -p, a file with --prompt-file, or -p - for what comes on stdin"
        )
    if (dashes := [*(prompts or ()), *(prompt_files or ())].count("-")) > 1:
        raise UsageError(f"- is given {dashes} times, and all of stdin is one prompt; give it once")
    source = hub.chosen(model)
    console.note(f"model: {source}")
    stop = [_text(text) for text in stop or ()]
    prompts = [_stdin() if text == "-" else _text(text) for text in prompts or ()]
    prompts += [_stdin() if path == "-" else _file(path) for path in prompt_files or ()]

    from supra_cli.core import checkpoint, generate
    from supra_cli.core import device as devices

    sampling = generate.Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        num_beams=num_beams,
        seed=seed,
        stop=tuple(stop),
    )
    if compile and num_beams > 1:
        raise UsageError("--compile is for one token after another, not for --num-beams; leave one of them out")
    target = devices.resolve(device)
    folder = hub.fetch(source)
    tokenizer = checkpoint.load_tokenizer(folder)  # before the weights, which take longer to read
    if chat:
        prompts = generate.as_chat(tokenizer, prompts)
    network = checkpoint.load(folder, device=target, dtype=devices.dtype(dtype, target))
    if unused := generate.unused_settings(network, sampling):
        settings = ", ".join(f"{name} {value}" for name, value in unused.items())
        console.note(f"not used of the model's generation_config.json: {settings}; only what is asked for here counts")
    if compile:
        console.note("compiling the decode step before the second token, some ten seconds or more")
    if json:
        texts, stats = generate.complete(network, tokenizer, prompts, sampling, compile=compile)
        console.document(_document(source.name, prompts, texts, sampling, stats))
        return
    stats = generate.Stats()
    pieces = generate.stream(network, tokenizer, prompts, sampling, stats, compile=compile)
    _print(pieces, len(prompts), stream)
    console.note(_figures(stats))


def _text(argument: str) -> str:
    """An argument as the text that its bytes are in UTF-8, whatever the locale; a UsageError if they are none."""
    from supra_cli.core.errors import UsageError

    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeError:
        raise UsageError(
            f"{argument!r} is not UTF-8, expected text in UTF-8; convert it, for example with iconv"
        ) from None


def _stdin() -> str:
    """All of stdin as one prompt."""
    from supra_cli.core.errors import UsageError

    if sys.stdin is None:  # closed, as by `<&-`
        raise UsageError("stdin is closed, expected a prompt for -; give a text with -p")
    if sys.stdin.isatty():
        console.note("reading the prompt from the terminal until Ctrl-D")
    return _prompt(sys.stdin.buffer.read(), "stdin")


def _file(path: str) -> str:
    from supra_cli.core.errors import NotFoundError, SupraError, UsageError

    try:
        return _prompt(Path(path).read_bytes(), path)
    except IsADirectoryError:
        raise UsageError(f"--prompt-file {path} is a directory, expected a file of one prompt") from None
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"--prompt-file {path} is not there; check the path") from None
    except OSError as error:
        raise SupraError(f"--prompt-file {path} cannot be read: {error.strerror}") from error


def _prompt(data: bytes, source: str) -> str:
    """One prompt from bytes: without a byte-order mark and without the line end that closes a file, else as it is."""
    from supra_cli.core.errors import UsageError

    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"{source} is not UTF-8 from byte {error.start} on"
        raise UsageError(f"{where}, expected text in UTF-8; convert it, for example with iconv") from None
    if "\0" in text:
        raise UsageError(f"{source} looks binary, it holds a NUL; expected text in UTF-8")
    text = text[:-2] if text.endswith("\r\n") else text.removesuffix("\n")
    if not text:
        raise UsageError(f"{source} is empty, expected a prompt; -p '' goes on from nothing")
    return text


def _print(pieces: Any, rows: int, stream: bool) -> None:
    """The completions on stdout, the first as it comes; further ones follow whole, each after an empty line."""
    texts = [""] * rows
    for row, text in pieces:
        if stream and row == 0:
            console.raw(text)
        texts[row] += text
    if not stream:
        console.raw(texts[0])
    console.result("".join(f"\n\n{text}" for text in texts[1:]))


def _figures(stats: Stats) -> str:
    prefill = f"{stats.prompt_tokens:,} prompt tokens"
    if stats.prefill_seconds:
        prefill += f" at {stats.prefill_tokens_per_second:,.0f} tokens/s"
    if stats.compile_seconds:
        prefill += f"; compiled in {stats.compile_seconds:.0f} s"
    decode = f"{stats.decoded_tokens:,} decoded at {stats.decode_tokens_per_second:,.0f} tokens/s"
    return f"{prefill}; {decode}; state and cache {console.size(stats.cache_bytes)}; ended by {', '.join(stats.finish)}"


def _document(model: str, prompts: list[str], texts: list[str], sampling: Sampling, stats: Stats) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "model": model,
        "completions": [
            {"prompt": prompt, "text": text, "finish": finish}
            for prompt, text, finish in zip(prompts, texts, stats.finish, strict=True)
        ],
        "sampling": asdict(sampling),
        "prompt_tokens": stats.prompt_tokens,
        "prefill_tokens_per_second": stats.prefill_tokens_per_second,
        "compile_seconds": stats.compile_seconds,
        "decoded_tokens": stats.decoded_tokens,
        "decode_tokens_per_second": stats.decode_tokens_per_second,
        "cache_bytes": stats.cache_bytes,
    }
