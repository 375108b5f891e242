"""What a model and a run will take: parameters, state, memory by part, FLOPs, steps. Nothing is allocated.

No formula per architecture: the real model runs the real loss on tensors without storage, and what that would allocate
and multiply is counted. So the numbers hold for every base, mixer and stage, other people's included.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AutoConfig

from supra_cli.core import hub
from supra_cli.core.archs import archs
from supra_cli.core.data.rows import Batch
from supra_cli.core.modeling import SupraConfig, SupraForCausalLM
from supra_cli.core.stages import Stage, stages
from supra_cli.core.swap import SOFTMAX, SwappedAttention, layer_kinds
from supra_cli.core.train.prepare import prepare

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


_aten = torch.ops.aten
# The attention that the CPU runs is not in PyTorch's register; it takes what the others take.
_FLOPS = {
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
}


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
    """The student before its first stage."""
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
    size = measure(config, getattr(torch, recipe.checkpoint.dtype))
    with FakeTensorMode(), torch.device("cpu"):
        student = _built(config, torch.float32)
        stage_plans = tuple(_stage(recipe, spec, student, dtype) for spec in recipe.stages)
    return Plan(size, str(dtype).removeprefix("torch."), stage_plans)


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
    trained = sum(parameter.numel() for _, parameter in prepare(student, stage, spec))
    teacher = _teacher_config(recipe, spec) if stage.teacher == "separate" else None
    cost = _cost(recipe, spec, stage, student.config, teacher, dtype)
    gradients = 4 * trained
    rows, micro_rows, length = recipe.rows(spec), recipe.micro_rows(spec), recipe.seq_len(spec)
    steps = recipe.steps(spec)
    # Later passes of a step find the gradients in place; in a single one they grow as the activations are given back.
    beside = gradients if rows == micro_rows else 0
    return StagePlan(
        kind=spec.kind,
        tokens=steps * rows * length,
        steps=steps,
        rows=rows,
        micro_rows=micro_rows,
        seq_len=length,
        trainable=trained,
        flops=cost.flops * steps * rows // micro_rows,
        memory=Memory(
            weights=_parameter_bytes(student),
            copies=cost.copies,
            gradients=gradients,
            optimizer=2 * gradients,
            teacher=0 if teacher is None else _parameter_bytes(_built(teacher, dtype)),
            activations=max(0, cost.kept - beside) + cost.passing,
        ),
    )


def _teacher_config(recipe: recipes.Recipe, spec: recipes.Stage) -> SupraConfig | None:
    name = spec.teacher or recipe.base
    if name is None:
        return None
    config = hub.base_config(hub.resolve(name))
    return config if isinstance(config, SupraConfig) else SupraConfig.from_base(config)


class _Cost(NamedTuple):
    """Of one micro-batch, forward and backward."""

    flops: int
    copies: int
    """Bytes of the weights' copies in the computing dtype."""
    kept: int
    """Other bytes that the forward pass leaves for the backward pass."""
    passing: int
    """Bytes beyond that, and beyond the gradients, that are alive for a moment."""


def _cost(
    recipe: recipes.Recipe,
    spec: recipes.Stage,
    stage: Stage,
    config: SupraConfig,
    teacher: SupraConfig | None,
    dtype: torch.dtype,
) -> _Cost:
    """The cost with all layers, from models of one and two layers: every further layer of a kind costs the same."""
    first = config.swap.layers[0]

    def probe(*layers: str, teacher_layers: int = 1) -> _Cost:
        student = _built(_cut(config, layers), torch.float32).train()
        prepare(student, stage, spec)
        beside = None if teacher is None else _built(_cut(teacher, teacher.swap.layers[:teacher_layers]), dtype).eval()
        with stage.attached(student):
            return _one_pass(stage, student, beside, recipe.micro_rows(spec), recipe.seq_len(spec), dtype)

    one = probe(first)
    further = [(probe(first, kind), count) for kind, count in Counter(config.swap.layers[1:]).items()]
    if teacher is not None:
        further.append((probe(first, teacher_layers=2), len(teacher.swap.layers) - 1))
    sums = [at_one + sum(count * (two[i] - at_one) for two, count in further) for i, at_one in enumerate(one[:3])]
    return _Cost(*sums, passing=max(cost.passing for cost in (one, *(two for two, _ in further))))


def _cut(config: SupraConfig, layers: Sequence[str]) -> SupraConfig:
    """`config` with these layers alone."""
    base = copy.deepcopy(config.plain())
    if getattr(base, "layer_types", None):
        base.layer_types = base.layer_types[: len(layers)]
    base.num_hidden_layers = len(layers)
    swap = config.swap
    return SupraConfig.from_base(base, mixer=swap.mixer, options=swap.options, layers=layers)


def _built(config: SupraConfig, dtype: torch.dtype) -> SupraForCausalLM:
    return SupraForCausalLM._from_config(config, dtype=dtype)


def _one_pass(
    stage: Stage, student: nn.Module, teacher: nn.Module | None, rows: int, length: int, dtype: torch.dtype
) -> _Cost:
    ids = torch.zeros((rows, length), dtype=torch.long)
    batch = _FullBatch(ids, None, ids)
    meter = _Meter(student, teacher)
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)
    with meter:
        with autocast:
            loss = stage.loss(student, teacher, batch).sum
        kept = meter.live - meter.copies
        loss.backward()
    gradients = sum(parameter.nbytes for parameter in student.parameters() if parameter.requires_grad)
    return _Cost(meter.flops, meter.copies, kept, max(0, meter.peak - meter.copies - max(kept, gradients)))


class _FullBatch(Batch):
    """A batch in which every position has a target, countable without looking at the labels."""

    @property
    def targets(self) -> int:
        return self.labels.numel()


class _Meter(TorchDispatchMode):
    """Adds up FLOPs and follows the bytes of all storages made while it is on, and their highest sum."""

    def __init__(self, *models: nn.Module | None):
        super().__init__()
        self.flops = 0
        self.live = 0
        self.peak = 0
        self.copies = 0
        weights = [p.untyped_storage()._cdata for model in models if model is not None for p in _tensors(model)]
        self._weights = frozenset(weights)
        self._known = set(weights)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        if count := _FLOPS.get(function.overloadpacket):
            self.flops += count(*args, **kwargs, out_val=output)
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
    yield from model.parameters()
    yield from model.buffers()


def _parameter_bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())
