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
_Layers = Annotated[
    int | None, typer.Option("--layers", min=1, help="Build only so many, where memory is small.", show_default="all")
]
_Rounds = Annotated[int, typer.Option("--rounds", min=1, help="Interleaved rounds; medians are shown.")]
_Output = Annotated[Path | None, typer.Option("--output", "-o", help="Also write the JSON here.")]
_Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


@app.command("operator")
def operator(
    lengths: Annotated[
        list[int] | None,
        typer.Option("--tokens", min=1, help="A length; repeatable.", show_default="2048, 8192, 32768"),
    ] = None,
    device: _Device = "auto",
    rounds: _Rounds = 7,
    output: _Output = None,
    json: _Json = False,
) -> None:
    """Time linear attention, forward and backward, beside softmax attention."""
    from supra_cli.core import bench

    here = _ready(device, output)
    _show(bench.operator(here, lengths or [2048, 8192, 32768], rounds), output, json)


@app.command("decode")
def decode(
    model: _Model = "tiny",
    positions: Annotated[
        list[int] | None,
        typer.Option(
            "--position",
            min=1,
            help="Tokens before the timed one; repeatable.",
            show_default="100, 16000; on a GPU 32768",
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, help="Texts at once.", show_default="1; on a GPU 16")
    ] = None,
    layers: _Layers = None,
    compile: Annotated[bool, typer.Option("--compile", help="Time the step of generate --compile.")] = False,
    device: _Device = "auto",
    rounds: _Rounds = 20,
    output: _Output = None,
    json: _Json = False,
) -> None:
    """Time one more token at each position, beside the softmax base; on a GPU in a CUDA graph."""
    from supra_cli.core import bench

    here = _ready(device, output)
    usual = ([100, 16000], 1) if here == "cpu" else ([32768], 16)
    _show(bench.decode(here, model, positions or usual[0], batch or usual[1], layers, compile, rounds), output, json)


@app.command("train")
def train(
    model: _Model = "tiny",
    shapes: Annotated[
        list[str] | None,
        typer.Option("--shape", help="Batch and tokens; repeatable.", show_default="8x512, 1x4096"),
    ] = None,
    mixers: Annotated[
        list[str] | None,
        typer.Option(
            "--mixer", help="Repeatable; a converted model keeps its own.", show_default="softmax, supra, t2r"
        ),
    ] = None,
    layers: _Layers = None,
    device: _Device = "auto",
    rounds: _Rounds = 5,
    output: _Output = None,
    json: _Json = False,
) -> None:
    """Time a step of uptraining with each mixer, beside the softmax base."""
    from supra_cli.core import bench

    wanted, named = [_shape(shape) for shape in shapes or ["8x512", "1x4096"]], mixers or ["softmax", "supra", "t2r"]
    _show(bench.train(_ready(device, output), model, wanted, layers, named, rounds), output, json)


def _ready(name: str, output: Path | None) -> str:
    """The device to time, once it is known that the figures can be written."""
    from supra_cli.core import device as devices

    found = devices.resolve(name)
    if name == "auto" and found == "mps":
        found = "cpu"
    if found not in ("cpu", "cuda"):
        raise UsageError(f"--device is '{name}', but only cpu and cuda can be timed")
    if output is not None:
        console.make_room(output)
    return found


def _shape(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise UsageError(f"--shape is '{text}', expected batch and tokens like 8x512")
    return int(match[1]), int(match[2])


def _show(found: dict[str, Any], output: Path | None, json: bool) -> None:
    from supra_cli.core.files import write_json

    if output is not None:
        write_json(output, found)
        console.note(f"written to {output}")
    if json:
        console.document(found)
        return
    names = [name for name in found["rows"][0] if any(row[name] is not None for row in found["rows"])]
    console.table([[_cell(row[name]) for name in names] for row in found["rows"]], names)
    machine = found["hardware"]
    console.result(f"{', '.join(machine['gpus']) or machine['cpu']}, {found['clock']}, {found['rounds']} rounds")


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return "-" if value is None else str(value)
