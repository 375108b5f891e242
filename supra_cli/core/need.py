"""`keep = auto:N`: the layers of a student that need softmax attention most get it back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from supra_cli.core import checkpoint
from supra_cli.core import device as devices
from supra_cli.core.data import rows
from supra_cli.core.data.packing import Batch
from supra_cli.core.errors import NonFiniteError, UsageError
from supra_cli.core.layout import Layout
from supra_cli.core.modeling import SupraConfig, SupraForCausalLM
from supra_cli.core.recipe import Data
from supra_cli.core.recipe.keep import SOFTMAX, automatic
from supra_cli.core.stages import chunked
from supra_cli.core.stages.chunked import Head
from supra_cli.core.stages.transfer import answering, softmax_answer
from supra_cli.core.swap import SwappedAttention

ROW, ROWS, BATCHES = 512, 4, 8
"""Tokens in a row, rows in a pass, passes: the text by which layers are ranked."""


def rank(path: Path, text: str, device: str) -> dict[int, float]:
    """`divergences` of the student in a directory, on rows of a source of text; a GPU computes them in bf16."""
    device = devices.resolve(device)
    student = checkpoint.load(path, device=device, dtype=devices.dtype("auto", device))
    tokens = min(ROW, student.config.max_position_embeddings)
    mixture = rows.training(Data(seq_len=tokens, sources=[{"path": text}]), checkpoint.load_tokenizer(path), seed=0)
    return divergences(student, [mixture.batch(ROWS, tokens) for _ in range(BATCHES)])


@torch.no_grad()
def divergences(student: SupraForCausalLM, batches: Sequence[Batch]) -> dict[int, float]:
    """Layer ℓ → KL(p ‖ p_ℓ) in nats per scored token, of every layer that has a mixer.

    p is the model with softmax attention in all these layers, p_ℓ with the mixer in ℓ alone. It is what a layer lacks
    once attention transfer is over, which trains each layer by itself and leaves all but mixers as it was.
    NonFiniteError for one that is no number.
    """
    layers = {layer.mixer.spec.layer: layer for _, layer in student.swapped_layers()}
    sums = dict.fromkeys(layers, 0.0)

    def run(batch: Batch, mixed: int | None, objective: Callable[[Tensor, Head], Tensor]) -> Tensor:
        with answering([layer for number, layer in layers.items() if number != mixed], _softmax):
            inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
            return student(**inputs, use_cache=False, objective=objective)

    for batch in (batch.to(student.device) for batch in batches):
        base = run(batch, None, lambda hidden, head: hidden)

        def divergence(hidden: Tensor, head: Head, base=base, labels=batch.labels) -> Tensor:
            return chunked.divergence(hidden, head, base, head, labels, student.config.vocab_size)[0]

        for number in layers:
            sums[number] += float(run(batch, number, divergence))
    for number, total in sums.items():
        if not math.isfinite(total):
            raise NonFiniteError.of(f"the divergence of layer {number} is")
    tokens = sum(batch.targets for batch in batches)
    return {number: total / tokens for number, total in sums.items()}


def _softmax(layer: SwappedAttention, hidden_states: Tensor, *, layout: Layout | None, **call: Any) -> Tensor:
    return softmax_answer(layer, *layer.inputs(hidden_states, **call), None, layout)[1]


def check(config: SupraConfig, keep: str) -> None:
    """UsageError unless the student that `config` describes has as many layers with a mixer as `keep`, auto:N, takes,
    and none that is softmax already.
    """
    kinds = config.swap.layers
    if SOFTMAX in kinds:
        raise UsageError(f"keep is '{keep}' and the student has softmax layers already; give one with a mixer in each")
    if automatic(keep) > len(kinds):
        raise UsageError(f"keep is '{keep}' and the student has {len(kinds)} layers; N is at most that")


def most_needed(losses: Mapping[int, float], keep: str) -> list[int]:
    """The layers that `keep`, auto:N, takes by their `divergences`."""
    return sorted(sorted(losses, key=losses.get, reverse=True)[: automatic(keep)])


def restore(source: Path, output: Path, student: SupraForCausalLM, layers: list[int], *, overwrite: bool) -> Path:
    """Write `student`, loaded from `source`, with softmax attention again in these `layers`; the rest is linked."""
    config, swap = student.config, student.config.swap
    kinds = [SOFTMAX if number in layers else kind for number, kind in enumerate(swap.layers)]
    config = config.from_base(config, mixer=swap.mixer, options=swap.options, layers=kinds)
    with torch.device("meta"):
        restored = SupraForCausalLM._from_config(config, dtype=student.dtype)
    wanted = restored.state_dict().keys()
    restored.load_state_dict({name: x for name, x in student.state_dict().items() if name in wanted}, assign=True)
    known = checkpoint.read_provenance(source)
    provenance = {key: known.get(key) for key in ("base", "recipe", "seed", "tokens", "tokens_before")}
    given = {"source": source, "provenance": provenance, "unchanged": source, "dtype": config.dtype}
    return checkpoint.save(restored, output, overwrite=overwrite, **given)
