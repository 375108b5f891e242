"""What the operator, decoding and training cost on this machine, beside what it could do at best: contenders take turns
with one large matrix product and one large copy, and medians are kept. Models have a real shape, without a sliding
window, and drawn weights. CPU: one thread, fp32, CPU time, in which waiting does not count. GPU: bf16, CUDA events.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad
from torch.nn.functional import scaled_dot_product_attention as softmax
from transformers import masking_utils
from transformers.cache_utils import Cache, DynamicLayer

from supra_cli.core import checkpoint, hub, ops, recipe
from supra_cli.core.data.packing import Batch
from supra_cli.core.environment import hardware, versions
from supra_cli.core.flops import counter, operator_flops
from supra_cli.core.generate import steps
from supra_cli.core.modeling import SupraConfig, SupraForCausalLM
from supra_cli.core.recipe.keep import SOFTMAX
from supra_cli.core.train.build import prepare, stage_of
from supra_cli.core.train.optimizer import adamw
from supra_cli.core.train.step import Computing, take

Run = Callable[[], object]
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
CLOCKS = {"cpu": "CPU time of one thread", "cuda": "CUDA events"}
RATES = {"cpu": (1024, 1 << 27), "cuda": (8192, 1 << 30)}  # rows of the square matrices; bytes that are copied
OPERATORS = {"cpu": (1, 4, 64), "cuda": (4, 32, 128)}  # batch, heads, width K = V


def operator(device: str, lengths: Sequence[int], rounds: int) -> dict:
    """Linear attention with a fixed decay, forward and with backward, beside causal softmax attention (on a CPU up to
    8,192 tokens) and flash-linear-attention's chunked retention where that is installed.
    """
    (batch, heads, width), dtype, runs = OPERATORS[device], DTYPES[device], {}
    scale, decays = width**-0.5, -torch.exp2(-8 * torch.arange(1.0, heads + 1, device=device) / heads)
    for tokens in lengths:
        *inputs, do = torch.randn((4, batch, tokens, heads, width), device=device, dtype=dtype).unbind()
        forms = {"": (lambda *x: ops.linear_attention(*x, decays, scale=scale)[0], inputs, do)}
        if device == "cuda" or tokens <= 8192:
            *heads_first, do_first = (x.transpose(1, 2).contiguous() for x in (*inputs, do))
            forms["sdpa_"] = (partial(softmax, is_causal=True), heads_first, do_first)
        if device == "cuda" and find_spec("fla"):
            from fla.ops.retention import chunk_retention

            forms["fla_"] = (lambda *x, attend=chunk_retention: attend(*x, scale=scale)[0], inputs, do)
        for name, (attend, given, gradient) in forms.items():
            leaves = [x.detach().requires_grad_() for x in given]
            runs[tokens, f"{name}forward"] = torch.no_grad()(partial(attend, *leaves))
            runs[tokens, f"{name}forward_backward"] = lambda f=attend, x=leaves, do=gradient: grad(f(*x), x, do)
    times, rows, chunk = timed(runs, rounds, device), [], ops.chunk_tokens(device, width, width)
    for tokens in lengths:
        row = {"tokens": tokens} | {f"{name}_ms": times.ms((at, name)) for at, name in runs if at == tokens}
        ours, sdpa, fla = ((tokens, f"{name}forward_backward") for name in ("", "sdpa_", "fla_"))
        # On a GPU each tensor once per kernel that touches it, states too; on a CPU a block stays in the cache.
        moved = (11 if device == "cpu" else 22 + 7 * width // chunk) * batch * tokens * heads * width * dtype.itemsize
        flops = sum(operator_flops(batch * tokens * heads, width, width, chunk))
        rows.append(row | times.row(ours, sdpa, batch * tokens, flops, moved) | {"over_fla": times.faster(ours, fla)})
    return result("operator", device, rounds, rows)


def decode(
    device: str, model: str, positions: Sequence[int], batch: int, layers: int | None, compile: bool, rounds: int
) -> dict:
    """One more token for each of `batch` texts, by the step that `supra generate` takes, beside the softmax base, of
    whose keys and values, drawn, each step overwrites the last and reads all, without a mask. On a GPU the step is in a
    CUDA graph; with `compile` it is that of `generate --compile`. `layers` are the first that are built.
    """
    runs, known = {}, {}
    for kind, network in drawn(model, (SOFTMAX, "supra"), layers, device, DTYPES[device]).items():
        # Of the embeddings a step reads a row; tied to the head they are read as that.
        table, head = network.get_input_embeddings().weight, network.get_output_embeddings().weight
        weights = sum(p.nbytes for p in network.parameters() if p is not table or p is head)
        for at in positions:
            cache, token = _read(network.eval(), batch, at), torch.zeros(batch, dtype=torch.long, device=device)
            given = (network, token, torch.full_like(token, at - 1), None, cache)
            flops, held = counted_flops(partial(steps.decode, *given)), steps.cache_bytes(cache)  # now it has states
            step = partial(steps.compiled(*given) if compile else steps.decode, *given)
            runs[kind, at] = graphed(step) if device == "cuda" else step
            known[kind, at] = held, flops, weights + (held if kind == SOFTMAX else 2 * held)
    times, rows, built = timed(runs, rounds, device), [], network.config.num_hidden_layers
    for (kind, at), (held, flops, moved) in known.items():
        row = {"model": kind, "position": at, "batch": batch, "layers": built, "cache_bytes": held}
        rows.append(row | times.row((kind, at), (SOFTMAX, at), batch, flops, moved))
    return result("decode", device, rounds, rows, model=model, compiled=compile)


class _Filled(DynamicLayer):
    """Keys and values [B,G,T,D] of a whole context."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def get_seq_length(self) -> int:
        return self.keys.shape[-2] - 1  # a step overwrites the last

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys[:, :, -1:].copy_(key_states)
        self.values[:, :, -1:].copy_(value_states)
        return self.keys, self.values


def _read(model: SupraForCausalLM, batch: int, tokens: int) -> Cache:
    config, place = model.config, {"device": model.device, "dtype": model.dtype}
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = (2, batch, config.num_key_value_heads, tokens, width)
    kinds = (kind == SOFTMAX for kind in config.swap.layers)  # a recurrent layer takes the place of the empty one
    return Cache(layers=[_Filled(*torch.randn(size, **place)) if kept else DynamicLayer() for kept in kinds])


def train(
    device: str, model: str, shapes: Sequence[tuple[int, int]], layers: int | None, mixers: Sequence[str], rounds: int
) -> dict:
    """The step that `supra uptrain` takes, with each mixer: next-token loss, backward pass, clipping and AdamW on fp32
    weights that all move. `shapes` are (batch, tokens); `layers` are the first that are built.
    """
    spec, runs = recipe.Stage(kind="finetune", tokens=1), {}
    for mixer, student in drawn(model, mixers, layers, device, torch.float32).items():
        optimizer = adamw(student, prepare(student.train(), stage_of(spec), spec), spec)
        for batch, tokens in shapes:
            ids = torch.randint(student.config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(0))
            rows = Batch(ids, torch.arange(tokens).expand_as(ids), ids)
            computing = Computing(torch.device(device), DTYPES[device], batch)
            runs[mixer, batch, tokens] = partial(take, stage_of(spec), student, None, optimizer, rows, computing, 1.0)
    times, found, built = timed(runs, rounds, device), [], student.config.num_hidden_layers
    for (mixer, batch, tokens), run in runs.items():
        row = times.row((mixer, batch, tokens), (SOFTMAX, batch, tokens), batch * tokens, counted_flops(run))
        found.append({"mixer": mixer, "batch": batch, "tokens": tokens, "layers": built, **row})
    return result("train", device, rounds, found, model=model)


def drawn(model: str, mixers: Sequence[str], layers: int | None, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """The shape of `model` with each mixer in all or the first layers; a converted model's own mixer is kept."""
    found = checkpoint.read_config(hub.config_folder(hub.resolve(model)))
    base, swap = found.plain(), found.swap
    base.num_hidden_layers = layers = min(layers or base.num_hidden_layers, base.num_hidden_layers)
    base.sliding_window = None
    if getattr(base, "layer_types", None) is not None:
        base.layer_types = ["full_attention"] * layers
    own = swap.of_layers(range(layers))._asdict()
    del own["base"]
    kinds = {SOFTMAX: {}, swap.mixer: own} if swap.any else {mixer: {"mixer": mixer} for mixer in mixers}
    made = {kind: SupraConfig.from_base(base, **given) for kind, given in kinds.items()}
    torch.manual_seed(0)
    with torch.device(device):
        return {kind: SupraForCausalLM._from_config(config, dtype=dtype) for kind, config in made.items()}


def graphed(step: Run) -> Run:
    """`step` captured once, after warm-up on a stream of its own, as CUDA graphs want it; replayed from then on."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    # transformers 5.17 would write a mask out here, which keeps the softmax base from its fastest kernel.
    traced, masking_utils.is_tracing = masking_utils.is_tracing, lambda *_: False
    try:
        with torch.cuda.graph(graph):
            step()
    finally:
        masking_utils.is_tracing = traced
    return lambda held=step: graph.replay()  # the graph reads what `step` holds, wherever it lay: let it lie there


def counted_flops(run: Run) -> int:
    """Of whatever `run` multiplies."""
    with counter() as counted:
        run()
    return counted.get_total_flops()


@dataclass(frozen=True)
class Times:
    """Milliseconds of each run, round by round."""

    of: Mapping[Any, Sequence[float]]
    device: str

    def ms(self, run: Any) -> float:
        return statistics.median(self.of[run])

    def faster(self, run: Any, other: Any) -> float | None:
        """How many times: the median of the ratios within a round; None where the other was not timed."""
        pairs = zip(self.of[run], self.of.get(other, ()), strict=False)
        return statistics.median([theirs / ours for ours, theirs in pairs]) if other in self.of else None

    def row(self, run: Any, softmax: Any, tokens: int, flops: float, moved: float = 0) -> dict[str, float | None]:
        """Rates of a run, the machine's own, and the milliseconds that it cannot beat."""
        ms, (side, copied) = self.ms(run), RATES[self.device]
        matrix, copy = 2 * side**3 / self.ms("matrix") / 1e6, 2 * copied / self.ms("copy") / 1e6
        row = {"ms": ms, "tokens_per_s": tokens / ms * 1e3, "over_softmax": self.faster(run, softmax)}
        row |= {"gflops": flops / ms / 1e6, "matrix_gflops": matrix, "share_of_matrix_rate": flops / ms / 1e6 / matrix}
        if moved:
            row |= {"gb_per_s": moved / ms / 1e6, "copy_gb_per_s": copy, "share_of_copy_rate": moved / ms / 1e6 / copy}
        return {**row, "roofline_ms": max(flops / matrix, moved / copy) / 1e6}


def timed(runs: Mapping[Any, Run], rounds: int, device: str) -> Times:
    """One warm-up of each, then rounds in an order drawn anew: what one leaves in the caches falls to all alike."""
    if device == "cpu":
        torch.set_num_threads(1)
    side, size = RATES[device]
    square = torch.randn(side, side, device=device, dtype=DTYPES[device])
    source, copied = torch.zeros((2, size), dtype=torch.uint8, device=device)
    runs = {**runs, "matrix": lambda: square @ square, "copy": lambda: copied.copy_(source)}
    for run in runs.values():
        run()
    order, times = random.Random(0), {name: [] for name in runs}
    for _ in range(rounds):
        for name in order.sample(list(runs), len(runs)):
            times[name].append(_ms(runs[name], device))
    return Times(times, device)


def _ms(run: Run, device: str) -> float:
    if device == "cpu":
        began = time.process_time_ns()
        run()
        return (time.process_time_ns() - began) / 1e6
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    run()  # the GPU is at work while the next is launched, as in training
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def result(benchmark: str, device: str, rounds: int, rows: list[dict], **more: object) -> dict:
    found = {"benchmark": benchmark, "hardware": hardware(), "versions": versions("triton"), "clock": CLOCKS[device]}
    return {**found, "rounds": rounds, **more, "rows": rows}
