"""The part of a checkpoint that only training needs: optimizer moments, fp32 masters, the stage's constants, counters,
and what has to be the same for the run to go on.

Tensors are safetensors, whole ones by name however many ranks wrote them, and counters are JSON; nothing is pickled, so
nothing foreign is ever executed on resume. Random state is not there: every step seeds its own.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from supra_cli.core.checkpoint import slices
from supra_cli.core.errors import SupraError, UsageError
from supra_cli.core.files import sha256, write_json
from supra_cli.core.parallel import ALONE, World
from supra_cli.core.train import lowbit

_IN = "/"
"""Between a moment and the part of it that a tensor is: `exp_avg/codes.<parameter>`."""


@dataclasses.dataclass
class Counters:
    """Where a run stands. `step` and `tokens` count over all stages, `stage_step` within the current one."""

    stage: int = 0
    stage_step: int = 0
    step: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    seconds: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None
    teacher_loss: float | None = None
    finished: bool = False

    def took(self, tokens: int, seconds: float) -> None:
        """Count a step more."""
        self.step += 1
        self.stage_step += 1
        self.tokens += tokens
        self.seconds += seconds


class OlderState(UsageError):
    """A training state that this version does not go on from."""


def save(
    folder: Path,
    counters: Counters,
    optimizer: torch.optim.Optimizer,
    masters: dict[str, Tensor],
    constants: dict[str, Tensor],
    data: dict[str, Any],
    same: dict[str, Any],
    world: World = ALONE,
) -> None:
    """Write the training state into the new directory `folder`; each rank its own part.

    `masters` are fp32 weights that the model's own files do not hold, `constants` what the stage began with, `data` the
    position in the data, `same` what a run that goes on from here must share with this one.
    """
    if world.leads:
        folder.mkdir(parents=True)
    world.barrier()
    moments = {
        f"{key}{_IN}{part}.{name}" if part else f"{key}.{name}": plain
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for key, value in optimizer.state.get(parameter, {}).items()
        for part, plain in lowbit.parts(value).items()
    }
    hashes = {}
    for stem, tensors in {"optimizer": moments, "masters": masters, "stage": constants}.items():
        hashes |= slices.write_shards(tensors, folder, stem, world=world)[1]
    document = {"counters": dataclasses.asdict(counters), "data": data, "same": same}
    if world.leads:
        files = {name: entry["sha256"] for name, entry in hashes.items()}
        write_json(folder / "state.json", document | {"files": files})


def read(folder: Path, world: World = ALONE) -> tuple[Counters, dict[str, Any], dict[str, Any]]:
    """(counters, position in the data, what must be the same). SupraError if any file of the training state is not what
    was written; of several, each rank looks at its share.
    """
    try:
        saved = json.loads((folder / "state.json").read_text())
        if "same" not in saved and "counters" in saved:
            raise OlderState(f"{folder} was written by an older supra, with other losses; finish the run with that one")
        counters, data, same, files = Counters(**saved["counters"]), saved["data"], saved["same"], saved["files"]
        share = sorted(files.items())[world.rank :: world.size]
        changed = [name for name, known in share if sha256(folder / name) != known]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SupraError(f"the training state in {folder} cannot be read: {error}") from None
    if changed:
        raise SupraError(f"{folder / changed[0]} is not what was written")
    return counters, data, same


def constants(folder: Path, device: torch.device) -> dict[str, Tensor]:
    """What the stage began with; empty where it needs nothing."""
    path = folder / "stage.safetensors"
    return load_file(path, device=str(device)) if path.exists() else {}


def restore_masters(folder: Path, model: nn.Module, tied: Mapping[str, str]) -> None:
    """Put fp32 masters, where they were saved, in place of the rounded weights; a weight that was `tied` to another
    then, and no longer is, has that one's.
    """
    stored = _stored(folder, "masters")
    stored |= {name: stored[source] for name, source in tied.items() if source in stored}
    slices.fill({name: p for name, p in model.named_parameters() if name in stored}, folder, stored)


def restore_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """Through the optimizer's own `load_state_dict`, which alone knows where each tensor must lie: on CUDA, fused AdamW
    reads `step` on the device, unchecked.
    """
    stored = _stored(folder, "optimizer")
    groups = optimizer.param_groups
    named = [pair for group in groups for pair in zip(group["names"], group["params"], strict=True)]
    number = {name: index for index, (name, _) in enumerate(named)}
    moments: dict[str, Tensor] = {}
    parts: dict[int, dict[str, dict[str, Tensor]]] = {}
    for label, entry in stored.items():
        place, _, name = label.partition(".")
        key, _, part = place.partition(_IN)
        index, kind = number[name], slices.DTYPES[entry.dtype]
        parameter = named[index][1].detach()
        shared = (
            entry.shape == parameter.shape and kind == parameter.dtype
        )  # as the parameter is, rows of it if sharded
        empty = torch.empty_like(parameter) if shared else torch.empty(entry.shape, dtype=kind)
        moments[label] = parts.setdefault(index, {}).setdefault(key, {})[part] = empty
    slices.fill(moments, folder, stored)
    state = {index: {key: lowbit.whole(plain) for key, plain in keys.items()} for index, keys in parts.items()}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _stored(folder: Path, stem: str) -> dict[str, slices.Entry]:
    return slices.headers(folder, sorted(path.name for path in folder.glob(f"{stem}*.safetensors")))
