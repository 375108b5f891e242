"""What one more token costs: early and late in a text, beside the softmax base, and as one step of the operator."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch._dynamo.config
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from supra_cli.core.bench.models import configs, draw
from supra_cli.core.bench.roofline import Rates, counted_flops, rate_runs, rates
from supra_cli.core.bench.timing import Run, measured, median_ratio, medians, result, target
from supra_cli.core.cache import RecurrentLayer
from supra_cli.core.generate.steps import compiled, decode, prefill
from supra_cli.core.modeling import SupraConfig
from supra_cli.core.ops import linear_attention
from supra_cli.core.recipe.keep import SOFTMAX

KINDS = (SOFTMAX, "supra")
POSITIONS = (100, 16000)
BATCHES = (1, 4, 16, 64, 256)
HEADS, WIDTH = 32, 128


def measure(
    device: str,
    *,
    model: str = "tiny",
    rounds: int = 200,
    positions: Sequence[int] = POSITIONS,
    compile: bool = False,
) -> dict:
    """Milliseconds per token of batch 1 after so many tokens, fp32, one thread, CPU time; a round times one token at
    each position, with `compile` also of the compiled step. The roofline counts the weights and the cache as read once,
    a recurrent state also as written.
    """
    if device == "cuda":
        raise ValueError("on a GPU measure_graphed or measure_step is meant")
    torch.set_num_threads(1)
    networks = {kind: draw(config, device, torch.float32).eval() for kind, config in configs(model, KINDS).items()}
    texts = {(kind, at): Text(network, at) for kind, network in networks.items() for at in positions}
    if compile:
        texts |= {
            (f"{kind}, compiled", at): Text(network, at, compile=True)
            for kind, network in networks.items()
            for at in positions
        }
    runs = {f"{kind} {at}": text.next for (kind, at), text in texts.items()} | rate_runs(device, torch.float32)
    # Beyond some number of graphs torch.compile would go on without compiling, and the row would not say so.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        times = measured(runs, rounds, device)
    median = medians(times)
    machine = rates(median, device)
    rows = []
    for (kind, at), text in texts.items():
        row = {"model": kind, "position": at, "ms_per_token": median[f"{kind} {at}"]}
        row |= _beside_roofline(machine, text.model, text.cache, text.next, row["ms_per_token"])
        rows.append({**row, "resident_growth_bytes": _growth(text, 200)})
    swapped = next(kind for kind, _ in texts if kind != SOFTMAX)
    early, late = (median[f"{swapped} {at}"] for at in (positions[0], positions[-1]))
    grown = max((row["resident_growth_bytes"] or 0) for row in rows if row["model"] == swapped)
    listed = [
        target(f"ms/token at {positions[-1]} over {positions[0]}", "at most", 1.1, late / early),
        target("resident bytes that 200 tokens add", "at most", 1 << 20, grown),
    ]
    return result("decode", device, rounds, model=model, rows=rows, targets=listed)


class Text:
    """A model that has read `position` random tokens and can be asked for the next, by a compiled step if asked."""

    def __init__(self, model: nn.Module, position: int, *, compile: bool = False):
        self.model = model
        ids = torch.randint(0, model.config.vocab_size, (1, position), generator=torch.Generator().manual_seed(0))
        _, self.cache = prefill(model, ids, None)
        self.token, self.position = ids[:, -1], torch.tensor([position])
        self.step = compiled(model, self.token, self.position, None, self.cache) if compile else decode

    def next(self) -> None:
        """The token and its position stay what they were: what they are changes no time."""
        _, self.cache = self.step(self.model, self.token, self.position, None, self.cache)


def _growth(text: Text, tokens: int) -> int | None:
    """Bytes of resident memory that so many more tokens add, after as many again to settle; None without /proc."""
    if not Path("/proc/self/status").exists():
        return None
    for _ in range(tokens):
        text.next()
    before = _resident_bytes()
    for _ in range(tokens):
        text.next()
    return _resident_bytes() - before


def _resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def _beside_roofline(machine: Rates, model: nn.Module, cache: Cache, step: Run, step_ms: float) -> dict:
    flops, moved = counted_flops(step), _weight_bytes(model) + sum(_layer_bytes(layer) for layer in cache.layers)
    least = machine.least_ms(flops, moved)
    return {
        "gflops": flops / step_ms / 1e6,
        "matrix_gflops": machine.matrix_gflops,
        "gb_per_s": moved / step_ms / 1e6,
        "copy_gb_per_s": machine.copy_gb_per_s,
        "roofline_ms": least,
        "share_of_roofline": least / step_ms,
    }


def _weight_bytes(model: nn.Module) -> int:
    """All weights but the table of embeddings, of which a step reads a row; tied to the head it is read as that."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return sum(p.nbytes for p in model.parameters() if p is not embedding or p is head)


def _layer_bytes(layer: CacheLayerMixin) -> int:
    if isinstance(layer, RecurrentLayer):
        return 2 * layer.nbytes()
    return layer.keys.nbytes + layer.values.nbytes


def measure_step(*, rounds: int = 200, batches: Sequence[int] = BATCHES) -> dict:
    """One decode step of the operator on a GPU, H32 K = V = 128, bf16, fp32 state, 32 steps in a CUDA graph; the rate
    counts the state once read and once written.
    """
    rows = []
    for batch in batches:
        q, k, v = (torch.randn(batch, 1, HEADS, WIDTH, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        states = torch.zeros(min(32, max(1, 256 // batch)), batch, HEADS, WIDTH, WIDTH, device="cuda")
        g = torch.full((HEADS,), -0.1, device="cuda")

        def steps(q=q, k=k, v=v, g=g, states=states):
            for layer in range(32):
                linear_attention(q, k, v, g, state=states[layer % len(states)])

        graphed = _graph(steps)
        median = medians(measured({"steps": graphed} | rate_runs("cuda", torch.bfloat16), rounds, "cuda"))
        machine, step_ms = rates(median, "cuda"), median["steps"] / 32
        row = {"batch": batch, "step_us": step_ms * 1e3, "gb_per_s": 2 * states[0].nbytes / step_ms / 1e6}
        row |= {"copy_gb_per_s": machine.copy_gb_per_s, "share_of_copy_rate": row["gb_per_s"] / machine.copy_gb_per_s}
        rows.append(row)
    least = min((row["share_of_copy_rate"] for row in rows if row["batch"] >= 16), default=None)
    listed = [target("step, share of the copy bandwidth from batch 16", "at least", 0.7, least)]
    return result("decode-step", "cuda", rounds, rows=rows, targets=listed)


def measure_graphed(
    *, model: str = "mistral-7b", batch: int = 16, context: int = 32768, rounds: int = 20, device: str = "cuda"
) -> dict:
    """Tokens/s of a whole model in bf16, one step in a CUDA graph, after `context` tokens, beside its softmax base.

    The base attends to all of the context (a sliding window is taken off); its keys and values lie in place and are
    read without a mask, which leaves the choice of kernel to PyTorch. Weights and caches are drawn. Where memory does
    not hold every layer, fewer are timed, and the step is scaled up to all of them; `layers_timed` says how many.
    """
    rows, runs, built = [], {}, {}
    shapes = configs(model, KINDS)
    layers = shapes[SOFTMAX].num_hidden_layers
    timed = layers if device == "cpu" else _layers_that_fit(shapes[SOFTMAX], batch, context)
    for kind, config in shapes.items():
        student = draw(_shortened(config, timed), device, torch.bfloat16).eval()
        step, cache = _one_token(student, batch, context)
        built[kind], runs[kind] = (student, cache, step), _graph(step) if device == "cuda" else step
    times = measured(runs | rate_runs(device, torch.bfloat16), rounds, device)
    median = medians(times)
    machine = rates(median, device)
    for kind, (student, cache, step) in built.items():
        step_ms = median[kind] * layers / timed
        row = {"model": kind, "batch": batch, "context": context, "layers_timed": timed, "step_ms": step_ms}
        row |= {"tokens_per_s": batch / step_ms * 1e3, "over_softmax": median_ratio(times[SOFTMAX], times[kind])}
        rows.append(row | _beside_roofline(machine, student, cache, step, median[kind]))
    listed = [
        target(
            f"{model}, tokens/s at {context}, batch {batch}, over softmax", "at least", 3.0, rows[-1]["over_softmax"]
        )
    ]
    return result("decode-model", device, rounds, model=model, rows=rows, targets=listed)


def _layers_that_fit(config: SupraConfig, batch: int, context: int) -> int:
    """Of both models together and the base's cache: asked once, while memory is free, for both to time as many."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    width = config.hidden_size // heads
    cached = batch * (2 * kv_heads * width * context * 2 + heads * width * width * 4)
    weights = 2 * 2 * (5 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size)
    free = 0.8 * torch.cuda.mem_get_info()[0] - 8 * config.vocab_size * config.hidden_size
    return max(1, min(config.num_hidden_layers, int(free // (cached + weights))))


def _shortened(config: SupraConfig, layers: int) -> SupraConfig:
    """The first `layers` layers, without a sliding window."""
    swap, base = config.swap, config.plain()
    base.num_hidden_layers = layers
    if getattr(base, "sliding_window", None) is not None:
        base.sliding_window = None
    if getattr(base, "layer_types", None) is not None:
        base.layer_types = ["full_attention"] * layers
    return SupraConfig.from_base(base, mixer=swap.mixer, options=swap.options, layers=swap.layers[:layers])


class Filled(CacheLayerMixin):
    """Keys and values [B,G,T,D] of a whole context; every step overwrites the last place and reads them all."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise TypeError("the keys and values were given")

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self.keys[:, :, -1:].copy_(key_states)
        self.values[:, :, -1:].copy_(value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_seq_length(self, *args) -> int:
        return self.keys.shape[2] - 1

    def get_max_length(self) -> int:
        return -1


def _one_token(model: nn.Module, batch: int, context: int) -> tuple[Run, Cache]:
    """A step of one token for each of `batch` texts of `context` tokens, and the cache that it reads."""
    device, dtype, config = model.device, model.dtype, model.config
    token = torch.zeros((batch, 1), dtype=torch.long, device=device)
    width = config.hidden_size // config.num_attention_heads
    shape = (batch, config.num_key_value_heads, context, getattr(config, "head_dim", None) or width)
    layers = [
        Filled(*(torch.randn(shape, device=device, dtype=dtype) for _ in range(2)))
        if kind == SOFTMAX
        else DynamicLayer()  # a recurrent one takes its place
        for kind in config.swap.layers
    ]
    cache = Cache(layers=layers)
    position = torch.full((batch, 1), context - 1, dtype=torch.long, device=device)

    def step() -> None:
        with torch.inference_mode():
            model(input_ids=token, position_ids=position, cache=cache, use_cache=True)

    step()  # the recurrent states are made by the first
    return step, cache


def _graph(step: Run) -> Run:
    """`step` captured once, after warm-up on a stream of its own, as CUDA graphs want it; replayed from then on."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.inference_mode():
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        step()
    return graph.replay
