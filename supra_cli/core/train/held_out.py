"""What a model makes of the held-out rows."""

from __future__ import annotations

import torch
from torch import nn

from supra_cli.core.data.packing import Batch
from supra_cli.core.evaluate import token_nats
from supra_cli.core.parallel import World
from supra_cli.core.train.step import Computing


def held_out_loss(model: nn.Module, held_out: Batch, device: torch.device, dtype: torch.dtype, world: World) -> float:
    """Nats per token; each rank scores its share of the rows."""
    count = len(held_out.labels)
    computing = Computing(device, dtype, count, world)
    (rows,) = computing.own(held_out)
    with computing.autocast():
        nats = token_nats(model, *rows, device=device, numbers=range(world.rank, count, world.size))
    known = nats[~nats.isnan()].double()
    total, tokens = world.total(torch.stack([known.sum(), torch.tensor(known.numel(), dtype=known.dtype)]))
    return float(total / tokens)
