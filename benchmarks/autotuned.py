"""Compile what flash-linear-attention's autotuner tries for the operator benchmark, many kernels at a time.

    python benchmarks/autotuned.py

It tries some 170 kernels one after the other, which takes minutes; `measure.py operator` then finds them in Triton's
cache. Each of several processes compiles every n-th configuration of each kernel.
"""

import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "kernels")]
PROCESSES = min(12, os.cpu_count() or 1)


def work(number: int) -> None:
    from triton.runtime.autotuner import Autotuner

    built = Autotuner.__init__

    def part(self, fn, arg_names, configs, *args, **kwargs) -> None:
        built(self, fn, arg_names, configs[number::PROCESSES] or configs[:1], *args, **kwargs)

    Autotuner.__init__ = part
    import torch
    from fla.ops.retention import chunk_retention

    from supra_cli.core.bench import DTYPES, OPERATORS

    batch, heads, width = OPERATORS["cuda"]
    shape = (3, batch, 2048, heads, width)
    q, k, v = torch.randn(shape, device="cuda", dtype=DTYPES["cuda"]).requires_grad_().unbind()
    chunk_retention(q, k, v, scale=width**-0.5)[0].sum().backward()
    with torch.no_grad():
        chunk_retention(q, k, v, scale=width**-0.5)


def main() -> int:
    parts = [subprocess.Popen([sys.executable, __file__, str(number)]) for number in range(PROCESSES)]
    return max(part.wait() for part in parts)


if __name__ == "__main__":
    sys.exit(work(int(sys.argv[1])) if sys.argv[1:] else main())
