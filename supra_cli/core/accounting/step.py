"""A micro-batch of a stage's real loss on tensors without storage: what it multiplies and what autograd keeps of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import masking_utils
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from supra_cli.core import ops
from supra_cli.core import recipe as recipes
from supra_cli.core.data.packing import Batch
from supra_cli.core.flops import counter
from supra_cli.core.modeling import SupraConfig, SupraForCausalLM
from supra_cli.core.swap import mixer_names
from supra_cli.core.train.build import prepare, stage_of
from supra_cli.core.train.step import Computing, begin

_aten, _CPU = torch.ops.aten, torch.device("cpu")
_CHUNK, _TRITON = torch.ops.supra.chunk_backward.default, torch.ops.supra.triton_backward.default
_DELTA = torch.ops.supra.delta_chunk_backward.default


class Figures(NamedTuple):
    """Of one micro-batch, in bytes but for FLOPs and logits; each linear in the numbers of layers of each kind."""

    flops: int = 0
    again: int = 0
    """FLOPs of the blocks' forward pass, which activation checkpointing does twice."""
    blocks: int = 0
    """Activations in the blocks that autograd keeps, when it keeps most."""
    outside: int = 0
    """And outside of them, without those of logits."""
    inputs: int = 0
    """Of the blocks: all that activation checkpointing keeps of them."""
    block: int = 0
    """Activations of the block with most."""
    copies: int = 0
    """Kept copies of the blocks' weights, but for the mixers', in the computing dtype."""
    other_copies: int = 0
    passing: int = 0
    """Alive for a moment while a block computes: what the operator needs inside and, where the loss is one part, three
    of the widest tensor, gradients of what a product was given and of what it gives. Where its parts end in the blocks,
    as much as autograd keeps of one: its gradients, and the pass that goes on without any.
    """
    logits: int = 0
    """Numbers in the student's logits."""
    piece: int = 0
    """As many of them as are made at a time."""


def figures(
    recipe: recipes.Recipe, spec: recipes.Stage, dtype: torch.dtype, device: str, configs: Sequence[SupraConfig]
) -> Figures:
    """Of a student and, where there is one, a teacher of these configurations, without activation checkpointing."""
    # transformers takes positions without data to have several documents in a row and makes a mask, while rows that do
    # have them come with one.
    as_given = mock.patch.object(masking_utils, "find_packed_sequence_indices", return_value=None)
    watch = _Watch(recipe.data.documents != "joined", dtype)
    with FakeTensorMode(), _CPU, ops.planning("triton" if device == "cuda" else None), as_given, watch:
        student = SupraForCausalLM._from_config(configs[0], dtype=torch.float32).train()
        teachers = [SupraForCausalLM._from_config(config, dtype=dtype).eval() for config in configs[1:]]
        for model in (student, *teachers):
            model.config._experts_implementation = _PLANNED_EXPERTS
        stage = stage_of(spec)
        prepare(student, stage, spec.model_copy(update={"activation_checkpointing": False}))
        ids = torch.zeros((recipe.micro_rows(spec), recipe.seq_len(spec)), dtype=torch.long)
        batch = Batch(ids, ids, ids)
        computing = Computing(_CPU, dtype, len(ids))
        begin(stage, student, batch, computing)
        flops = counter()
        watch.follow(student, teachers, flops)
        with flops, saved_tensors_hooks(watch.pack, lambda x: x), computing.autocast():
            stage.loss(student, *(teachers or [None]), batch, watch.backward)
    beside = 3 * watch.widest if watch.parts == 1 else sum(watch.most.values())
    watch.found["passing"] = beside + watch.inside
    blocks = [size for place, size in watch.most.items() if isinstance(place, int)]
    kept = {name: size for name, size in watch.most.items() if isinstance(name, str)}
    kept["outside"] = kept.get("outside", 0) + kept.pop("loss", 0) * (not watch.found["piece"])
    return Figures(flops.get_total_flops(), blocks=sum(blocks), block=max(blocks, default=0), **kept, **watch.found)


def _experts(self: nn.Module, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """As much work as a mixture of experts has, whichever a token is sent to: all go to the first. In the weights' own
    format: autocast does not know grouped products.

    hidden [N,D], chosen [N,k] and weights [N,k] -> [N,D].
    """
    sent, (up, down) = hidden.repeat_interleave(chosen.shape[1], dim=0), (self.gate_up_proj[0], self.down_proj[0])
    with torch.autocast(hidden.device.type, enabled=False):
        inner = self._apply_gate(linear(sent.to(up.dtype), up))
        answers = linear(inner.to(down.dtype), down) * weights.reshape(-1, 1)
    return answers.view(*chosen.shape, -1).sum(1).to(hidden.dtype)


_PLANNED_EXPERTS = "supra_plan"
ALL_EXPERTS_FUNCTIONS.register(_PLANNED_EXPERTS, _experts)


def _inside(backward: object, args: Sequence[Any], dtype: torch.dtype) -> int:
    """Bytes that an operator's backward pass needs inside: on a GPU the state at the start of each chunk, else the fp32
    buffers of a block: of each head 3 as wide as a key, and of each state 5, or with a decay per channel 3 more as wide
    as a chunk of keys.
    """
    (batch, tokens, heads, K), V, g = args[2].shape, args[4].shape[-1], args[5]
    if backward is _TRITON:
        return batch * heads * -(-tokens // ops.chunk_tokens("cuda", K, V)) * K * V * dtype.itemsize
    channels = backward is _DELTA and g is not None and g.dim() == 4
    chunk = ops.delta_chunk_tokens(channels) if backward is _DELTA else ops.chunk_tokens("cpu", K, V)
    block = -(-tokens // max(1, args[8 if backward is _DELTA else 7].shape[0]))
    states = args[3].shape[2] if backward is _DELTA else heads
    of_head, of_state = 3 * K + V + chunk, 5 * K + 2 * V + (3 * chunk * K if channels else chunk) + 2 * K * V // chunk
    return 4 * batch * block * (heads * of_head + states * of_state)


class _Watch(TorchDispatchMode):
    """Follows what autograd saves and where, until a backward pass lets go of it.

    What a program asks of data that are not there is answered with one, and to yes or no whether a row is `packed`.
    """

    def __init__(self, packed: bool, dtype: torch.dtype):
        super().__init__()
        self.found: dict[str, int] = defaultdict(int)
        self.most: dict[object, int] = {}
        self.widest = self.inside = self.parts = 0
        self._packed, self._dtype, self._place = packed, dtype, "outside"
        self._saved: dict[int, tuple[torch.UntypedStorage, object]] = {}
        self._weights: dict[int, str] = {}
        """What copies of a weight are counted as, by its storage."""
        self._copies: dict[int, tuple[torch.UntypedStorage, str]] = {}
        """Held on to: another tensor would get the storage of one that is gone."""

    def follow(self, student: SupraForCausalLM, teachers: Sequence[SupraForCausalLM], flops: FlopCounterMode) -> None:
        of_mixers, blocks = mixer_names(student), list(student.arch.layers(student))
        in_blocks = {parameter for block in blocks for parameter in block.parameters()}
        for name, weight in (pair for model in [*teachers, student] for pair in model.named_parameters()):
            rest = weight in in_blocks and name not in of_mixers
            self._weights[weight.untyped_storage()._cdata] = "copies" if rest else "other_copies"

        def enter(number: int, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self.found["inputs"] += (args[0] if args else kwargs["hidden_states"]).nbytes
            self._place = number

        def leave(place: str, *_: object) -> None:
            self._place = place

        def count(sign: int, *_: object) -> None:
            self.found["again"] += sign * flops.get_total_flops()

        def widest(module: nn.Module, args: tuple, y: object) -> None:
            self.widest = max(self.widest, y.nbytes if isinstance(y, Tensor) else 0)

        def logits(module: nn.Module, args: tuple, y: Tensor) -> None:
            self.found["logits"] += y.numel()
            self.found["piece"] = max(self.found["piece"], y.numel())

        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(enter, number), with_kwargs=True)
            block.register_forward_hook(partial(leave, "outside"))
            for module in block.modules():
                module.register_forward_hook(widest)
        stack = student.arch.stack(student)
        stack.register_forward_pre_hook(partial(count, -1))
        stack.register_forward_hook(partial(count, 1))
        stack.register_forward_hook(partial(leave, "loss"))
        student.get_output_embeddings().register_forward_hook(logits)

    def pack(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in self._weights:
            _, place = self._copies.get(storage._cdata, (None, self._place))
            self._saved.setdefault(storage._cdata, (storage, place))
        return x

    def backward(self, part: Tensor) -> Tensor:
        self.parts += 1
        kept: dict[object, int] = defaultdict(int)
        for storage, place in self._saved.values():
            kept[place] += storage.nbytes()
        self.most = max(self.most, kept, key=lambda places: sum(places.values()))
        self._saved.clear()
        part.backward()
        return part.detach()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is _aten._local_scalar_dense.default and args[0].constant is None:
            return self._packed if args[0].dtype == torch.bool else 1
        if function in (_CHUNK, _TRITON, _DELTA):
            self.inside = max(self.inside, _inside(function, args, self._dtype))
        output = function(*args, **(kwargs or {}))
        if function is _aten._to_copy.default and (weight := args[0].untyped_storage()._cdata) in self._weights:
            storage = output.untyped_storage()
            self._copies[storage._cdata] = storage, self._weights[weight]
        return output
