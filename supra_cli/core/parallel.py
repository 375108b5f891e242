"""Processes that train one model together: which of them this one is, and what they say to each other.

torchrun starts them and tells each its number in the environment. A process by itself is a world of one rank, in which
every function here is the identity and torch.distributed is not used.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from supra_cli.core import device as devices
from supra_cli.core.errors import Elsewhere, ResourceError, Stopped, SupraError, UsageError

T = TypeVar("T")

LEAST_TORCH = (2, 13)
"""Before it, FSDP2 leaves the last rank's part of tied weights untrained (pytorch#176076)."""
_PATIENCE = timedelta(hours=12)
"""How long ranks wait for one that downloads, converts, tokenises or writes; within a step torch's own timeout holds.
One that dies breaks its connections at once."""
_MEETING = timedelta(minutes=10)
"""How long the first of them waits for the last to start."""
_REFUSED, _LAUNCH = "supra.refused", "supra.launch"
"""Keys in torchrun's store, which outlives the ranks: who refused to start, and by which name the launch is known."""

_NAMED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells each rank besides WORLD_SIZE."""
_LAST_WORDS = 2.0
"""Seconds in which the rank that has something to tell does so: when one ends, torchrun ends the others."""


@dataclass(frozen=True)
class World:
    """The ranks that share a model; this process is number `rank` of `size`."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Its number on its own machine."""
    restarts: int = 0
    """How often torchrun has started these processes again."""
    launch: str | None = None
    """What is the same each time that it starts them, and never again; None for processes that it did not start."""
    device: str = "cpu"
    """What this rank computes on."""
    mesh: DeviceMesh | None = None
    """All ranks in a row, of the kind of device that is computed on; None in a world of one."""
    control: Any = None
    """The group, by gloo on the CPU, for what is not a tensor of the model."""

    @property
    def leads(self) -> bool:
        """Whether this rank writes, speaks and downloads for all."""
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(self.control)

    def shared(self, value: T) -> T:
        """Rank 0's `value`; what the others give is not looked at."""
        if self.size == 1:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, src=0, group=self.control)
        return holder[0]

    def gathered(self, value: T) -> list[T]:
        """Every rank's `value`, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def total(self, values: Tensor) -> Tensor:
        """The sum of all ranks' `values`, on the CPU."""
        values = values.detach().cpu()
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    @contextmanager
    def first(self) -> Iterator[None]:
        """One rank of each machine runs the block, then the others do: they find in the cache what it has put there, or
        fail as it did.
        """
        if self.local_rank > 0:
            self.barrier()
        try:
            yield
        finally:
            if self.local_rank == 0:
                self.barrier()


ALONE = World()


@contextmanager
def joined(device: str) -> Iterator[World]:
    """The world of the ranks that torchrun started, to compute on `device`: auto, cpu, cuda or mps.

    An error is told by the rank that has it first; on the others it becomes `Elsewhere`, which says nothing. A rank
    whose connections break although none has told an error raises a SupraError: another one was killed. Ranks that
    torchrun starts again after a lasting error end at once: they would repeat it, or go on with what was refused.
    """
    size, count = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("TORCHELASTIC_RESTART_COUNT")
    if size == 1 and count is None:
        yield World(device=own_device(device))
        return
    if lacking := [name for name in _NAMED if name not in os.environ]:
        raise UsageError(
            f"WORLD_SIZE is {size} and {', '.join(lacking)} {'are' if lacking[1:] else 'is'} not set: start several "
            "ranks by torchrun, or unset WORLD_SIZE"
        )
    store, rank, size = next(dist.rendezvous("env://"))
    with _refused_once(store, rank):
        own = own_device(device)
        launch = None if count is None else store.compare_set(_LAUNCH, "", uuid.uuid4().hex).decode()
        restarts = int(count or 0)
        if size == 1:
            yield World(restarts=restarts, launch=launch, device=own)
            return
        with _connected(store, rank, size, own) as control:
            restarts = max(World(rank, size, control=control).gathered(restarts))  # each node counts its own
            mesh = dist.init_device_mesh(torch.device(own).type, (size,))
            yield World(rank, size, int(os.environ["LOCAL_RANK"]), restarts, launch, own, mesh, control)


def own_device(device: str) -> str:
    """What this rank computes on where `device` is asked for. UsageError for one that several ranks cannot share, and a
    torch that cannot train on several; ResourceError for one that is not there.
    """
    size, number = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    device = devices.resolve("auto") if device == "auto" else device
    if size > 1:
        _check(device, size)
    device = devices.resolve(device)
    if size == 1 or not device.startswith("cuda"):
        return device
    if number >= torch.cuda.device_count():
        raise ResourceError(
            f"rank {number} of this machine has no GPU: there are {torch.cuda.device_count()}; "
            "give torchrun as many processes per node"
        )
    return f"cuda:{number}"


def _check(device: str, size: int) -> None:
    kind, found = torch.device(device).type, tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found < LEAST_TORCH:
        raise UsageError(
            f"{size} ranks need torch {'.'.join(map(str, LEAST_TORCH))} or later, got {'.'.join(map(str, found))}; "
            "upgrade it, or run one process"
        )
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"{size} ranks cannot share the one device '{device}'; use cuda or cpu, or run one process")
    if ":" in device:
        raise UsageError(f"--device is {device}, but each of {size} ranks takes its own GPU; say --device cuda")


def _heed_refusal(store: dist.Store, after: float = 0) -> None:
    """Raise Elsewhere, so many seconds later, if a rank of this launch has ended by a lasting error."""
    if store.check([_REFUSED]):
        time.sleep(after)
        raise Elsewhere(int(store.get(_REFUSED).split()[1]))


@contextmanager
def _refused_once(store: dist.Store, rank: int) -> Iterator[None]:
    """Of ranks that all end by a lasting error one says why; those that torchrun starts again end at once."""
    _heed_refusal(store)
    try:
        yield
    except SupraError as error:
        if not error.lasting:
            raise
        own = f"{rank} {error.exit_code}".encode()
        if store.compare_set(_REFUSED, "", own.decode()) != own:
            raise Elsewhere(error.exit_code) from error
        raise


@contextmanager
def _connected(launched: dist.Store, rank: int, size: int, device: str) -> Iterator[dist.ProcessGroup]:
    """The process groups of the ranks; the one for what is not a tensor of the model."""
    store, kind = launched, torch.device(device).type
    if kind == "cuda":
        torch.cuda.set_device(torch.device(device))
    try:
        store = _fresh(launched, rank, size)
        groups = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(groups, store=store, rank=rank, world_size=size)
        yield dist.new_group(backend="gloo", timeout=_PATIENCE)
    except Stopped as stopped:
        if rank == 0:
            raise
        time.sleep(_LAST_WORDS)
        raise Elsewhere(stopped.exit_code) from None
    except Elsewhere:
        raise
    except KeyboardInterrupt:
        if rank == 0:
            raise
        raise Elsewhere(130) from None
    except Exception as error:
        if not _is_first_to_fail(store, rank):
            time.sleep(_LAST_WORDS)
            raise Elsewhere(SupraError.exit_code) from error
        if _is_broken_connection(error):
            if "timed out" in str(error).lower():
                raise SupraError(
                    "another rank of this run did not answer in time: it hangs, or is much slower; go on with --resume"
                ) from error
            raise SupraError(
                "another rank of this run ended without a word: killed, crashed or cut off; go on with --resume"
            ) from error
        raise
    dist.destroy_process_group()


def _fresh(store: dist.Store, rank: int, size: int) -> dist.Store:
    """The part of the store that nobody has written to before these ranks came.

    torchrun keeps one store for all of its attempts (pytorch#135712), in which ranks that it starts again would find
    the addresses of their dead predecessors. So each says under which new name it has come, and rank 0 answers there.
    Raises Elsewhere where a rank has refused to start meanwhile, SupraError where one does not come in time.
    """
    token = name = uuid.uuid4().hex
    until = time.monotonic() + _MEETING.total_seconds()

    def waited_for(key: str, *, asking: Callable[[], None] = lambda: None) -> None:
        while not store.check([key]):
            _heed_refusal(store, _LAST_WORDS)
            if time.monotonic() > until:
                raise SupraError(
                    f"the {size} ranks of this run did not all start within {_MEETING.total_seconds():.0f} seconds; "
                    "look at what the others say, and launch it again"
                )
            asking()
            time.sleep(0.05)

    if rank > 0:
        store.set(f"supra.came.{rank}", name)
        waited_for(name)
        token = store.get(name).decode()
        store.set(f"{token}.{rank}", "")
        return dist.PrefixStore(token, store)
    for other in range(1, size):
        came = f"supra.came.{other}"
        waited_for(came)
        # A predecessor's name is nobody's.
        waited_for(f"{token}.{other}", asking=lambda came=came: store.set(store.get(came).decode(), token))
    return dist.PrefixStore(token, store)


def _is_first_to_fail(store: dist.Store, rank: int) -> bool:
    try:
        return store.compare_set("supra.failed", "", str(rank)) == str(rank).encode()
    except (dist.DistError, RuntimeError):  # whoever held the store is gone, and with it who could have told
        return True


def _is_broken_connection(error: Exception) -> bool:
    """By its words: gloo's have the source file of its transport in front, NCCL's the name of the error."""
    said = str(error).lower()
    words = ("/gloo/", "connection closed", "connection reset", "broken pipe", "ncclremote", "ncclsystem", "aborted")
    lost = isinstance(error, (dist.DistNetworkError, dist.DistStoreError))  # the store, which one of the machines holds
    return lost or (isinstance(error, RuntimeError) and any(word in said for word in words))


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """While this lasts, the module's parameters are whole on every rank; what they are at the end is kept.

    All ranks must write the same to them.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    shards = [
        (part, name, parameter)
        for part in module.modules()
        for name, parameter in part._parameters.items()
        if isinstance(parameter, DTensor)
    ]
    for part, name, shard in shards:
        part._parameters[name] = nn.Parameter(shard.detach().full_tensor(), requires_grad=shard.requires_grad)
    try:
        yield
    finally:
        with torch.no_grad():
            for part, name, shard in shards:
                plain = part._parameters[name].detach()
                again = distribute_tensor(plain, shard.device_mesh, shard.placements, src_data_rank=None)
                shard.to_local().copy_(again.to_local())
                part._parameters[name] = shard
