"""`supra convert`: a pretrained model with a mixer in place of its attention."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from supra_cli.commands import console, plan

if TYPE_CHECKING:
    from supra_cli.core.accounting import ModelPlan
    from supra_cli.core.hub import Source
    from supra_cli.core.modeling import SupraConfig


def _list(json: bool) -> None:
    """The aliases."""
    from supra_cli.core import accounting, checkpoint, hub

    found = []
    for alias in [*hub.BUNDLED, *hub.ALIASES]:
        source = hub.alias(alias)
        bundled = hub.is_bundled(source)
        size = accounting.measure(checkpoint.outline(source)) if bundled else None
        sizes = {} if size is None else {"parameters": size.parameters, "weight_bytes": size.weight_bytes}
        found.append({"alias": alias, "repo": source.repo, "config_bundled": bundled, **sizes})
    if json:
        console.document({"aliases": found})
        return
    rows = [
        (
            one["alias"],
            one["repo"] or "in the package, weights too",
            console.number(one["parameters"]) if "parameters" in one else "",
            console.size(one["weight_bytes"]) if "weight_bytes" in one else "",
            "yes" if one["config_bundled"] else "no",
        )
        for one in found
    ]
    console.table(rows, header=("alias", "on the hub", "parameters", "weights", "config bundled"))


def run(
    model: Annotated[
        str | None,
        typer.Argument(help="Directory, alias (tiny, llama-7b, mistral-7b, ...) or hub id.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Where to write.", show_default="runs/<model>-<mixer>, or -<keep> of a student"
        ),
    ] = None,
    mixer: Annotated[
        str | None,
        typer.Option(
            "--mixer",
            help="What replaces softmax attention; gated_delta, as in the recipe small-budget, is what recalls best.",
            show_default="supra",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Option of the mixer: --set mixer.key=value, repeatable; supra recipe options lists them."
        ),
    ] = None,
    keep: Annotated[
        str,
        typer.Option(
            "--keep",
            help="Layers that stay softmax: none, all, every:N, first:2,last:2, sliding, 0,5,7; of a student whose "
            "attention was transferred, auto:N gives it back to those that need it most.",
        ),
    ] = "none",
    text: Annotated[
        str | None,
        typer.Option(
            "--text", help="With --keep auto:N: the text that layers are ranked by.", show_default="python-stdlib"
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option("--device", help="With --keep auto:N: auto, cpu, cuda or mps.", show_default="auto"),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of the new parameters.", show_default="0"),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the aliases and leave.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the output directory.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Convert a pretrained model: seeded new parameters, the base's own untouched.

    The result is a Hugging Face model directory, ready for `supra uptrain`.
    """
    from supra_cli.core import hub
    from supra_cli.core.errors import UsageError
    from supra_cli.core.recipe.keep import automatic

    if list_:
        _list(json)
        return
    if model is None:
        raise UsageError("supra convert takes a MODEL: a directory, an alias (supra convert --list) or a hub id")
    if text == "":
        raise UsageError("--text is empty; name a file, a folder, a glob or a dataset on the hub, or leave it out")
    options = _options(overrides or ())
    source = hub.resolve(model)
    console.note(f"model: {source}")

    from supra_cli.core import accounting, checkpoint

    base = checkpoint.outline(source)
    ranks = automatic(keep) and base.swap.any
    drawing, ranking = {"--mixer": mixer, "--set": overrides, "--seed": seed}, {"--text": text, "--device": device}
    for name, value in (drawing if ranks else ranking).items():
        if value is not None:
            why = "which keeps the student's own mixer" if ranks else "which ranks no layers"
            raise UsageError(f"{name} has no effect with --keep {keep} of this model, {why}")
    if ranks:
        output = output or Path("runs") / f"{_short(source)}-{keep.replace(':', '')}"
        given = (text or "python-stdlib", device or "auto")
        _keep_most_needed(source, output, base, keep, *given, dry_run=dry_run, overwrite=overwrite, json=json)
        return
    config = _unconverted(base, model)
    if mixer is None:
        mixer = "supra"
        console.note("mixer supra, the paper's; --mixer gated_delta, as in the recipe small-budget, recalls more")
    seed = seed or 0
    output = output or Path("runs") / f"{_short(source)}-{mixer}"
    config = config.with_mixer(mixer, options, keep)
    size = accounting.measure(config)
    document = {
        "source": asdict(source),
        "mixer": mixer,
        "options": options,
        "seed": seed,
        "path": str(output),
        **plan.model_document(size),
    }
    if dry_run:
        _show_plan(document, source, size, json)
        return
    _convert(source, output, mixer=mixer, options=options, keep=keep, seed=seed, overwrite=overwrite)
    if json:
        console.document(document)
        return
    state = f"; the state of a sequence takes {console.size(size.state_bytes)}" if size.state_bytes else ""
    console.note(
        f"{console.number(size.parameters)} parameters, {console.number(size.new_parameters)} of them new, "
        f"in {len(size.layers) - len(size.softmax_windows)} of {len(size.layers)} layers{state}"
    )
    console.result(str(output))


def _convert(source: Source, output: Path, **settings: Any) -> None:
    from supra_cli.core import checkpoint, hub

    checkpoint.check_free(output, settings["overwrite"])  # before anything is downloaded
    folder = hub.fetch(source)
    checkpoint.convert(folder, output, base=hub.lasting_name(source, folder), **settings)


def _keep_most_needed(
    source: Source,
    output: Path,
    config: SupraConfig,
    keep: str,
    text: str,
    device: str,
    *,
    dry_run: bool,
    overwrite: bool,
    json: bool,
) -> None:
    """Rank the layers and, but for a dry run, write the student in which the neediest are softmax again."""
    from supra_cli.core import checkpoint, hub, need

    need.check(config, keep)
    checkpoint.check_free(output, overwrite)
    folder = hub.fetch(source)
    losses = need.rank(folder, text, device)
    kept = need.most_needed(losses, keep)
    if not dry_run:
        need.restore(folder, output, checkpoint.load(folder), kept, overwrite=overwrite)
    if json:
        console.document({"source": asdict(source), "path": str(output), "divergences": losses, "softmax": kept})
        return
    for number, loss in losses.items():
        console.note(f"layer {number}: {loss:.4f} nats{', softmax again' if number in kept else ''}")
    if not dry_run:
        console.result(str(output))


def _unconverted(config: SupraConfig, model: str) -> SupraConfig:
    from supra_cli.core.errors import UsageError

    if config.swap.any:
        raise UsageError(f"'{model}' is converted already, to mixer '{config.swap.mixer}'; convert its base instead")
    return config


def _options(overrides: list[str]) -> dict[str, Any]:
    """The mixer's options out of `mixer.key=value`."""
    from supra_cli.core import recipe
    from supra_cli.core.errors import UsageError

    tables: dict[str, Any] = {"mixer": {}}
    for text in overrides:
        key = text.partition("=")[0].strip()
        if not key.startswith("mixer.") or key in ("mixer.", "mixer.name") or "=" not in text:
            raise UsageError(f"--set takes mixer.key=value, as in mixer.gain=head; got '{text}'")
        recipe.override(tables, text)
    return tables["mixer"]


def _show_plan(document: dict[str, Any], source: Source, size: ModelPlan, json: bool) -> None:
    from supra_cli.core import checkpoint

    swapped = len(size.layers) - len(size.softmax_windows)
    convert_bytes = checkpoint.conversion_bytes(swapped, size.new_parameters, size.new_weight_bytes)
    base_bytes = size.weight_bytes - size.new_weight_bytes
    if json:
        console.document({**document, "convert_memory_bytes": convert_bytes})
        return
    run_bytes = size.weight_bytes + size.cache_bytes(4096)
    console.table(
        [
            ("converts", source),
            ("to", document["path"]),
            ("mixer", document["mixer"]),
            *plan.model_rows(size),
            ("memory to convert", f"{console.size(convert_bytes)} of new parameters at a time"),
            ("memory to run", f"{console.size(run_bytes)} with a sequence of 4,096 tokens"),
            ("files", f"{console.size(base_bytes)} of the base's shards, linked"),
            ("", f"{console.size(size.new_weight_bytes)} of new parameters in model-mixers*.safetensors"),
            ("", "config.json, supra.json, the base's tokenizer and generation config"),
        ]
    )


def _short(source: Source) -> str:
    """The last part of the source's name, without a revision."""
    name = source.path.resolve().name if source.kind == "directory" else source.name
    return name.partition("@")[0].rpartition("/")[2]
