"""`supra bench`: what the operator, decoding and training cost on this machine, beside what it could do at best."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from supra_cli.commands import console
from supra_cli.core.errors import UsageError

app = typer.Typer(help="Time the operator, decoding and training here, with the machine's own rates beside them.")

_Model = Annotated[str, typer.Argument(help="Directory, alias or hub id; only its shape counts, weights are drawn.")]
_Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
_Rounds = Annotated[int, typer.Option("--rounds", min=1, help="Interleaved rounds; medians are shown.")]
_Output = Annotated[Path | None, typer.Option("--output", "-o", help="Also write the JSON here.")]
_Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


@app.command("operator")
def operator(
    lengths: Annotated[list[int] | None, typer.Option("--tokens", min=1, help="A length; repeatable.")] = None,
    device: _Device = "auto",
    rounds: _Rounds = 7,
    output: _Output = None,
    json: _Json = False,
) -> None:
    """Time linear attention, forward and backward, beside softmax attention."""
    from supra_cli.core.bench import operator as bench

    _show(bench.measure(_device(device), rounds=rounds, lengths=lengths or bench.LENGTHS), output, json)


@app.command("decode")
def decode(
    model: _Model = "tiny",
    positions: Annotated[
        list[int] | None, typer.Option("--position", min=1, help="Tokens before the timed one; repeatable on a CPU.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Texts at once, on a GPU.")] = 16,
    compile: Annotated[
        bool, typer.Option("--compile", help="On a CPU, time the compiled step of both models as well.")
    ] = False,
    device: _Device = "auto",
    rounds: _Rounds = 20,
    output: _Output = None,
    json: _Json = False,
) -> None:
    """Time one more token beside the softmax base: at each position on a CPU, in a CUDA graph at one on a GPU."""
    from supra_cli.core.bench import decode as bench

    if _device(device) == "cpu":
        found = bench.measure(
            "cpu", model=model, rounds=rounds, positions=positions or bench.POSITIONS, compile=compile
        )
    elif compile:
        raise UsageError("--compile is for --device cpu; on a GPU the step is timed in a CUDA graph")
    else:
        context = max(positions or [32768])
        found = bench.measure_graphed(model=model, batch=batch, context=context, rounds=rounds)
    _show(found, output, json)


@app.command("train")
def train(
    model: _Model = "tiny",
    shapes: Annotated[
        list[str] | None, typer.Option("--shape", help="Batch and tokens, like 8x512; repeatable.")
    ] = None,
    device: _Device = "auto",
    rounds: _Rounds = 5,
    output: _Output = None,
    json: _Json = False,
) -> None:
    """Time forward and backward of a model with each mixer, beside its softmax base."""
    from supra_cli.core.bench import train as bench

    wanted = [_shape(shape) for shape in shapes] if shapes else bench.SHAPES
    _show(bench.measure(_device(device), model=model, rounds=rounds, shapes=wanted), output, json)


def _device(name: str) -> str:
    from supra_cli.core import device as devices

    found = devices.resolve(name)
    if name == "auto" and found == "mps":
        return "cpu"
    if found not in ("cpu", "cuda"):
        raise UsageError(f"--device is '{name}', but only cpu and cuda can be timed")
    return found


def _shape(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise UsageError(f"--shape is '{text}', expected batch and tokens like 8x512")
    return int(match[1]), int(match[2])


def _show(found: dict[str, Any], output: Path | None, json: bool) -> None:
    import json as jsonlib

    from supra_cli.core.bench.timing import tables

    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(jsonlib.dumps(found, indent=1) + "\n", encoding="utf-8")
    if json:
        console.document(found)
        return
    for header, cells in tables(found):
        console.table(cells, header)
        console.result("")
    machine = found["hardware"]
    console.result(f"{machine.get('gpu', machine['cpu'])}, {found['clock']}, {found['rounds']} rounds")
