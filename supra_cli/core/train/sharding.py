"""A model shared out among the ranks by FSDP2: each holds its rows of every parameter, gradient and moment.

What is computed is what one rank computes under autocast, which goes on choosing the number format of every operation.
The policies here choose in which format weights travel, and round only those that autocast would round: the weights of
linear maps, and of those not the mixers'.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.functional import pad
from transformers.pytorch_utils import Conv1D

from supra_cli.core.errors import UsageError
from supra_cli.core.modeling import SupraForCausalLM
from supra_cli.core.parallel import World

STAY_WHOLE = 2**30
"""Bytes of all blocks' weights, as they travel, up to which they stay whole from the forward pass to the backward pass:
nearly a third of the messages less, for memory that is small beside activations, unless these are recomputed."""


def shard(
    model: SupraForCausalLM,
    world: World,
    dtype: torch.dtype,
    *,
    inside: bool = False,
    offload: bool = False,
    recomputed: bool = False,
) -> None:
    """Share out the parameters of `model`, which may still be on meta; nothing in a world of one.

    Units that are whole while they compute: each mixer, and the norms and experts of each block, in fp32, the rest of
    each block in `dtype`, and the root in fp32: embeddings, last norm and head, which may be tied, and which the
    chunked losses call again in the backward pass. Where `dtype` is fp32 too, a block is one unit, for half as many
    messages. Small blocks stay whole until their backward pass (STAY_WHOLE), unless activations are `recomputed`. With
    `inside`, where the loss goes backward in mid-forward, mixers are no units of FSDP2's but whole during their own
    calls. With `offload`, shards lie in CPU memory between their uses.
    """
    if world.size == 1:
        return
    if scalars := [name for name, parameter in model.named_parameters() if parameter.dim() == 0]:
        raise UsageError(f"parameter {scalars[0]} has no dimension, so it cannot be shared out; give it the shape [1]")
    unit = partial(
        fully_shard,
        mesh=world.mesh,
        reshard_after_forward=inside or recomputed or not staying_whole(model, dtype),
        # Inputs stay as they are: autocast rounds them where one rank's would be rounded.
        mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False),
        **({"offload_policy": CPUOffloadPolicy(pin_memory=world.mesh.device_type == "cuda")} if offload else {}),
    )
    rounding = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mixers = [layer.mixer for _, layer in model.swapped_layers()]
    apart: set[nn.Parameter] = set()
    for mixer in mixers:
        if inside:
            _whole_during_calls(mixer, world.mesh)
            apart.update(mixer.parameters())
        elif dtype != torch.float32 and any(True for _ in mixer.parameters()):
            unit(mixer)
    of_mixers = {part for mixer in mixers for part in mixer.modules()}
    for block in model.arch.layers(model):
        wide = [
            part for part in block.modules() if part is not block and part not in of_mixers and not _is_rounded(part)
        ]
        if wide and dtype != torch.float32:
            unit(wide)
        unit(block, mp_policy=rounding, ignored_params=apart)
    # Whole from the forward pass to the end of the backward pass, in which pieces of the logits are computed again.
    unit(model, ignored_params=apart, reshard_after_forward=False)
    for part in model.modules():
        if isinstance(part, FSDPModule):
            # Losses are divided by the tokens of all ranks already. A plain sum also spares NCCL's scaled one, which
            # makes bf16 gradients zero up to torch 2.13 (pytorch#190745).
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)


def staying_whole(model: SupraForCausalLM, dtype: torch.dtype) -> int:
    """Bytes of the blocks' weights, sent in `dtype` where that rounds them and else as they are; 0 for too many."""
    sent_rounded = rounded(model)
    blocks = {parameter for block in model.arch.layers(model) for parameter in block.parameters()}
    size = sum(p.numel() * (dtype.itemsize if p in sent_rounded else p.itemsize) for p in blocks)
    return size if size <= STAY_WHOLE else 0


def rounded(model: SupraForCausalLM) -> set[nn.Parameter]:
    """The parameters that passes in less than fp32 may hold rounded, since autocast would round them: in blocks, of
    linear maps and routers, but no mixer's.
    """
    of_mixers = {part for _, layer in model.swapped_layers() for part in layer.mixer.modules()}
    parts = {part for block in model.arch.layers(model) for part in block.modules()} - of_mixers
    return {parameter for part in parts if _is_rounded(part) for parameter in part.parameters(recurse=False)}


def _is_rounded(part: nn.Module) -> bool:
    """Whether autocast rounds all parameters that a module of a base has itself: linear maps and routers. Not experts,
    stacks of maps, whose grouped products autocast does not know (pytorch#174763).
    """
    own = [parameter for parameter in part._parameters.values() if parameter is not None]
    return isinstance(part, (nn.Linear, Conv1D)) or all(parameter.dim() == 2 for parameter in own)


def _whole_during_calls(mixer: nn.Module, mesh: DeviceMesh) -> None:
    """Gather the mixer's parameters at each of its calls, as a step of autograd, whose backward step sums the ranks'
    gradients into the shards.

    FSDP2's own units cannot do this: the end of any backward pass resets them all, those in mid-forward too.
    """
    shards = {
        parameter: nn.Parameter(
            distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None),
            requires_grad=parameter.requires_grad,
        )
        for parameter in mixer.parameters()
    }
    for part in mixer.modules():
        part._parameters.update({name: shards[p] for name, p in part._parameters.items() if p is not None})
    plain = _Plain(mixer)

    def forward(*args: Any, **kwargs: Any) -> Any:
        named = {f"mixer.{name}": parameter for name, parameter in mixer.named_parameters()}
        shapes = [parameter.shape for parameter in named.values()]
        whole = _Whole.apply(mesh.get_group(), shapes, *(parameter.to_local() for parameter in named.values()))
        return torch.func.functional_call(plain, dict(zip(named, whole, strict=True)), args, kwargs)

    if shards:
        mixer.forward = forward


class _Whole(torch.autograd.Function):
    """Parameters from each rank's rows of them; backward, their gradients' sums over ranks, to each rank its rows.

    All parameters of a call travel in one message. Of n rows each of W ranks has ⌈n/W⌉, the last ones fewer, and sends
    as many as the first.
    """

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, shapes: list[torch.Size], *rows: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.own = group, [part.shape for part in rows]
        ctx.set_materialize_grads(False)  # a parameter that the loss does not reach is to have no gradient
        ctx.widths = [-(-shape[0] // group.size()) * shape[1:].numel() for shape in shapes]
        sent = torch.cat([_widened(part, width) for part, width in zip(rows, ctx.widths, strict=True)])
        every = sent.new_empty(group.size() * len(sent))
        dist.all_gather_single(every, sent, group=group)
        parts = zip(every.view(group.size(), -1).split(ctx.widths, dim=1), shapes, strict=True)
        return tuple(part.reshape(-1)[: shape.numel()].view(shape) for part, shape in parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        size, some = ctx.group.size(), next(part for part in gradients if part is not None)
        sent = torch.cat(
            [
                (some.new_zeros(size * width) if part is None else _widened(part, size * width)).view(size, width)
                for part, width in zip(gradients, ctx.widths, strict=True)
            ],
            dim=1,
        )
        own = sent.new_empty(sent.shape[1])
        dist.reduce_scatter_single(own, sent.view(-1), group=ctx.group)
        parts = zip(own.split(ctx.widths), ctx.own, gradients, strict=True)
        return None, None, *(None if g is None else part[: shape.numel()].view(shape) for part, shape, g in parts)


def _widened(part: Tensor, width: int) -> Tensor:
    """All numbers of `part` in a row, and zeros up to `width`."""
    return pad(part.reshape(-1), (0, width - part.numel()))


class _Plain(nn.Module):
    """A mixer by the forward of its class, for `functional_call`."""

    def __init__(self, mixer: nn.Module):
        super().__init__()
        self.mixer = mixer
        self._forward: Callable[..., Any] = type(mixer).forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(self.mixer, *args, **kwargs)
