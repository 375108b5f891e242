"""The part of a checkpoint that only training needs: optimizer moments, fp32 masters, the stage's constants, random
state, counters, and what has to be the same for the run to go on.

Tensors are stored as safetensors and counters as JSON; nothing is pickled, so nothing foreign is ever executed on
resume.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from supra_cli.core.checkpoint.files import sha256, write_tensors
from supra_cli.core.errors import SupraError, UsageError
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
) -> None:
    """Write the training state into `folder`.

    `masters` are fp32 weights that the model's own files do not hold, `constants` what the stage began with, `data` the
    position in the data, `same` what a run that goes on from here must share with this one.
    """
    folder.mkdir(parents=True)
    moments = {
        f"{key}{_IN}{part}.{name}" if part else f"{key}.{name}": plain.detach().cpu().contiguous()
        for name, state in _named_states(optimizer)
        for key, value in state.items()
        for part, plain in lowbit.parts(value).items()
    }
    write_tensors(moments, folder / "optimizer.safetensors")
    if masters:
        masters = {name: value.detach().cpu().contiguous() for name, value in masters.items()}
        write_tensors(masters, folder / "masters.safetensors")
    if constants:
        constants = {name: value.detach().cpu().contiguous() for name, value in constants.items()}
        write_tensors(constants, folder / "stage.safetensors")
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random |= {f"cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    write_tensors(random, folder / "random.safetensors")
    hashes = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    document = {"counters": dataclasses.asdict(counters), "data": data, "same": same, "files": hashes}
    (folder / "state.json").write_text(json.dumps(document, indent=2))


def read(folder: Path) -> tuple[Counters, dict[str, Any], dict[str, Any]]:
    """(counters, position in the data, what must be the same). SupraError if any file of the training state is not what
    was written.
    """
    try:
        saved = json.loads((folder / "state.json").read_text())
        if "same" not in saved and "counters" in saved:
            raise OlderState(f"{folder} was written by an older supra, with other losses; finish the run with that one")
        counters, data, same, files = Counters(**saved["counters"]), saved["data"], saved["same"], saved["files"]
        changed = [name for name, known in files.items() if sha256(folder / name) != known]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SupraError(f"the training state in {folder} cannot be read: {error}") from None
    if changed:
        raise SupraError(f"{folder / changed[0]} is not what was written")
    return counters, data, same


def constants(folder: Path, device: torch.device) -> dict[str, Tensor]:
    """What the stage began with; empty where it needs nothing."""
    path = folder / "stage.safetensors"
    return load_file(path, device=str(device)) if path.exists() else {}


def restore_masters(folder: Path, model: nn.Module) -> None:
    """Put fp32 masters, where they were saved, in place of the rounded weights."""
    path = folder / "masters.safetensors"
    if not path.exists():
        return
    masters = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in masters:
                parameter.copy_(masters[name])


def restore_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """Through the optimizer's own `load_state_dict`, which alone knows where each tensor must lie: on CUDA, fused AdamW
    reads `step` on the device, unchecked.
    """
    saved: dict[str, dict[str, dict[str, Tensor]]] = {}
    for label, tensor in load_file(folder / "optimizer.safetensors").items():
        place, _, name = label.partition(".")
        key, _, part = place.partition(_IN)
        saved.setdefault(name, {}).setdefault(key, {})[part] = tensor
    names = [name for group in optimizer.param_groups for name in group["names"]]
    state = {
        number: {key: lowbit.whole(plain) for key, plain in saved[name].items()}
        for number, name in enumerate(names)
        if name in saved
    }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def restore_random(folder: Path) -> None:
    random = load_file(folder / "random.safetensors")
    torch.set_rng_state(random["cpu"])
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if f"cuda.{index}" in random:
                torch.cuda.set_rng_state(random[f"cuda.{index}"], index)


def _named_states(optimizer: torch.optim.Optimizer):
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if parameter in optimizer.state:
                yield name, optimizer.state[parameter]
