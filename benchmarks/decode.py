"""What does one more token cost, early and late in a text, and does memory stay?

    python benchmarks/decode.py [--device cpu|cuda] [--json] [--output FILE] [--rounds 200] [--positions 100 16000]

On a CPU: the bundled model's shape, fp32, one thread, CPU time, with mixer `supra` and as the softmax base; weights are
drawn, since time does not depend on them. A round times one token at each position, so that all see the same machine.
On a GPU: one decode step of the operator, H32 K = V = 128, fp32 state, in a CUDA graph, batch 1 to 256; the rate counts
the state once read and once written, beside the bandwidth of a 1 GiB copy.
"""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.dirname(os.path.abspath(__file__)) in sys.path:
    sys.path.remove(os.path.dirname(os.path.abspath(__file__)))  # operator.py there would hide the standard library's
sys.path[:0] = [ROOT, os.path.join(ROOT, "kernels")]

import argparse  # noqa: E402
import statistics  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402

from benchmarks.measure import cpu_ms, cuda_ms, environment, interleave, report  # noqa: E402

HEADS, WIDTH, COPY_BYTES = 32, 128, 1 << 30
BATCHES = (1, 4, 16, 64, 256)
KINDS = ("supra", "softmax")


class Text:
    """A model that has read `position` random tokens and can be asked for the next."""

    def __init__(self, model: torch.nn.Module, position: int):
        self.model, self.cache = model, None
        ids = torch.randint(0, model.config.vocab_size, (1, position), generator=torch.Generator().manual_seed(0))
        for piece in ids.split(2048, dim=1):
            self._read(piece)
        self.token = ids[:, -1:]

    def _read(self, ids: torch.Tensor) -> None:
        with torch.inference_mode():
            out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values

    def next(self) -> None:
        self._read(self.token)


def bundled_model(kind: str) -> torch.nn.Module:
    from supra_cli.core.hub import base_config, resolve
    from supra_cli.core.modeling import SupraConfig, SupraForCausalLM

    torch.manual_seed(0)
    return SupraForCausalLM._from_config(SupraConfig.from_base(base_config(resolve("tiny")), mixer=kind)).eval()


def resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def growth(text: Text, tokens: int) -> int | None:
    """Bytes of resident memory that so many more tokens add, after as many again to settle; None without /proc."""
    if not Path("/proc/self/status").exists():
        return None
    for _ in range(tokens):
        text.next()
    before = resident_bytes()
    for _ in range(tokens):
        text.next()
    return resident_bytes() - before


def on_cpu(positions: list[int], rounds: int) -> tuple[list[dict], list[dict]]:
    torch.set_num_threads(1)
    texts = {(kind, at): Text(bundled_model(kind), at) for kind in KINDS for at in positions}
    runs: dict[str, Callable] = {f"{kind} {at}": text.next for (kind, at), text in texts.items()}
    times = interleave(runs, rounds, cpu_ms)
    rows = []
    for kind in KINDS:
        for at in positions:
            added = growth(texts[kind, at], 200)
            median = statistics.median(times[f"{kind} {at}"])
            rows.append({"model": kind, "position": at, "ms_per_token": median, "resident_growth_bytes": added})
    early, late = (statistics.median(times[f"supra {at}"]) for at in (positions[0], positions[-1]))
    grown = max((row["resident_growth_bytes"] or 0) for row in rows if row["model"] == "supra")
    listed = [
        {"what": f"ms/token at {positions[-1]} over {positions[0]}", "target": 1.1, "measured": late / early},
        {"what": "resident bytes that 200 tokens add", "target": 1 << 20, "measured": grown},
    ]
    return rows, [{**x, "bound": "at most", "met": x["measured"] <= x["target"]} for x in listed]


def on_gpu(rounds: int) -> tuple[list[dict], list[dict]]:
    from supra_kernels import linear_attention

    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    rows = []
    for batch in BATCHES:
        q, k, v = (torch.randn(batch, 1, HEADS, WIDTH, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        state, g = torch.zeros(batch, HEADS, WIDTH, WIDTH, device="cuda"), torch.full((HEADS,), -0.1, device="cuda")

        def step(q=q, k=k, v=v, g=g, state=state):
            with torch.inference_mode():
                return linear_attention(q, k, v, g, state=state)

        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(32):  # as many layers
                step()
        times = interleave({"step": graph.replay, "copy": source.clone}, rounds, cuda_ms)
        step_ms = statistics.median(times["step"]) / 32
        rate = 2 * state.numel() * 4 / step_ms / 1e6
        copy_rate = 2 * COPY_BYTES / statistics.median(times["copy"]) / 1e6
        row = {"batch": batch, "step_us": step_ms * 1e3, "gb_per_s": rate, "copy_gb_per_s": copy_rate}
        rows.append({**row, "share_of_copy_rate": rate / copy_rate})
    least = min(row["share_of_copy_rate"] for row in rows if row["batch"] >= 64)  # smaller states stay in the L2 cache
    what = "share of the copy bandwidth from batch 64"
    return rows, [{"what": what, "bound": "at least", "target": 0.7, "measured": least, "met": least >= 0.7}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    parser.add_argument("--rounds", type=int, default=200, help="interleaved rounds")
    parser.add_argument("--positions", type=int, nargs="+", default=[100, 16000], help="tokens before the timed one")
    options = parser.parse_args()
    cpu = options.device == "cpu"
    rows, targets = on_cpu(options.positions, options.rounds) if cpu else on_gpu(options.rounds)
    result = {
        "benchmark": "decode",
        "command": " ".join(["python benchmarks/decode.py", *sys.argv[1:]]),
        **environment(options.device),
        "clock": "CPU time of one thread" if cpu else "CUDA events",
        "rounds": options.rounds,
        "rows": rows,
        "targets": targets,
    }
    report(result, options.output, options.json)


if __name__ == "__main__":
    main()
