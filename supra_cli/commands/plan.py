"""`supra plan`: what a recipe will take, before it takes it; the other verbs' --dry-run prints with it too."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from supra_cli.commands import console
from supra_cli.core.errors import UsageError, near_miss

if TYPE_CHECKING:
    from supra_cli.core.accounting import ModelPlan, Plan, Setting, StagePlan
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
    gpus: Annotated[
        int | None, typer.Option("--gpus", min=1, help="Memory by part and settings for so many GPUs, or processes.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Show what a recipe takes: parameters, memory by part, steps, FLOPs, time on 1 to 16 of named GPUs, and the
    nearest setting that fits each. Reads no weights."""
    from supra_cli.core import recipe as recipes
    from supra_cli.core.lookup import lookup

    if device not in _DEVICES:
        raise UsageError(f"--device is '{device}', expected one of {', '.join(_DEVICES)}{near_miss(device, _DEVICES)}")
    given = overrides or []
    show(recipes.load(recipe, given, lookup=lookup), json, dtype, device, gpus, command(recipe, given, dtype=dtype))


def command(recipe: Path, overrides: Iterable[str], **options: Any) -> str:
    """`uptrain` as it was typed: `options` by their names, of which one that is None, False or auto was not given."""
    words = ["uptrain", "--recipe", str(recipe)]
    for name, value in options.items():
        if value not in (None, False, "auto"):
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return shlex.join([*words, *chain(*(("--set", one) for one in overrides))])


def show(
    recipe: Recipe,
    json: bool,
    dtype: str = "auto",
    device: str = "cuda",
    gpus: int | None = None,
    run: str = "uptrain --recipe RECIPE",
    model: Path | None = None,
) -> None:
    """Print the plan of `recipe`, begun with its base or a converted `model`, computed in `dtype` on devices of that
    kind; `run` is the command that follows.
    """
    from supra_cli.core import accounting
    from supra_cli.core import device as devices
    from supra_cli.core.train.step import check_dtype

    plan = accounting.plan(recipe, check_dtype(devices.dtype(dtype, device)), device, model)
    kinds = {} if device == "cpu" else accounting.GPUS
    counts = accounting.COUNTS if gpus is None else (gpus,)
    nearest = {gpu: accounting.nearest(plan, gpu, counts) for gpu in kinds}
    stages = [_stage_document(stage, gpus or 1) for stage in plan.stages]
    if json:
        document = {
            "model": model_document(plan.model),
            "device": plan.device,
            "dtype": plan.dtype,
            "tokens": sum(stage["tokens"] for stage in stages),
            "steps": sum(stage["steps"] for stage in stages),
            "flops": plan.flops(gpus or 1),
            "memory_bytes": plan.memory_bytes(gpus or 1),
            "stages": stages,
            "utilisation": accounting.UTILISATION,
            "gpu_hours": {gpu: plan.seconds(gpu) / 3600 for gpu in kinds},
            "several": [
                {"gpu": gpu, "gpus": count, "memory_bytes": plan.memory_bytes(count)}
                | {"fits": plan.fits(gpu, count), "hours": plan.seconds(gpu, count) / 3600}
                for gpu in kinds
                for count in counts
            ],
            "nearest": {gpu: one and {**asdict(one), "command": one.command(run)} for gpu, one in nearest.items()},
        }
        console.document(document)
        return
    console.table(model_rows(plan.model))
    console.result("")
    _show_stages(plan, stages, gpus or 1)
    if device == "cpu":
        return
    console.result("")
    rows = [
        (
            f"{count}",
            console.size(plan.memory_bytes(count)),
            *(console.duration(plan.seconds(gpu, count)) if plan.fits(gpu, count) else "no" for gpu in kinds),
        )
        for count in counts
    ]
    console.table(rows, ("GPUs", "memory of each", *(f"{gpu}: {memory} GB" for gpu, (memory, _) in kinds.items())))
    console.result(
        f"The time at {accounting.UTILISATION:.0%} of their peak, without their communication, "
        f"where the plan takes at most {accounting.ROOM:.0%} of their memory."
    )
    if any(stage.spec.optimizer == "adamw8bit" for stage in plan.stages):
        console.result("8-bit moments are for one GPU alone.")
    _show_settings(plan, nearest, counts, run)


def _show_settings(plan: Plan, nearest: dict[str, Setting | None], counts: Sequence[int], run: str) -> None:
    """The nearest setting of each GPU and, where that changes the recipe, the fewest GPUs that do not ask it to."""
    from supra_cli.core import accounting

    found: dict[Setting, list[str]] = {}
    for gpu, setting in nearest.items():
        for one in dict.fromkeys(filter(None, (setting, accounting.as_written(plan, gpu, counts)))):
            found.setdefault(one, []).append(gpu)
    for setting, gpus in sorted(found.items(), key=lambda pair: pair[0].gpus):
        host = f" and {console.size(setting.host_bytes)} of CPU memory" if setting.host_bytes else ""
        how = "nearest" if setting.changes else "as written"
        took = f"{setting.gpus} × {' or '.join(gpus)}, {how}: {console.size(setting.memory_bytes)}{host} each"
        console.result(f"\n{took}\n  {setting.command(run)}")
    if beyond := [gpu for gpu, setting in nearest.items() if setting is None]:
        console.result(
            f"\nNo smaller pass, recomputation or optimizer makes it fit {' or '.join(beyond)} on {counts[-1]} GPUs."
        )


def _stage_document(stage: StagePlan, gpus: int) -> dict[str, Any]:
    recipe, spec, memory = stage.recipe, stage.spec, stage.memory(gpus)
    own, micro_rows = stage.own_rows(gpus)
    return {
        "kind": spec.kind,
        "tokens": recipe.steps(spec) * recipe.rows(spec) * recipe.seq_len(spec),
        "steps": recipe.steps(spec),
        "rows": recipe.rows(spec),
        "micro_rows": micro_rows,
        "passes": -(-own // micro_rows),
        "seq_len": recipe.seq_len(spec),
        "trainable": stage.trained.total,
        "flops": stage.flops(gpus),
        "memory": {**asdict(memory), "total": memory.total},
    }


def _show_stages(plan: Plan, stages: Sequence[dict[str, Any]], gpus: int) -> None:
    parts = ["weights", "copies", "gradients", "optimizer", "teacher", "gathered", "activations", "total"]
    parts = [part for part in parts if part != "gathered" or gpus > 1]
    rows = []
    for stage in stages:
        passes = stage["passes"]
        batch = f"{stage['rows']}×{stage['seq_len']}" + (f" in {passes}" if passes > 1 else "")
        numbers = console.number(stage["tokens"]), batch, console.number(stage["trainable"])
        rows.append((stage["kind"], f"{stage['steps']:,}", *numbers, f"{stage['flops']:.2e}"))
    console.table(rows, ("stage", "steps", "tokens", "batch", "trained", "FLOPs"))
    console.result("")
    memories = [(stage["kind"], *(console.size(stage["memory"][part]) for part in parts)) for stage in stages]
    words = {"copies": "copies" if plan.dtype == "float32" else f"{plan.dtype} copies"}
    each = "memory of" if gpus == 1 else f"memory of {gpus}, each"
    console.table(memories, (each, *(words.get(part, part) for part in parts)))
    for stage in stages:
        if host := stage["memory"]["host"]:
            console.result(f"{stage['kind']} keeps {console.size(host)} more in CPU memory")


def model_rows(plan: ModelPlan) -> list[tuple[str, str]]:
    """A model's size as rows for a table."""
    swapped = sum(kind != "softmax" for kind in plan.layers)
    rows = [
        ("layers", f"{len(plan.layers)}: {_kinds(plan)}"),
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
    if plan.dropped:
        rows.append(("dropped of the base", "; ".join(plan.dropped)))
    return rows


def model_document(plan: ModelPlan) -> dict[str, Any]:
    """A model's size for --json."""
    document = asdict(plan)
    if not document.pop("layers_known"):
        document["layers"] = None
    return {
        **document,
        "break_even_tokens": plan.break_even_tokens,
        "cache_bytes": {str(tokens): plan.cache_bytes(tokens) for tokens in _CONTEXTS},
        "base_cache_bytes": {str(tokens): plan.base_cache_bytes(tokens) for tokens in _CONTEXTS},
    }


def _kinds(plan: ModelPlan) -> str:
    """`supra`, or `24 supra, 8 softmax (3, 7, ...)`."""
    counts = Counter(plan.layers)
    if len(counts) == 1:
        return plan.layers[0]
    numbers = ", ".join(str(index) for index, kind in enumerate(plan.layers) if kind == "softmax")
    which = f"softmax: {numbers}" if plan.layers_known else "chosen by need at conversion"
    return ", ".join(f"{count} {kind}" for kind, count in counts.most_common()) + f" ({which})"
