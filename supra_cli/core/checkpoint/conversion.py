"""From a pretrained model's directory to a converted one, one layer's mixer in memory at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from supra_cli.core.checkpoint.describing import skeleton
from supra_cli.core.checkpoint.files import atomic_directory, known_sha256
from supra_cli.core.checkpoint.randomness import OwnNumbers
from supra_cli.core.checkpoint.reading import examine, has_tokenizer, load, tensors
from supra_cli.core.checkpoint.record import digest
from supra_cli.core.checkpoint.slices import MOST_THREADS, THREADS, write_shards
from supra_cli.core.checkpoint.writing import finish, link_shards
from supra_cli.core.errors import UsageError
from supra_cli.core.mixers import Mixer
from supra_cli.core.modeling import SupraConfig, SupraForCausalLM

log = logging.getLogger(__name__)

MIXER_SHARD_BYTES = 256 * 2**20
"""Of a file of new parameters: the disk is at work on one while the next is drawn."""
AHEAD = 2
"""Layers more than are drawn at a time: the one that is written, and one that is ready when it is."""


def convert(
    source: Path | str,
    output: Path | str,
    *,
    mixer: str,
    options: Mapping[str, Any],
    keep: str,
    seed: int,
    recipe: Any = None,
    base: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write `source` with `mixer` in every layer that `keep` does not keep; returns `output`.

    The base's shards are linked or copied, byte for byte. New parameters are drawn from `seed` and the layer's number,
    so a layer's do not depend on which others are swapped, and have the base's dtype. All files are recorded by size
    and header: what asks for the hash of a whole one has it read once. `base` is what to call the source in supra.json.
    """
    source, output = Path(source), Path(output)
    if source.resolve().is_relative_to(output.resolve()):
        raise UsageError(f"{output} is, or holds, the model to convert, which would be lost; choose another output")
    config = planned(source, mixer=mixer, options=options, keep=keep)
    new = {f"{name}.mixer": layer.mixer for name, layer in skeleton(config).swapped_layers()}
    described = {f"{name}.{key}": value for name, layer in new.items() for key, value in layer.named_parameters()}
    with atomic_directory(output, overwrite=overwrite) as directory:
        entries = {name: entry.file for name, entry in tensors(source).items()}
        placed, known = link_shards(source, directory, entries, known_sha256)
        # checkpoint.identity(source), where that is known without reading all of the base
        parent = digest({file: known[placed[name]].get("sha256") for name, file in entries.items()})
        drawn, hashes = write_shards(
            described, directory, "model-mixers", values=drawn_values(new, seed), limit=MIXER_SHARD_BYTES, hashed=False
        )
        placed, known = placed | drawn, known | hashes
        provenance = {
            "base": base or str(source.resolve()),
            "parent": parent,
            "recipe": recipe,
            "seed": seed,
            "tokens": 0,
        }
        finish(directory, config, placed, known, source=source, provenance=provenance)
    if not has_tokenizer(source):
        log.warning(
            "%s has no tokenizer, without which %s cannot be trained, scored or asked for text; copy the tokenizer's "
            "files there",
            source,
            output,
        )
    return output


def converted(
    source: Path | str,
    *,
    mixer: str,
    options: Mapping[str, Any],
    keep: str,
    seed: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> SupraForCausalLM:
    """The model that `convert` would write, in memory and in evaluation mode; dtype None is the base's."""
    config = planned(Path(source), mixer=mixer, options=options, keep=keep)
    base = load(source, dtype=dtype)
    model = skeleton(config, base.dtype)
    # Drawn in the base's own format, as they would be written, and rounded to another one after that.
    new = {f"{name}.mixer": layer.mixer for name, layer in skeleton(config).swapped_layers()}
    drawn = {name: value.to(base.dtype, copy=True) for name, value in drawn_values(new, seed)}
    model.load_state_dict({**base.state_dict(), **drawn}, assign=True)
    model.tie_weights()
    for name, part in base.named_modules():  # in no state: rotary tables
        for buffer in part._non_persistent_buffers_set:
            model.get_submodule(name)._buffers[buffer] = part._buffers[buffer]
    return model.to(device).eval()


def conversion_bytes(layers: int, numbers: int, written: int) -> int:
    """What drawing `numbers` new parameters of `layers`, in files of `written` bytes, takes in memory at most: a layer
    for each thread that draws and two for the one that writes, in fp32 and, rounded, in the files' format.
    """
    drawn = 4 * numbers
    layer = (drawn if written == drawn else drawn + written) // max(1, layers)
    return layer * min(layers, MOST_THREADS + AHEAD)


def planned(source: Path, *, mixer: str, options: Mapping[str, Any], keep: str) -> SupraConfig:
    """The config that converting `source` would give it; what stands in the way is a SupraError."""
    config = examine(source)
    if config.swap.any:
        raise UsageError(f"{source} is converted already, to mixer '{config.swap.mixer}'; convert its base instead")
    return config.with_mixer(mixer, options, keep)


def drawn_values(new: Mapping[str, Mixer], seed: int) -> Iterator[tuple[str, Tensor]]:
    """(name, value) of every new parameter; `new` maps the names of mixers to mixers on the meta device, whose formats
    the values have.

    Layers are drawn in threads, each from random numbers of its own, so the values do not depend on how many there are.
    A value is good until the next layer's are asked for: its memory is drawn into again, as fresh pages would cost as
    much as drawing.
    """
    layers = list(new.items())
    memories = [Memory() for _ in range(THREADS + AHEAD)]
    with ThreadPoolExecutor(THREADS) as beside:
        drawing = [
            beside.submit(_draw, mixer, seed, memory) for (_, mixer), memory in zip(layers, memories, strict=False)
        ]
        for turn, (name, _) in enumerate(layers):
            for key, value in drawing[turn].result().items():
                yield f"{name}.{key}", value
            if (later := turn + len(memories)) < len(layers):
                drawing.append(beside.submit(_draw, layers[later][1], seed, memories[turn % len(memories)]))


class Memory(dict[tuple[str, torch.Size, torch.dtype], Tensor]):
    """Tensors by name, shape and format, made when they are first asked for, in which layers are drawn in turn."""

    def __missing__(self, key: tuple[str, torch.Size, torch.dtype]) -> Tensor:
        _, shape, dtype = key
        return self.setdefault(key, torch.empty(shape, dtype=dtype))


@torch.no_grad()
def _draw(layer: Mixer, seed: int, memory: Memory) -> dict[str, Tensor]:
    """The parameters of `layer`, which is on the meta device: drawn in fp32 from `seed` and its number, and rounded to
    its format.
    """
    # Made on meta: PyTorch's layers draw themselves when they are made, which would be half of the time.
    with torch.device("meta"):
        mixer = type(layer)(layer.spec, layer.options)
    state = {key: memory[key, tensor.shape, tensor.dtype] for key, tensor in mixer.state_dict().items()}
    mixer.load_state_dict(state, assign=True)
    for parameter in mixer.parameters():
        parameter.data.view(-1)[:1] = torch.nan  # which tells whether it was drawn, at no cost
    own = torch.Generator().manual_seed((seed << 16) + layer.spec.layer)
    with OwnNumbers(own):
        mixer.reset_parameters()
        if any(parameter.view(-1)[:1].isnan().any() for parameter in mixer.parameters()):
            mixer = type(layer)(layer.spec, layer.options)  # a value that only making the mixer sets
            own.manual_seed((seed << 16) + layer.spec.layer)
            mixer.reset_parameters()
    kinds = {key: parameter.dtype for key, parameter in layer.named_parameters()}
    drawn = {key: parameter.detach() for key, parameter in mixer.named_parameters()}
    return {
        key: value if value.dtype == kinds[key] else memory[key, value.shape, kinds[key]].copy_(value)
        for key, value in drawn.items()
    }
