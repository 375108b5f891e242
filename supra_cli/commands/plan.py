"""`supra plan`: what a recipe will take, before it takes it; the other verbs' --dry-run prints with it too."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from supra_cli.commands import console
from supra_cli.core.errors import UsageError, near_miss

if TYPE_CHECKING:
    from supra_cli.core.accounting import ModelPlan, Plan, StagePlan
    from supra_cli.core.recipe import Recipe

_CONTEXTS = (4096, 32768)
_DEVICES = ("cuda", "cpu")


def run(
    recipe: Annotated[
        Path, typer.Option("--recipe", "-r", help="Recipe to plan: a TOML file, or a shipped one's name.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key of the recipe: --set stages.0.lr=1e-4.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="auto (bfloat16 on cuda, else float32), or one.")] = "auto",
    device: Annotated[str, typer.Option("--device", help="Whose memory: cuda or cpu.")] = "cuda",
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Show what a recipe takes: parameters, memory by part, steps, FLOPs, time on named GPUs. Reads no weights."""
    from supra_cli.core import recipe as recipes
    from supra_cli.core.lookup import lookup

    if device not in _DEVICES:
        raise UsageError(f"--device is '{device}', expected one of {', '.join(_DEVICES)}{near_miss(device, _DEVICES)}")
    show(recipes.load(recipe, overrides or (), lookup=lookup), json, dtype, device)


def show(recipe: Recipe, json: bool, dtype: str = "auto", device: str = "cuda") -> None:
    """Print the plan of `recipe`, computed in `dtype` on a device of that kind."""
    from supra_cli.core import accounting
    from supra_cli.core import device as devices
    from supra_cli.core.train.step import check_dtype

    plan = accounting.plan(recipe, check_dtype(devices.dtype(dtype, device)), device)
    if json:
        document = {
            "model": model_document(plan.model),
            "device": plan.device,
            "dtype": plan.dtype,
            "tokens": plan.tokens,
            "steps": sum(stage.steps for stage in plan.stages),
            "flops": plan.flops,
            "memory_bytes": plan.memory_bytes,
            "stages": [_stage_document(stage) for stage in plan.stages],
            "gpu_hours": {gpu: plan.seconds(gpu) / 3600 for gpu in accounting.GPUS},
            "utilisation": accounting.UTILISATION,
        }
        console.document(document)
        return
    console.table(model_rows(plan.model))
    console.result("")
    _show_stages(plan)
    if device == "cpu":
        return
    console.result("")
    gpus = [
        (gpu, f"{memory} GB", "yes" if plan.memory_bytes < memory * 1e9 else "no", console.duration(plan.seconds(gpu)))
        for gpu, (memory, _) in accounting.GPUS.items()
    ]
    console.table(gpus, ("one GPU", "memory", "fits", f"time at {accounting.UTILISATION:.0%} of its peak"))


def _stage_document(stage: StagePlan) -> dict[str, Any]:
    return {**asdict(stage), "memory": {**asdict(stage.memory), "total": stage.memory.total}}


def _show_stages(plan: Plan) -> None:
    parts = ("weights", "copies", "gradients", "optimizer", "teacher", "activations", "total")
    rows = []
    for stage in plan.stages:
        accumulated = -(-stage.rows // stage.micro_rows)
        rows.append(
            (
                stage.kind,
                f"{stage.steps:,}",
                console.number(stage.tokens),
                f"{stage.rows}×{stage.seq_len}" + (f" in {accumulated}" if accumulated > 1 else ""),
                console.number(stage.trainable),
                f"{stage.flops:.2e}",
            )
        )
    console.table(rows, ("stage", "steps", "tokens", "batch", "trained", "FLOPs"))
    console.result("")
    memory = [(stage.kind, *(console.size(getattr(stage.memory, part)) for part in parts)) for stage in plan.stages]
    copies = "copies" if plan.dtype == "float32" else f"{plan.dtype} copies"
    console.table(memory, ("memory of", "weights", copies, *parts[2:]))
    for stage in plan.stages:
        if stage.memory.host:
            console.result(f"{stage.kind} keeps {console.size(stage.memory.host)} more in CPU memory")
        if stage.memory.unread:
            console.result(f"{stage.kind} leaves {console.size(stage.memory.unread)} of weights in their file")


def model_rows(plan: ModelPlan) -> list[tuple[str, str]]:
    """A model's size as rows for a table."""
    swapped = sum(kind != "softmax" for kind in plan.layers)
    rows = [
        ("layers", f"{len(plan.layers)}: {_kinds(plan.layers)}"),
        ("parameters", console.number(plan.parameters)),
        ("new parameters", console.number(plan.new_parameters)),
        ("weights", f"{console.size(plan.weight_bytes)} in {plan.dtype}"),
    ]
    if swapped:
        rows.append(("state of a sequence", f"{console.size(plan.state_bytes)} in float32, at any length"))
    for tokens in _CONTEXTS:
        base = console.size(plan.base_cache_bytes(tokens))
        now = f"{console.size(plan.cache_bytes(tokens))} instead of {base}" if swapped else base
        rows.append((f"cache at {tokens:,} tokens", now))
    if swapped:
        rows.append(("smaller than the base's cache", f"from {plan.break_even_tokens:,} tokens on"))
    return rows


def model_document(plan: ModelPlan) -> dict[str, Any]:
    """A model's size for --json."""
    return {
        **asdict(plan),
        "break_even_tokens": plan.break_even_tokens,
        "cache_bytes": {str(tokens): plan.cache_bytes(tokens) for tokens in _CONTEXTS},
        "base_cache_bytes": {str(tokens): plan.base_cache_bytes(tokens) for tokens in _CONTEXTS},
    }


def _kinds(layers: tuple[str, ...]) -> str:
    """`supra`, or `24 supra, 8 softmax (3, 7, ...)`."""
    counts = Counter(layers)
    if len(counts) == 1:
        return layers[0]
    softmax = ", ".join(str(index) for index, kind in enumerate(layers) if kind == "softmax")
    return ", ".join(f"{count} {kind}" for kind, count in counts.most_common()) + f" (softmax: {softmax})"
