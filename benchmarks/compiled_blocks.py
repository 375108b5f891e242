"""Would torch.compile make the chunked CPU form faster? Its blocks as pure functions, compiled, beside those that run.

    python benchmarks/compiled_blocks.py [--json] [--output FILE] [--rounds 7]

One thread, CPU time of forward and backward, both in every round, and the same gradients asked of both. The blocks are
written anew here because those that run write to buffers of `Scratch`, which torch.compile cannot trace.
"""

import os
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "kernels")]
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # or compiling would take no time the second time

import torch  # noqa: E402
from supra_kernels import chunk, linear_attention, weights  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.measure import options, report  # noqa: E402
from supra_cli.core.bench.timing import keep_freed_memory, measured, median_ratio, medians, result  # noqa: E402

SHAPES = ((1, 2048, 4, 64), (1, 8192, 4, 64), (8, 512, 4, 32), (4, 512, 8, 128))
"""B, T, H, K = V."""


def forward_block(q: Tensor, k: Tensor, v: Tensor, w: weights.Weights, start: Tensor) -> tuple[Tensor, Tensor]:
    """As chunk._forward_block, for as many kv heads as heads."""
    S, _ = _states(k, v, w, start)
    o = (q @ k.mT * w.within) @ v + (q * w.from_start.unsqueeze(-1)) @ S[:-1]
    return o, S[-1]


def backward_block(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, w: weights.Weights, start: Tensor, d_end: Tensor
) -> tuple[Tensor, ...]:
    """As chunk._backward_block, for as many kv heads as heads and without the gradient of decays."""
    S, weighted = _states(k, v, w, start)
    P, D = q @ k.mT * w.within, do @ v.mT * w.within
    do_start = do * w.from_start.unsqueeze(-1)
    dS = torch.stack(_walk(q.mT @ do_start, w, d_end, reverse=True))
    dq = D @ k + do_start @ S[:-1].mT
    dk = D.mT @ q + v @ dS[1:].mT * w.to_end.unsqueeze(-1)
    return dq, dk, P.mT @ do + weighted @ dS[1:], dS[0]


def _states(k: Tensor, v: Tensor, w: weights.Weights, start: Tensor) -> tuple[Tensor, Tensor]:
    weighted = k * w.to_end.unsqueeze(-1)
    return torch.stack(_walk(weighted.mT @ v, w, start, reverse=False)), weighted


def _walk(added: Tensor, w: weights.Weights, first: Tensor, reverse: bool) -> list[Tensor]:
    """`first` and what every chunk makes of it, in the order of the chunks."""
    through = w.through[..., None, None].expand(len(added), -1, -1, -1, -1)
    met = [first]
    for n in reversed(range(len(added))) if reverse else range(len(added)):
        met.append(added[n] + met[-1] * through[n])
    return met[::-1] if reverse else met


def contenders() -> dict[str, dict]:
    plain = {
        (chunk, "_forward_block"): chunk._forward_block,
        (chunk, "_backward_block"): chunk._backward_block,
        (weights, "_token_weights"): weights._token_weights,
    }
    forward, backward, of_tokens = (
        torch.compile(function, dynamic=False) for function in (forward_block, backward_block, weights._token_weights)
    )

    def gradients(q, k, v, do, w, start, d_end, decays, scratch):
        dq, dk, dv, dS = backward(q, k, v, do, w, start, d_end)
        return chunk._Gradients(dq, dk, dv, None, dS)

    compiled = (lambda q, k, v, w, start, scratch: forward(q, k, v, w, start), gradients, of_tokens)
    return {"plain": plain, "compiled": dict(zip(plain, compiled, strict=True))}


def row(shape: tuple[int, ...], decay: str, rounds: int) -> dict:
    batch, tokens, heads, width = shape
    rng = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(batch, tokens, heads, width, generator=rng) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    g = -torch.rand(heads if decay == "fixed" else (batch, tokens, heads), generator=rng)

    def by(functions: dict):
        def both() -> tuple[Tensor, ...]:
            for (module, name), function in functions.items():
                setattr(module, name, function)
            return torch.autograd.grad(linear_attention(q, k, v, g)[0], leaves, do)

        return both

    torch.compiler.reset()
    runs = {name: by(functions) for name, functions in contenders().items()}
    began = time.perf_counter()
    found = runs["compiled"]()
    compiling = time.perf_counter() - began
    for x, y in zip(found, runs["plain"](), strict=True):
        torch.testing.assert_close(x, y, atol=1e-3, rtol=1e-4)
    times = measured(runs, rounds, "cpu")
    runs["plain"]()
    return {
        "batch": batch,
        "tokens": tokens,
        "heads": heads,
        "width": width,
        "decay": decay,
        **{f"{name}_ms": value for name, value in medians(times).items()},
        "times_faster": median_ratio(times["plain"], times["compiled"]),
        "compiling_wall_s": compiling,
    }


def main() -> None:
    given = options(__doc__, rounds=7).parse_args()
    torch.set_num_threads(1)
    kept = keep_freed_memory()
    rows = [row(shape, decay, given.rounds) for shape in SHAPES for decay in ("fixed", "token")]
    found = result("compiled-blocks", "cpu", given.rounds, freed_memory_kept=kept, rows=rows, targets=[])
    command = " ".join(["python benchmarks/compiled_blocks.py", *sys.argv[1:]])
    report({"command": command, **found}, given.output, given.json)


if __name__ == "__main__":
    main()
