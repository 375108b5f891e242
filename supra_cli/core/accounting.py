"""What a model and a run will take: parameters, state, memory by part, FLOPs, steps. Nothing is allocated.

No formula per architecture: the real model runs the real loss on tensors without storage, and what that would allocate
and multiply is counted. So the numbers hold for every base, mixer and stage, other people's included.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from supra_cli.core import hub
from supra_cli.core.archs import archs
from supra_cli.core.data.rows import Batch
from supra_cli.core.modeling import SupraConfig, SupraForCausalLM
from supra_cli.core.stages import Stage, stages
from supra_cli.core.swap import SOFTMAX, SwappedAttention, layer_kinds
from supra_cli.core.train.loop import select, untie

if TYPE_CHECKING:
    from supra_cli.core import recipe as recipes

GPUS = {
    "RTX 4090": (24, 165),
    "A100 80GB": (80, 312),
    "H100 SXM": (80, 989),
    "H200": (141, 989),
    "MI300X": (192, 1307),
}
"""Memory in GB and dense bf16 TFLOP/s, as in the vendors' data sheets."""

UTILISATION = 0.4
"""Share of the data sheet's FLOP/s that a well-fed training run reaches; an assumption, not a measurement."""


@dataclass(frozen=True)
class ModelPlan:
    """A model's size; bytes of caches are for one sequence."""

    model_type: str
    """The base's."""
    layers: tuple[str, ...]
    """The kind of each layer."""
    parameters: int
    new_parameters: int
    """Those of the mixers; the rest are the base's."""
    dtype: str
    weight_bytes: int
    """All parameters in `dtype`."""
    new_weight_bytes: int
    state_bytes: int
    """The recurrent state of all swapped layers, however long the sequence."""
    softmax_windows: tuple[int | None, ...]
    """How many tokens each remaining softmax layer keeps; None is all."""
    softmax_token_bytes: int
    """Keys and values of one token in one softmax layer."""
    base_windows: tuple[int | None, ...]

    def cache_bytes(self, tokens: int) -> int:
        """Recurrent state and the remaining layers' keys and values after `tokens` tokens."""
        return self.state_bytes + self._kept(self.softmax_windows, tokens)

    def base_cache_bytes(self, tokens: int) -> int:
        """The base's keys and values after `tokens` tokens."""
        return self._kept(self.base_windows, tokens)

    @property
    def break_even_tokens(self) -> int:
        """Tokens from which on the base's cache is larger than the recurrent state that replaced it."""
        swapped = len(self.base_windows) - len(self.softmax_windows)
        return -(-self.state_bytes // (swapped * self.softmax_token_bytes)) if swapped else 0

    def _kept(self, windows: Iterable[int | None], tokens: int) -> int:
        return sum(self.softmax_token_bytes * min(tokens, window or tokens) for window in windows)


@dataclass(frozen=True)
class Memory:
    """Bytes by part at the fullest moment of a training step."""

    weights: int
    """fp32 masters."""
    copies: int
    """The masters' copies in the computing dtype."""
    gradients: int
    optimizer: int
    """AdamW's two moments, fp32."""
    teacher: int
    """Weights of a separate teacher."""
    activations: int
    """Everything else that is alive when most is, in one micro-batch."""

    @property
    def total(self) -> int:
        return self.weights + self.copies + self.gradients + self.optimizer + self.teacher + self.activations


@dataclass(frozen=True)
class StagePlan:
    kind: str
    tokens: int
    """Of the whole stage, in whole steps."""
    steps: int
    rows: int
    """In an optimizer step."""
    micro_rows: int
    """In one forward and backward pass."""
    seq_len: int
    trainable: int
    flops: int
    """Of the whole stage, forward and backward, teacher included."""
    memory: Memory


@dataclass(frozen=True)
class Plan:
    model: ModelPlan
    dtype: str
    """What the passes compute in."""
    stages: tuple[StagePlan, ...]

    @property
    def tokens(self) -> int:
        return sum(stage.tokens for stage in self.stages)

    @property
    def flops(self) -> int:
        return sum(stage.flops for stage in self.stages)

    @property
    def memory_bytes(self) -> int:
        """Of the stage that needs most."""
        return max(stage.memory.total for stage in self.stages)

    def seconds(self, gpu: str) -> float:
        """On one GPU of that name, at UTILISATION."""
        return self.flops / (GPUS[gpu][1] * 1e12 * UTILISATION)


def measure(config: SupraConfig, dtype: torch.dtype | None = None) -> ModelPlan:
    """The size of the model of `config`; `dtype` (the config's own by default) is that of weights, keys and values."""
    with torch.device("meta"):
        model = SupraForCausalLM._from_config(config)
    dtype = dtype or config.dtype or torch.float32
    arch = archs.get(config.swap.base)
    attentions = [getattr(block, arch.slot) for block in arch.layers(model)]
    specs = [arch.spec(attention) for attention in attentions]
    kept = [spec.window for spec, kind in zip(specs, config.swap.layers, strict=True) if kind == SOFTMAX]
    states = [a.mixer.init_state(1, torch.device("meta")) for a in attentions if isinstance(a, SwappedAttention)]
    parameters = dict(model.named_parameters())
    new = sum(parameter.numel() for name, parameter in parameters.items() if ".mixer." in name)
    total = sum(parameter.numel() for parameter in parameters.values())
    return ModelPlan(
        model_type=config.swap.base,
        layers=tuple(config.swap.layers),
        parameters=total,
        new_parameters=new,
        dtype=str(dtype).removeprefix("torch."),
        weight_bytes=total * dtype.itemsize,
        new_weight_bytes=new * dtype.itemsize,
        state_bytes=sum(tensor.nbytes for state in states for tensor in state),
        softmax_windows=tuple(kept),
        softmax_token_bytes=specs[0].kv_heads * (specs[0].head_dim + specs[0].v_dim) * dtype.itemsize,
        base_windows=tuple(spec.window for spec in specs),
    )


def plan(recipe: recipes.Recipe, dtype: torch.dtype = torch.bfloat16) -> Plan:
    """What running `recipe` takes on one device that computes in `dtype`, masters in fp32; touches no weights.

    Needs the configurations of the base and the teachers, which are bundled for the aliased models.
    """
    config = student_config(recipe)
    with FakeTensorMode(), torch.device("cpu"):
        student = SupraForCausalLM._from_config(config, dtype=torch.float32).train()
        stage_plans = tuple(_stage(recipe, spec, student, dtype) for spec in recipe.stages)
    saved = getattr(torch, recipe.checkpoint.dtype)
    return Plan(measure(config, saved), str(dtype).removeprefix("torch."), stage_plans)


def student_config(recipe: recipes.Recipe) -> SupraConfig:
    """The configuration of the model that `recipe` trains; UsageError for an unknown mixer, option or `keep`."""
    if recipe.base is not None:
        base = hub.base_config(hub.resolve(recipe.base))
    else:
        base = AutoConfig.for_model(**{"vocab_size": recipe.tokenizer.vocab_size, **recipe.model})
    return swapped_config(base, recipe.mixer.name, recipe.mixer.options, recipe.keep)


def swapped_config(base: object, mixer: str, options: dict, keep: str) -> SupraConfig:
    """`base` with `mixer` in every layer that `keep` does not spare."""
    kinds = layer_kinds(base.num_hidden_layers, mixer, keep)
    return SupraConfig.from_base(base, mixer=mixer, options=options, layers=kinds)


def _stage(recipe: recipes.Recipe, spec: recipes.Stage, student: SupraForCausalLM, dtype: torch.dtype) -> StagePlan:
    stage_class = stages.get(spec.kind)
    stage = stage_class(stage_class.Options(**spec.options))
    if spec.untie:
        untie(student)
    trained = sum(parameter.numel() for _, parameter in select(student, stage, spec))
    teacher = _teacher(recipe, spec, dtype) if stage.teacher == "separate" else None
    rows, micro_rows, length = recipe.rows(spec), recipe.micro_rows(spec), recipe.seq_len(spec)
    with stage.attached(student):
        flops, peak, copies = _one_pass(stage, student, teacher, micro_rows, length, dtype)
        if rows > micro_rows:  # then the later passes find gradients that take room already
            flops, peak, copies = _one_pass(stage, student, teacher, micro_rows, length, dtype)
            peak += 4 * trained
    student.zero_grad(set_to_none=True)
    gradients = 4 * trained
    steps = recipe.steps(spec)
    tokens = steps * rows * length
    return StagePlan(
        kind=spec.kind,
        tokens=tokens,
        steps=steps,
        rows=rows,
        micro_rows=micro_rows,
        seq_len=length,
        trainable=trained,
        flops=flops * tokens // (micro_rows * length),
        memory=Memory(
            weights=_parameter_bytes(student),
            copies=copies,
            gradients=gradients,
            optimizer=2 * gradients,
            teacher=_parameter_bytes(teacher) if teacher is not None else 0,
            activations=max(0, peak - copies - gradients),
        ),
    )


def _teacher(recipe: recipes.Recipe, spec: recipes.Stage, dtype: torch.dtype) -> nn.Module | None:
    name = spec.teacher or recipe.base
    if name is None:
        return None
    config = hub.base_config(hub.resolve(name))
    config = config if isinstance(config, SupraConfig) else SupraConfig.from_base(config)
    return SupraForCausalLM._from_config(config, dtype=dtype).eval().requires_grad_(False)


def _one_pass(
    stage: Stage, student: nn.Module, teacher: nn.Module | None, rows: int, length: int, dtype: torch.dtype
) -> tuple[int, int, int]:
    """(FLOPs, highest sum of bytes that one micro-batch makes, those of the weights' copies among them)."""
    ids = torch.zeros((rows, length), dtype=torch.long)
    batch = _FullBatch(ids, None, ids)
    meter = _Meter(student, teacher)
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)
    with FlopCounterMode(display=False) as flops, meter:
        with autocast:
            loss = stage.loss(student, teacher, batch).sum
        loss.backward()
    return flops.get_total_flops(), meter.peak, meter.copies


class _FullBatch(Batch):
    """A batch in which every position has a target, countable without looking at the labels."""

    @property
    def targets(self) -> int:
        return self.labels.numel()


class _Meter(TorchDispatchMode):
    """Follows the bytes of all storages made while it is on, and their highest sum."""

    def __init__(self, *models: nn.Module | None):
        super().__init__()
        self.live = 0
        self.peak = 0
        self.copies = 0
        weights = [p.untyped_storage()._cdata for model in models if model is not None for p in _tensors(model)]
        self._weights = frozenset(weights)
        self._known = set(weights)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        copied = function is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self._weights
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage(), copied)
        return output

    def _see(self, storage: torch.UntypedStorage, copied: bool) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        if copied:
            self.copies += size
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """What a model holds between two passes."""
    yield from model.parameters()
    yield from model.buffers()
    yield from (parameter.grad for parameter in model.parameters() if parameter.grad is not None)


def _parameter_bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())
