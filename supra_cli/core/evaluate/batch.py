"""Rows a forward pass by a budget of tokens: `--batch-size auto`.

lm-eval's own tries 64 rows of the whole context and shrinks when memory has run out, which a process on a CPU does not
live to see, and gives another number each time. This one is a formula, so that a score can be had again.
"""

from __future__ import annotations

import math
from pathlib import Path

from supra_cli.core import checkpoint
from supra_cli.core import device as devices

_MOST = 64
_SHARE = 4  # a quarter of the memory that the weights leave


def rows_that_fit(path: Path, max_length: int, device: str, dtype: str) -> int:
    """Rows a forward pass for the model at `path`, at least 1: the largest power of two up to 64 with
    rows × max_length × bytes a token ≤ (memory − weights) / 4.

    bytes a token = 4 (3 V + 16 d + 4 f): logits of V words, their copy in fp32 and its log-softmax live at once; beside
    them of one layer at a time some 16 vectors of width d and 4 of the inner width f. Memory is all that the device (or
    this process's control group) has, not what is free now, so that model, context and machine give the same number
    each time; it is halved only while it would not fit into what is free.
    """
    config = checkpoint.read_config(path)
    vocabulary, width = config.vocab_size, config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * width
    row = 4 * (3 * vocabulary + 16 * width + 4 * inner) * max_length
    numbers = sum(math.prod(entry.shape) for entry in checkpoint.tensors(path).values())
    weights = (4 if dtype == "float32" else 2) * numbers
    whole, free = _memory(device)
    if whole is None:
        return 1
    count = min(_MOST, max(1, (whole - weights) // _SHARE // row))
    count = 1 << (int(count).bit_length() - 1)
    while count > 1 and free is not None and count * row > free - weights:
        count //= 2
    return count


def _memory(device: str) -> tuple[int | None, int | None]:
    """(all, free now) in bytes, None where the system does not tell."""
    import torch

    if device.startswith("cuda"):
        free, whole = torch.cuda.mem_get_info(device)
        return whole, free
    if device.startswith("mps"):
        whole = torch.mps.recommended_max_memory()
        return whole, whole - torch.mps.driver_allocated_memory()
    whole, free = devices.memory_bytes(), _number("/proc/meminfo", "MemAvailable:")
    limit, used = (_number(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if whole is not None and limit is not None and limit < whole:
        whole, left = limit, limit - (used or 0)
        free = left if free is None else min(free, left)
    return whole, free


def _number(path: str, line: str = "") -> int | None:
    """The number, in bytes, of the file at `path` or of its line that begins with `line`; None where there is none."""
    try:
        words = next(text for text in Path(path).read_text().splitlines() if text.startswith(line)).split()
        return int(words[-2]) * 1024 if line else int(words[0])
    except (OSError, StopIteration, ValueError, IndexError):  # `max` is no number
        return None
