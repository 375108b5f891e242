"""What does one more token cost, early and late in a text, and does memory stay?

    python benchmarks/decode.py [--device cpu|cuda] [--what step|model] [--compile] [--json] [--output FILE]

As `supra bench decode`, on a machine that has only torch, triton and transformers; see supra_cli/core/bench. On a GPU
`--what step` is the operator's step alone, `--what model` a whole model in a CUDA graph, by default mistral-7b.
"""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "kernels")]

from benchmarks.measure import options, report  # noqa: E402
from supra_cli.core.bench import decode  # noqa: E402


def main() -> None:
    parser = options(__doc__, rounds=None)
    parser.add_argument("--what", choices=("step", "model"), default="model", help="on a GPU: what is timed")
    parser.add_argument("--model", help="directory, alias or hub id; weights are drawn")
    parser.add_argument("--positions", type=int, nargs="+", help="on a CPU: tokens before the timed one")
    parser.add_argument("--compile", action="store_true", help="on a CPU: the compiled step as well")
    parser.add_argument("--context", type=int, help="on a GPU: tokens before the timed one")
    parser.add_argument("--batch", type=int, help="on a GPU: texts at once")
    given = parser.parse_args()
    if given.compile and given.device == "cuda":
        parser.error("--compile is for --device cpu")
    names = ("rounds",) if given.what == "step" else ("rounds", "model", "context", "batch")
    if given.device == "cpu":
        names = ("rounds", "model", "positions", "compile")
    chosen = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    if given.device == "cpu":
        found = decode.measure("cpu", **chosen)
    else:
        found = (decode.measure_step if given.what == "step" else decode.measure_graphed)(**chosen)
    command = " ".join(["python benchmarks/decode.py", *sys.argv[1:]])
    report({"command": command, **found}, given.output, given.json)


if __name__ == "__main__":
    main()
