"""A step whose loss or gradient is not finite: what is kept of it, and whether the run may go on without it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Literal

from torch import nn

from supra_cli.core.checkpoint.files import write_tensors
from supra_cli.core.data.packing import Batch
from supra_cli.core.errors import NonFiniteError
from supra_cli.core.files import write_json
from supra_cli.core.parallel import World
from supra_cli.core.train.state import Counters
from supra_cli.core.train.step import Outcome

MOST_SKIPPED = 100
"""Steps that a run may leave out before it gives up."""


def leave_out(
    outcome: Outcome,
    batch: Batch,
    student: nn.Module,
    counters: Counters,
    kind: str,
    policy: Literal["stop", "skip"],
    folder: Path,
    world: World,
) -> str:
    """Keep the rows of the next step, those of all ranks, below `folder`; the sentence about it.

    NonFiniteError when that is no fault of the batch, or when the run is to stop at it.
    """
    counters.skipped_steps += 1
    number = counters.step + 1
    facts = {"stage": counters.stage, "kind": kind, "step": number}
    facts |= {"loss": str(outcome.loss), "grad_norm": str(outcome.grad_norm)}
    kept = folder / f"step-{number:06d}"
    if world.leads:
        dump(kept, batch, facts)
    told = (
        f"loss {outcome.loss} and gradient norm {outcome.grad_norm} in stage {counters.stage} ({kind}), "
        f"step {number}; nothing was updated and the batch is kept in {kept}"
    )
    own = ((name, getattr(p, "_local_tensor", p)) for name, p in student.named_parameters())
    found = world.gathered([name for name, parameter in own if not parameter.isfinite().all()])
    spoilt = sorted(itertools.chain(*found))
    if spoilt:
        raise NonFiniteError(f"{told}; the weight {spoilt[0]} is not finite: start over, with a lower learning rate")
    if policy == "stop":
        raise NonFiniteError(
            f"{told}; go on without it with --resume --set non_finite=skip, or lower the learning rate"
        )
    if counters.skipped_steps > MOST_SKIPPED:
        raise NonFiniteError(f"{told}; more than {MOST_SKIPPED} such steps are not the batch's fault: start over")
    return told


def dump(folder: Path, batch: Batch, facts: dict[str, object]) -> None:
    """Keep the batch of a step that went wrong, to look at: `batch.safetensors` and `facts.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors({name: part.contiguous() for name, part in batch._asdict().items()}, folder / "batch.safetensors")
    write_json(folder / "facts.json", facts)
