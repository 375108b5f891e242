"""How fast does a model train with each mixer, beside its softmax base?

    python benchmarks/train.py [--device cpu|cuda] [--model tiny] [--json] [--output FILE] [--shapes 8x512 1x4096]

As `supra bench train`, on a machine that has only torch, triton and transformers; see supra_cli/core/bench.
"""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "kernels")]

from benchmarks.measure import options, report  # noqa: E402
from supra_cli.core.bench import train  # noqa: E402


def main() -> None:
    parser = options(__doc__, rounds=5)
    parser.add_argument("--model", default="tiny", help="directory, alias or hub id; weights are drawn")
    parser.add_argument("--shapes", nargs="+", default=["8x512", "1x4096"], help="batch x tokens")
    given = parser.parse_args()
    shapes = [tuple(map(int, shape.split("x"))) for shape in given.shapes]
    found = train.measure(given.device, model=given.model, rounds=given.rounds, shapes=shapes)
    command = " ".join(["python benchmarks/train.py", *sys.argv[1:]])
    report({"command": command, **found}, given.output, given.json)


if __name__ == "__main__":
    main()
