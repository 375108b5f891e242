"""Does the memory of attention transfer grow with the number of layers?

    python benchmarks/transfer_memory.py [--output benchmarks/results/transfer-memory-cpu.json] [--json]

One micro-batch of the transfer stage on randomly drawn models of Llama's shape, on the CPU. Peak is the most bytes that
live tensors hold beyond the weights and the gradients of all mixers, as supra_cli.core.accounting's meter counts real
storages: what does not belong to parameters. `backward by layer` is what a run does; `one backward` keeps the graphs of
all layers until their sum goes backward, as transfer did before.
"""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "kernels")]

import argparse  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from transformers import LlamaConfig  # noqa: E402

from benchmarks.measure import report  # noqa: E402
from supra_cli.core import recipe as recipes  # noqa: E402
from supra_cli.core.accounting.meter import Meter  # noqa: E402
from supra_cli.core.data.packing import Batch  # noqa: E402
from supra_cli.core.environment import environment  # noqa: E402
from supra_cli.core.modeling import SupraConfig, SupraForCausalLM  # noqa: E402
from supra_cli.core.train.prepare import prepare, stage_of  # noqa: E402
from supra_cli.core.train.step import begin  # noqa: E402

LAYERS = (2, 8, 32)
MIXERS = ("supra", "t2r", "gated")
ROWS, TOKENS = 4, 512
SHAPE = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "vocab_size": 512,
}
GROWTH = 1.02
"""At most, from the fewest to the most layers."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        {
            "mixer": mixer,
            "layers": layers,
            "by_layer_mib": peak(mixer, layers, by_layer=True) / 2**20,
            "one_backward_mib": peak(mixer, layers, by_layer=False) / 2**20,
        }
        for mixer in MIXERS
        for layers in LAYERS
    ]
    result = {
        "benchmark": "transfer_memory",
        "command": " ".join(["python benchmarks/transfer_memory.py", *sys.argv[1:]]),
        "environment": environment("cpu"),
        "shape": SHAPE,
        "batch": [ROWS, TOKENS],
        "rows": rows,
        "targets": [growth(mixer, rows) for mixer in MIXERS],
    }
    report(result, given.output, given.json)


def growth(mixer: str, rows: list[dict]) -> dict:
    fewest, *_, most = [row["by_layer_mib"] for row in rows if row["mixer"] == mixer]
    what = f"peak of {LAYERS[-1]} layers over that of {LAYERS[0]}: {mixer}"
    measured = most / fewest
    return {"what": what, "bound": "at most", "target": GROWTH, "measured": measured, "met": measured <= GROWTH}


def peak(mixer: str, layers: int, by_layer: bool) -> int:
    """Bytes beyond weights and gradients."""
    base = SupraConfig.from_base(LlamaConfig(**SHAPE, num_hidden_layers=layers))
    student = SupraForCausalLM._from_config(base.with_mixer(mixer), dtype=torch.float32).train()
    spec = recipes.Stage(kind="transfer", tokens=1)
    stage = stage_of(spec)
    trained = [parameter for _, parameter in prepare(student, stage, spec)]
    ids = torch.randint(SHAPE["vocab_size"], (ROWS, TOKENS))
    batch = Batch(ids, torch.arange(TOKENS).expand(ROWS, TOKENS), ids)
    begin(stage, student, [batch], torch.device("cpu"), torch.float32)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)

    def backward(part: torch.Tensor) -> torch.Tensor:
        part.backward(torch.ones_like(part))
        return part.detach()

    with Meter(student, *(parameter.grad for parameter in trained)) as meter:
        loss = stage.loss(student, None, batch, backward if by_layer else lambda part: part)
        if not by_layer:
            loss.sum.backward()
    return max(lap.peak for lap in meter.laps)


if __name__ == "__main__":
    main()
