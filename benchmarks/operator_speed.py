"""How fast is the linear attention operator, beside softmax attention and the hardware's own rates?

    python benchmarks/operator_speed.py [--device cpu|cuda] [--json] [--output FILE] [--rounds 7] [--lengths 2048 8192]

As `supra bench operator`, on a machine that has only torch, triton and transformers; see supra_cli/core/bench.
"""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "kernels")]

from benchmarks.measure import options, report  # noqa: E402
from supra_cli.core.bench import operator  # noqa: E402


def main() -> None:
    parser = options(__doc__, rounds=7)
    parser.add_argument("--lengths", type=int, nargs="+", default=operator.LENGTHS, help="tokens")
    given = parser.parse_args()
    found = operator.measure(given.device, rounds=given.rounds, lengths=given.lengths)
    command = " ".join(["python benchmarks/operator_speed.py", *sys.argv[1:]])
    report({"command": command, **found}, given.output, given.json)


if __name__ == "__main__":
    main()
