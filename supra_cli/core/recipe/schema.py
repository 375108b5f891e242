"""What a recipe may say: frozen models, the text under each key being its documentation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from supra_cli.core.errors import UsageError
from supra_cli.core.recipe.keep import parse
from supra_cli.core.recipe.paths import STDLIB, looks_local

Lookup = Callable[[Literal["mixer", "stage", "model"], str], type]
"""(kind, name) → the options dataclass of that mixer or stage, or the Hugging Face config of that `model_type`; raises
UsageError for an unknown name."""

Packing = Literal["separate", "joined", "cut"]
Positive = Annotated[int, Field(gt=0)]
Name = Annotated[str, Field(min_length=1)]
"""Of what lies somewhere: an empty one, as a shell makes of a variable that is not set, would be the working directory.
"""
Row = Annotated[int, Field(ge=2, le=2**24)]
MOST_LAYERS = 1024
"""Of a model from scratch: each is built before anything can be said of the whole."""
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
    """Registered name of the mixer that replaces softmax attention; every other key of the table is one of its options,
    which `supra recipe options` lists."""


class Source(Table):
    path: Name
    """A file, folder or glob (relative to the recipe), the built-in source `python-stdlib`, or a dataset on the
    hub. A folder stands for its data files (.txt, .jsonl, .ndjson, .json, .parquet, .csv, .tsv; also .gz, .zst, .bz2),
    hidden ones left out; a glob for every file that it names."""
    text: Name = "text"
    """Field or column that holds the text, where records have fields."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Share of the training rows drawn from this source, relative to the other sources' weights."""
    repeat: Literal["no", "text", "random"] = "no"
    """For learning to recall, rows in which passages come twice instead of this source's documents: `text` repeats
    passages of the source, `random` passages of random tokens between which its text stands."""
    name: Name | None = None
    """Configuration of a hub dataset."""
    split: Name | None = None
    """Split of a hub dataset, of a built-in source, or of a folder whose files or sub-folders are named for splits
    (train, validation, test); `train` for sources and `validation` for validation when left out."""
    revision: Name | None = None
    """Commit or tag of a hub dataset."""

    @model_validator(mode="after")
    def _keys_have_an_effect(self) -> Source:
        if self.path == STDLIB and self.text != "text":
            raise ValueError(f"text is '{self.text}', but {STDLIB} has no fields; leave it out")
        for key in ("name", "revision") if self.path == STDLIB or looks_local(self.path) else ():
            if (value := getattr(self, key)) is not None:
                raise ValueError(f"{key} is '{value}', but only a dataset on the hub has one, not {self.path}")
        return self


class Data(Table):
    seq_len: Row = 2048
    """Tokens in a row."""
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    """Training text, mixed by weight."""
    validation: tuple[Source, ...] = ()
    """Held-out text for the validation loss."""
    validation_tokens: Positive = 65_536
    """At most this many held-out tokens are scored at each validation."""
    documents: Packing = "separate"
    """`separate`: a row is packed with documents, and state and positions restart at each; `joined`: a row is one run
    of text; `cut`: a row holds one document or a piece of one, and what that leaves empty carries no loss."""
    skip_share: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Largest share of a local source's records that may be skipped as empty, undecodable or without text before that
    is an error."""

    @model_validator(mode="after")
    def _validation_can_be_drawn(self) -> Data:
        for number, source in enumerate(self.validation):
            if source.repeat != "no" or source.weight != 1:
                raise ValueError(
                    f"validation.{number} has a weight or repeat, which only training sources have; held-out tokens "
                    "are shared out evenly"
                )
        if self.validation and self.validation_tokens < self.seq_len * len(self.validation):
            raise ValueError(
                f"validation_tokens is {self.validation_tokens}, fewer than one row of {self.seq_len} for each of "
                f"{len(self.validation)} sources"
            )
        return self


class Tokenizer(Table):
    vocab_size: Annotated[int, Field(ge=260, le=2**24)]
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
    """Registered name of the loss: transfer, distill or finetune; further keys of the table are its options, which
    `supra recipe options` lists."""
    tokens: Annotated[int, Field(gt=0, le=2**60)]
    """Tokens to train on in this stage."""
    batch_tokens: Annotated[int, Field(gt=0, le=2**30)] = 4096
    """Tokens in an optimizer step, rounded down to whole rows."""
    micro_batch_tokens: Positive | None = None
    """Tokens in one forward and backward pass; the whole batch when left out."""
    seq_len: Row | None = None
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
    clip_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """The gradient is scaled down to this global norm."""
    teacher: Name | None = None
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
    base: Name | None = None
    """Model to start from: a directory, an alias or a hub id."""
    model: dict[str, Any] | None = None
    """Instead of `base`: the Hugging Face configuration of a model to train from scratch, `model_type` included."""
    tokenizer: Tokenizer | None = None
    """With `model`: the tokenizer to train first."""
    init: Literal["pretrained", "scratch"] = "pretrained"
    """`pretrained` takes the base's weights, `scratch` only its shape and tokenizer."""
    keep: str = "none"
    """Layers that keep softmax attention: none, all, or every:N, first:N, last:N, sliding and numbers as in 0,5,7;
    auto:N with a student that `supra convert STUDENT --keep auto:N` has made."""
    seed: Annotated[int, Field(ge=0, lt=2**47)] = 0
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

    @field_validator("keep")
    @classmethod
    def _keep_means_something(cls, keep: str) -> str:
        try:
            parse(keep)
        except UsageError as error:
            raise ValueError(str(error)) from None
        return keep

    @field_validator("model")
    @classmethod
    def _layers_are_countable(cls, model: dict[str, Any] | None) -> dict[str, Any] | None:
        for key, value in (model or {}).items():
            if "layer" in key and isinstance(value, int) and value > MOST_LAYERS:
                raise ValueError(f"{key} is {value}, expected at most {MOST_LAYERS}")
        return model

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
        """What decides the bits of the result: everything but how often is saved and validated, and where is logged.

        Where on this machine models and text lie decides nothing, so absolute paths are left out: whoever compares two
        trajectories compares what lies there by its content.
        """
        free = {"checkpoint", "validate_every_steps", "non_finite", "track"}
        kept = self.model_dump(mode="json", exclude=free)
        data = kept["data"]
        for table, key in [(kept, "base"), *((stage, "teacher") for stage in kept["stages"])] + [
            (source, "path") for source in data["sources"] + data["validation"]
        ]:
            if table[key] is not None and Path(table[key]).is_absolute():
                table[key] = "here"
        return kept

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
