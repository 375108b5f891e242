"""A recipe: everything needed to repeat a run, as frozen models that read and write TOML.

Unknown keys are refused with the nearest known one, and all errors of a recipe are reported at once, each with its key
path. This module knows no torch: the options of a mixer or a stage are checked against their dataclass through
`lookup`, which the caller provides.
"""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from supra_cli.core.errors import UsageError, near_miss

Lookup = Callable[[Literal["mixer", "stage"], str], type]
"""(kind, name) → the options dataclass of that mixer or stage; raises UsageError for an unknown name."""

_SHIPPED = Path(__file__).resolve().parent.parent / "assets" / "recipes"

Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


class OpenTable(Table):
    """A table whose further keys are the options of what it names."""

    model_config = ConfigDict(extra="allow")

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})


class Mixer(OpenTable):
    name: str = "supra"
    """Registered name of the mixer that replaces softmax attention; every other key of the table is one of its options.
    """


class Source(Table):
    path: str
    """A file, folder or glob (relative to the recipe), the built-in source `python-stdlib`, or a dataset on the
    hub."""
    text: str = "text"
    """Field or column that holds the text, where records have fields."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Share of the rows drawn from this source, relative to the other sources' weights."""
    repeat: bool = False
    """Draw rows in which passages of this source come twice, for learning to recall, instead of its documents."""
    name: str | None = None
    """Configuration of a hub dataset."""
    split: str | None = None
    """Split of a hub dataset or of a built-in source; `train` for sources and `validation` for validation when left
    out."""
    revision: str | None = None
    """Commit or tag of a hub dataset."""


class Data(Table):
    seq_len: Positive = 2048
    """Tokens in a row."""
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    """Training text, mixed by weight."""
    validation: tuple[Source, ...] = ()
    """Held-out text for the validation loss."""
    validation_tokens: Positive = 65_536
    """At most this many held-out tokens are scored at each validation."""
    documents: Literal["separate", "joined"] = "separate"
    """`separate`: state and positions restart at each document in a row; `joined`: a row is one run of text."""
    skip_share: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Largest share of a source's records that may be skipped as empty, undecodable or without text before that is an
    error."""


class Tokenizer(Table):
    vocab_size: Annotated[int, Field(ge=260)]
    """Size of a byte-level BPE vocabulary, trained on the training sources."""


class Checkpoint(Table):
    every_steps: Positive = 500
    """Optimizer steps between two saves of the full training state."""
    keep_last: Annotated[int, Field(ge=2)] = 3
    """Complete checkpoints that are kept; never fewer than two."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the model's own files; below float32 the masters are kept beside the optimizer state."""


class Stage(OpenTable):
    kind: str
    """Registered name of the loss: transfer, distill or finetune; further keys of the table are its options."""
    tokens: Positive
    """Tokens to train on in this stage."""
    batch_tokens: Positive = 4096
    """Tokens in an optimizer step, rounded down to whole rows."""
    micro_batch_tokens: Positive | None = None
    """Tokens in one forward and backward pass; the whole batch when left out."""
    seq_len: Positive | None = None
    """Tokens in a row in this stage; the recipe's `data.seq_len` when left out."""
    train: Literal["all", "mixer"] = "all"
    """Which parameters move: all of them, or the mixers' alone."""
    lr: Rate = 3e-5
    """Peak learning rate of the base's parameters."""
    mixer_lr: Rate | None = None
    """Peak learning rate of the mixers' parameters; `lr` when left out."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after the warm-up."""
    final_lr_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Where the schedule ends, as a share of the peak."""
    optimizer: Literal["adamw", "adamw8bit", "adamw-offload"] = "adamw"
    """`adamw` with all its state on the device; `adamw8bit` with moments in 8 bits (torchao); `adamw-offload` with fp32
    weights and moments in CPU memory and the weights on the device in the computing dtype."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    weight_decay: Rate = 0.0
    """AdamW's decoupled weight decay, on matrices only."""
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    """The gradient is scaled down to this global norm."""
    teacher: str | None = None
    """Model to learn from, where the stage has one; the run's base when left out."""
    activation_checkpointing: bool = False
    """Keep only each block's input for the backward pass and compute the rest again: less memory, a third more time."""
    untie: bool = False
    """Give the output head weights of its own, where the base ties them to the embedding."""

    @model_validator(mode="after")
    def _batches_nest(self) -> Stage:
        if self.micro_batch_tokens and self.micro_batch_tokens > self.batch_tokens:
            raise ValueError(
                f"micro_batch_tokens is {self.micro_batch_tokens}, more than batch_tokens = {self.batch_tokens}; "
                "a step is made of whole micro-batches"
            )
        return self


class Recipe(Table):
    base: str | None = None
    """Model to start from: a directory, an alias or a hub id."""
    model: dict[str, Any] | None = None
    """Instead of `base`: the Hugging Face configuration of a model to train from scratch, `model_type` included."""
    tokenizer: Tokenizer | None = None
    """With `model`: the tokenizer to train first."""
    init: Literal["pretrained", "scratch"] = "pretrained"
    """`pretrained` takes the base's weights, `scratch` only its shape and tokenizer."""
    keep: str = "none"
    """Layers that keep softmax attention: none, all, every:N, first:N, last:N or numbers as in 0,5,7."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of new parameters, data order and dropout."""
    mixer: Mixer = Mixer()
    """What replaces softmax attention, with its options."""
    data: Data
    """The text."""
    checkpoint: Checkpoint = Checkpoint()
    """What is saved, and when."""
    validate_every_steps: Positive = 500
    """Optimizer steps between two validations; there is one at the end in any case."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What to do when a loss or gradient is not finite: stop, or leave that batch out; no step is taken either way."""
    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where metrics go besides the run's metrics.jsonl."""
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    """Training stages, run in order."""

    @model_validator(mode="after")
    def _one_origin(self) -> Recipe:
        if (self.base is None) == (self.model is None):
            raise ValueError(
                "exactly one of 'base' (a pretrained model) and [model] (a shape to train from scratch) is needed"
            )
        if (self.model is None) != (self.tokenizer is None):
            raise ValueError(
                "[model] and [tokenizer] belong together: a base brings its own tokenizer, a bare shape has none"
            )
        if self.model is not None and self.init != "scratch":
            raise ValueError("[model] has no weights to start from; set init = 'scratch'")
        return self

    def trajectory(self) -> dict[str, Any]:
        """What decides the bits of the result: everything but how often is saved and validated, and where is logged."""
        free = {"checkpoint", "validate_every_steps", "non_finite", "track"}
        return self.model_dump(mode="json", exclude=free)

    def seq_len(self, stage: Stage) -> int:
        return stage.seq_len or self.data.seq_len

    def rows(self, stage: Stage) -> int:
        """Rows in an optimizer step of `stage`."""
        return max(1, stage.batch_tokens // self.seq_len(stage))

    def micro_rows(self, stage: Stage) -> int:
        """Rows in one forward pass of `stage`."""
        return min(self.rows(stage), max(1, (stage.micro_batch_tokens or stage.batch_tokens) // self.seq_len(stage)))

    def steps(self, stage: Stage) -> int:
        """Optimizer steps of `stage`: its tokens, rounded up to whole steps."""
        return -(-stage.tokens // (self.rows(stage) * self.seq_len(stage)))


def load(path: Path, overrides: Iterable[str] = (), *, lookup: Lookup | None = None) -> Recipe:
    """Read, override and validate the recipe at `path`; its relative data paths come back absolute.

    `overrides` are `key.path=value` strings (values in TOML, bare words taken as text), as given to `--set`.
    Raises UsageError listing every problem with its key path.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"no recipe at {path}; `supra recipe list` names the shipped ones") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the recipe {path}: {error}") from None
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from None
    for override in overrides:
        _override(raw, override)
    return _anchor(validate(raw, str(path), lookup=lookup), Path(path).resolve().parent)


def shipped() -> dict[str, Path]:
    """Name → file of the recipes that come with supra."""
    return {path.stem: path for path in sorted(_SHIPPED.glob("*.toml"))}


def find(name: str) -> Path:
    """The file of a shipped recipe; UsageError with a near miss for an unknown name."""
    known = shipped()
    if name not in known:
        raise UsageError(f"no shipped recipe '{name}'{near_miss(name, known)}")
    return known[name]


def validate(raw: dict[str, Any], where: str = "recipe", *, lookup: Lookup | None = None) -> Recipe:
    """A recipe from its parsed TOML; UsageError with all problems at once."""
    problems: list[str] = []
    recipe = None
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        items = error.errors()
        inner = {item["loc"][:depth] for item in items for depth in range(len(item["loc"]))}
        problems += [_describe(item) for item in items if item["loc"] not in inner or not item["loc"]]
    if lookup is not None:
        problems += _option_problems(raw, lookup)
    if problems:
        raise UsageError(f"{where} is not a valid recipe:\n" + "\n".join(f"  {problem}" for problem in problems))
    return recipe


def dumps(recipe: Recipe) -> str:
    """The resolved recipe as TOML, defaults written out, so that a later default cannot change what it means."""
    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))


def options(kind: str, cls: type, values: dict[str, Any], where: str) -> list[str]:
    """The problems of `values` as keys of the options dataclass `cls`; empty when there are none."""
    known = {field.name for field in dataclasses.fields(cls)}
    problems = [f"{where}.{key}: unknown option of {kind}{near_miss(key, known)}" for key in values if key not in known]
    try:
        TypeAdapter(cls).validate_python({key: value for key, value in values.items() if key in known})
    except ValidationError as error:
        problems += [f"{where}.{'.'.join(map(str, item['loc']))}: {_message(item)}" for item in error.errors()]
    return problems


def _option_problems(raw: dict[str, Any], lookup: Lookup) -> list[str]:
    tables = []
    mixer = raw.get("mixer", {})
    if isinstance(mixer, dict):
        tables.append(("mixer", mixer.get("name", "supra"), mixer, Mixer, "mixer"))
    stages = raw.get("stages", [])
    for number, stage in enumerate(stages if isinstance(stages, list) else []):
        if isinstance(stage, dict) and "kind" in stage:
            tables.append(("stage", stage["kind"], stage, Stage, f"stages.{number}"))
    problems = []
    for kind, name, table, model, where in tables:
        if not isinstance(name, str):
            continue
        try:
            cls = lookup(kind, name)
        except UsageError as error:
            problems.append(f"{where}: {error}")
            continue
        values = {key: value for key, value in table.items() if key not in model.model_fields}
        known = {field.name for field in dataclasses.fields(cls)} | set(model.model_fields)
        unknown = [key for key in values if key not in known]
        problems += [f"{where}.{key}: unknown key{near_miss(key, known)}" for key in unknown]
        problems += options(f"{kind} '{name}'", cls, {k: v for k, v in values.items() if k not in unknown}, where)
    return problems


def _override(raw: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key.strip():
        raise UsageError(f"--set takes key=value, as in stages.0.lr=1e-4; got '{override}'")
    *path, last = key.strip().split(".")
    table: Any = raw
    for part in path:
        table = _descend(table, part, key)
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    if isinstance(table, list):
        table[_index(table, last, key)] = parsed
    else:
        table[last] = parsed


def _descend(table: Any, part: str, key: str) -> Any:
    if isinstance(table, list):
        return table[_index(table, part, key)]
    child = table.setdefault(part, {})
    if not isinstance(child, dict | list):
        raise UsageError(f"--set {key}: '{part}' is a value, not a table")
    return child


def _index(table: list, part: str, key: str) -> int:
    if not part.isdecimal() or int(part) >= len(table):
        raise UsageError(f"--set {key}: '{part}' is not one of the {len(table)} entries there, counted from 0")
    return int(part)


def _describe(item: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        *parents, key = item["loc"]
        return f"{where}: unknown key{near_miss(str(key), _keys_at(parents))}"
    return f"{where}: {_message(item)}" if where else _message(item)


def _message(item: dict[str, Any]) -> str:
    message = item["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    got = item.get("input")
    return f"{message}, got {got!r}" if isinstance(got, str | int | float) and item["type"] != "missing" else message


def _keys_at(location: list[str | int]) -> set[str]:
    """The keys that the schema allows in the table at `location`."""
    annotation: Any = Recipe
    for part in location:
        if isinstance(part, str):
            annotation = annotation.model_fields[part].annotation
        annotation = _model_in(annotation)
    return set(annotation.model_fields)


def _model_in(annotation: Any) -> Any:
    """The table type inside an optional or a tuple of tables."""
    if typing.get_origin(annotation) in (tuple, typing.Union, types.UnionType):
        inner = [arg for arg in typing.get_args(annotation) if arg not in (type(None), Ellipsis)]
        return _model_in(inner[0])
    return annotation


def _anchor(recipe: Recipe, folder: Path) -> Recipe:
    """Local paths made absolute: those that exist relative to the recipe's folder."""

    def anchor(name: str) -> str:
        path = folder / name
        is_pattern = any(mark in name for mark in "*?[")
        looks_local = name.startswith((".", "/", "~")) or is_pattern or Path(name).suffix in _TEXT_SUFFIXES
        return str(Path(name).expanduser() if name.startswith("~") else path) if looks_local or path.exists() else name

    def sources(group: tuple[Source, ...]) -> tuple[Source, ...]:
        return tuple(source.model_copy(update={"path": anchor(source.path)}) for source in group)

    data = recipe.data.model_copy(
        update={"sources": sources(recipe.data.sources), "validation": sources(recipe.data.validation)}
    )
    update: dict[str, Any] = {"data": data}
    if recipe.base is not None:
        update["base"] = anchor(recipe.base)
    update["stages"] = tuple(
        stage.model_copy(update={"teacher": anchor(stage.teacher)}) if stage.teacher else stage
        for stage in recipe.stages
    )
    return recipe.model_copy(update=update)


_TEXT_SUFFIXES = {".txt", ".jsonl", ".json", ".parquet", ".gz", ".zst", ".md", ".py"}
