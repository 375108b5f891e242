"""Plans against published counts, against formulas and against what real tensors take."""

from __future__ import annotations

from collections import Counter

import pytest
import supra_kernels.library
import torch
from supra_cli.core.train.prepare import prepare
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, Qwen2Config

from benchmarks.memory import totals
from supra_cli.core import accounting, checkpoint, hub, ops
from supra_cli.core import recipe as recipes
from supra_cli.core.accounting import layers
from supra_cli.core.accounting.meter import Meter, inside
from supra_cli.core.data.packing import Batch
from supra_cli.core.errors import UsageError
from supra_cli.core.lookup import lookup
from supra_cli.core.modeling import SupraConfig, SupraForCausalLM
from supra_cli.core.stages import stages
from supra_cli.core.train.optimizer import adamw
from supra_cli.core.train.step import Stepper, begin


def planned(alias, mixer="supra", keep="none", **options):
    base = checkpoint.read_config(hub.config_folder(hub.resolve(alias)))
    return accounting.measure(base.with_mixer(mixer, options, keep))


@pytest.mark.parametrize(("alias", "millions"), [("llama-7b", 537.0), ("mistral-7b", 570.6)])
def test_new_parameters_are_those_of_the_paper(alias, millions):
    assert round(planned(alias).new_parameters / 1e6, 1) == millions


def test_the_state_of_a_7b_model_is_32_by_32_by_128_by_128_numbers():
    plan = planned("mistral-7b")
    assert plan.state_bytes == 4 * 32 * 32 * 128 * 128
    # In bf16 it would be worth 256 tokens of Mistral's cache; in fp32 it is worth 512.
    assert plan.break_even_tokens == 512


def test_the_base_s_cache_is_two_vectors_a_layer_and_kv_head_up_to_its_window():
    plan = planned("mistral-7b")
    assert plan.base_cache_bytes(1000) == 32 * 2 * 8 * 128 * 2 * 1000
    assert plan.base_cache_bytes(10_000) == plan.base_cache_bytes(4096)
    assert planned("llama-7b").base_cache_bytes(10_000) == 32 * 2 * 32 * 128 * 2 * 10_000


def test_kept_layers_keep_their_cache():
    plan = planned("llama-7b", keep="every:4")
    assert plan.layers.count("softmax") == 8
    assert plan.cache_bytes(1000) == plan.state_bytes + 8 * 2 * 32 * 128 * 2 * 1000
    assert planned("llama-7b", keep="all").cache_bytes(77) == planned("llama-7b").base_cache_bytes(77)


def test_unknown_names_are_usage_errors():
    for wrong in ({"mixer": "supr"}, {"keep": "every:0"}, {"gian": "head"}):
        with pytest.raises(UsageError):
            planned("llama-7b", **wrong)


# -- recipes ----------------------------------------------------------------------------------------------------------

SHAPE = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
}


def recipe(*stages, seq_len=64, mixer="supra", **keys):
    return recipes.validate(
        {
            "model": SHAPE,
            "tokenizer": {"vocab_size": 512},
            "init": "scratch",
            "mixer": {"name": mixer},
            "data": {"seq_len": seq_len, "sources": [{"path": "python-stdlib"}]},
            "stages": list(stages) or [{"kind": "finetune", "tokens": 10_000, "batch_tokens": 512}],
            **keys,
        },
        lookup=lookup,
    )


def test_steps_and_tokens_are_the_recipe_s():
    stage = accounting.plan(recipe()).stages[0]
    assert (stage.rows, stage.steps, stage.tokens) == (8, 20, 20 * 512)


def test_weights_gradients_and_moments_are_four_four_and_eight_bytes_a_parameter():
    plan = accounting.plan(recipe(), torch.float32)
    memory = plan.stages[0].memory
    parameters = plan.model.parameters
    assert (memory.weights, memory.gradients, memory.optimizer) == (4 * parameters, 4 * parameters, 8 * parameters)
    assert memory.copies == memory.teacher == 0


def with_optimizer(name: str, dtype: torch.dtype = torch.bfloat16):
    stage = {"kind": "finetune", "tokens": 4096, "batch_tokens": 2048, "micro_batch_tokens": 512, "optimizer": name}
    return accounting.plan(recipe(stage), dtype).stages[0]


def test_8_bit_moments_are_two_bytes_a_number_and_their_blocks_scales():
    """Of matrices of 4096 numbers and more, in blocks of 256: fp32 scales, and a table of codes for each moment."""
    sizes = [parameter.numel() for parameter in meta_model().parameters()]
    coded = [size for size in sizes if size >= 4096 and size % 256 == 0]
    rest = sum(sizes) - sum(coded)
    assert coded
    assert rest
    wanted = 2 * sum(coded) + 2 * 4 * sum(coded) // 256 + 2 * 1024 * len(coded) + 8 * rest
    memory = with_optimizer("adamw8bit").memory
    assert memory.optimizer == wanted
    assert memory.host == 0


def test_offloading_leaves_the_device_two_bytes_a_parameter():
    plain, offloaded = with_optimizer("adamw"), with_optimizer("adamw-offload")
    parameters = plain.trainable
    memory = offloaded.memory
    assert (memory.weights, memory.copies, memory.gradients, memory.optimizer) == (2 * parameters, 0, 0, 0)
    assert memory.host == (4 + 4 + 8) * parameters
    assert plain.memory.host == 0
    assert memory.total < plain.memory.total
    assert offloaded.flops == plain.flops


def test_what_does_not_move_stays_in_float32_when_offloading():
    stage = {"kind": "finetune", "tokens": 1024, "batch_tokens": 512, "train": "mixer", "optimizer": "adamw-offload"}
    plan = accounting.plan(recipe(stage))
    moving, parameters = plan.model.new_parameters, plan.model.parameters
    assert plan.stages[0].memory.weights == 4 * (parameters - moving) + 2 * moving
    assert plan.stages[0].memory.host == 16 * moving


def test_checkpointed_blocks_have_their_copies_of_the_weights_one_at_a_time():
    stage = {"kind": "finetune", "tokens": 4096, "batch_tokens": 512}
    plain, checkpointed = (
        accounting.plan(recipe({**stage, "activation_checkpointing": choice})).stages[0].memory
        for choice in (False, True)
    )
    assert plain.copies > 1.9 * (sum(p.numel() for p in meta_model().parameters() if p.ndim > 1) - 2 * 512 * 64)
    assert 0 < checkpointed.copies < plain.copies / 2


def meta_model() -> SupraForCausalLM:
    with torch.device("meta"):
        return SupraForCausalLM._from_config(accounting.student_config(recipe()))


def test_only_what_moves_has_gradients():
    stage = {"kind": "finetune", "tokens": 1024, "batch_tokens": 512, "train": "mixer"}
    plan = accounting.plan(recipe(stage), torch.float32)
    assert plan.stages[0].trainable == plan.model.new_parameters
    assert plan.stages[0].memory.gradients == 4 * plan.model.new_parameters


def test_softmax_flops_are_those_of_the_formula():
    """Forward 2 and backward 4 a weight and token; scores and values 4·T·D a layer and token, times three as well."""
    length, layers, model_dim = 64, 2, 64
    stage = accounting.plan(recipe(mixer="softmax", keep="all"), torch.float32).stages[0]
    attention = model_dim * model_dim * 2 + 2 * model_dim * 32
    weights = layers * (attention + 3 * model_dim * 96) + 512 * model_dim
    formula = stage.tokens * 3 * (2 * weights + layers * 4 * length * model_dim)
    # The attention's backward pass recomputes the scores: five products instead of four.
    assert stage.flops == pytest.approx(formula, rel=0.1)


def test_recurrent_flops_are_linear_in_the_length():
    each = [accounting.plan(recipe(seq_len=length), torch.float32).stages[0] for length in (256, 512)]
    short, long = (stage.flops / stage.tokens for stage in each)
    assert long == pytest.approx(short, rel=0.1)


def test_smaller_micro_batches_need_less_memory_and_the_same_work():
    whole = accounting.plan(recipe({"kind": "finetune", "tokens": 4096, "batch_tokens": 4096})).stages[0]
    parts = accounting.plan(
        recipe({"kind": "finetune", "tokens": 4096, "batch_tokens": 4096, "micro_batch_tokens": 512})
    ).stages[0]
    assert parts.memory.activations < whole.memory.activations / 4
    assert parts.flops == pytest.approx(whole.flops, rel=0.01)


def test_activation_checkpointing_trades_memory_for_work():
    stage = {"kind": "finetune", "tokens": 4096, "batch_tokens": 4096}
    plain, checkpointed = (
        accounting.plan(recipe({**stage, "activation_checkpointing": choice}), torch.float32).stages[0]
        for choice in (False, True)
    )
    assert checkpointed.memory.activations < 0.7 * plain.memory.activations
    assert checkpointed.flops > 1.1 * plain.flops


def test_boundaries_of_documents_cost_memory_and_no_products():
    data = {"seq_len": 256, "sources": [{"path": "python-stdlib"}]}
    joined, packed = (
        accounting.plan(recipe(data={**data, "documents": how}), torch.float32).stages[0]
        for how in ("joined", "separate")
    )
    assert joined.memory.activations < packed.memory.activations
    assert joined.flops == packed.flops


def test_untying_gives_the_head_weights_of_its_own():
    stage = {"kind": "finetune", "tokens": 1024, "batch_tokens": 512, "untie": True}
    plan = accounting.plan(recipe(stage, model={**SHAPE, "tie_word_embeddings": True}), torch.float32)
    assert plan.stages[0].trainable == plan.model.parameters + 512 * 64


STEPS_OF_EACH_KIND = [
    ("supra", "float32", "joined", {"kind": "finetune", "micro_batch_tokens": 512}),
    ("gated", "bfloat16", "separate", {"kind": "distill", "activation_checkpointing": True}),
    ("t2r", "float32", "separate", {"kind": "transfer"}),
    ("supra", "bfloat16", "separate", {"kind": "finetune", "optimizer": "adamw-offload"}),
]


@pytest.mark.parametrize(("mixer", "dtype", "documents", "stage"), STEPS_OF_EACH_KIND)
def test_the_planned_peak_is_what_the_allocator_hands_out_for_a_real_step(mixer, dtype, documents, stage):
    raw = {
        "base": "tiny",
        "keep": "every:3",
        "mixer": {"name": mixer},
        "data": {"seq_len": 256, "documents": documents, "sources": [{"path": "python-stdlib"}]},
        "stages": [{"tokens": 1024, "batch_tokens": 1024, **stage}],
    }
    parsed, dtype = recipes.validate(raw, lookup=lookup), getattr(torch, dtype)
    planned = accounting.plan(parsed, dtype, "cpu").stages[0].memory.together
    assert planned == pytest.approx(handed_out(lambda: two_steps(parsed, dtype)), rel=0.01)


class NoKernel:
    """Launched on any grid, it leaves zeros in every tensor."""

    def __getitem__(self, grid):
        return lambda *arguments, **options: [x.data.zero_() for x in arguments if isinstance(x, torch.Tensor)]


@pytest.fixture
def launcher(monkeypatch):
    """The launcher of the Triton form as on a GPU, which allocates what it does there, without its kernels."""
    pytest.importorskip("triton")
    from supra_kernels.gpu import launch, tokens

    for module in (launch, tokens):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, NoKernel())
    monkeypatch.setattr(launch, "INTERPRETED", False)
    return launch


@pytest.mark.parametrize(("mixer", "kind"), [("supra", "finetune"), ("gated", "transfer"), ("t2r", "transfer")])
def test_the_plan_for_a_gpu_counts_the_form_for_gpus(mixer, kind, launcher):
    """But for the numbers of the documents and copies of decays, a few numbers a token."""
    raw = {
        "base": "tiny",
        "mixer": {"name": mixer},
        "data": {"seq_len": 256, "sources": [{"path": "python-stdlib"}]},
        "stages": [{"kind": kind, "tokens": 2048, "batch_tokens": 2048}],
    }
    parsed = recipes.validate(raw, lookup=lookup)
    planned = {device: accounting.plan(parsed, torch.float32, device).stages[0].memory for device in ("cpu", "cuda")}
    with ops.planning("triton"):
        found = handed_out(lambda: two_steps(parsed, torch.float32))
    assert planned["cuda"].together == pytest.approx(found, rel=0.015)
    assert planned["cpu"].together != pytest.approx(found, rel=0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("decays", [False, True])
@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("by_token", [False, True])
def test_the_triton_form_s_scratch_is_what_its_launcher_allocates(dtype, sums, decays, by_token, launcher):
    fused = (None, 1e-6) if sums else (1e-5, None)
    with FakeTensorMode(), torch.device("cpu"):
        q, do = (torch.empty(2, 1000, 8, 64, dtype=dtype) for _ in range(2))
        k, v = (torch.empty(2, 1000, 4, 64, dtype=dtype) for _ in range(2))
        g, row = torch.empty((2, 1000, 8) if by_token else 8), torch.empty(2, 1000, 8)
        documents = torch.empty(2, 1000, dtype=torch.int32)
        forward = (q, k, v, g, None, documents, 1.0, *fused)
        backward = (do, None, q, k, v, g, None, documents, 1.0, torch.empty_like(q), row, fused[1], decays)
        for name, arguments in (("triton", forward), ("triton_backward", backward)):
            with Meter(*(x for x in arguments if isinstance(x, torch.Tensor))) as meter:
                returned = getattr(supra_kernels.library, f"_{name}")(*arguments)
            allocated = meter.laps[-1].peak - sum(tensor.nbytes for tensor in returned)
            counted = inside(getattr(torch.ops.supra, name).default, arguments).scratch
            assert counted == pytest.approx(allocated, rel=0.03)


def saved_shape(folder, **keys) -> str:
    """A base of which only the config exists."""
    keys = {"vocab_size": 512, "dtype": "float32", **keys}
    LlamaConfig(**{key: SHAPE[key] for key in SHAPE if key != "model_type"}, **keys).save_pretrained(folder)
    return str(folder)


TRANSFER, FINETUNE = ({"kind": kind, "tokens": 1024, "batch_tokens": 512} for kind in ("transfer", "finetune"))
HEAD_BYTES = 4 * 512 * 64


def unread(folder, *stages, device="cpu", data=(), **keys) -> list[int]:
    raw = {
        "base": saved_shape(folder, **keys),
        "mixer": {"name": "supra"},
        "data": {"seq_len": 64, "sources": [{"path": "python-stdlib"}], **dict(data)},
        "stages": list(stages),
    }
    plan = accounting.plan(recipes.validate(raw, lookup=lookup), torch.float32, device)
    for stage in plan.stages:
        memory = stage.memory
        assert memory.weights + memory.unread == 4 * plan.model.parameters
        assert memory.together == memory.total
    return [stage.memory.unread for stage in plan.stages]


def test_a_transfer_leaves_the_head_in_its_mapped_file_until_a_stage_reads_it(tmp_path):
    assert unread(tmp_path, TRANSFER, FINETUNE, TRANSFER) == [HEAD_BYTES, 0, 0]


@pytest.mark.parametrize(
    "choice",
    [
        {"device": "cuda"},
        {"tie_word_embeddings": True},
        {"dtype": "bfloat16"},
        {"data": {"validation": [{"path": "python-stdlib"}]}},
    ],
    ids=["copied to a GPU", "a tied head", "converted when loaded", "validation"],
)
def test_every_weight_takes_memory_where_something_reads_it(choice, tmp_path):
    assert unread(tmp_path, TRANSFER, **choice) == [0]


def two_steps(parsed: recipes.Recipe, dtype: torch.dtype) -> None:
    """Of real tensors; a row has two documents, or they are joined. The second step finds the moments."""
    (spec,), cpu = parsed.stages, torch.device("cpu")
    stage = stages.get(spec.kind)(stages.get(spec.kind).Options())
    student = SupraForCausalLM._from_config(accounting.student_config(parsed), dtype=torch.float32).train()
    optimizer = adamw(student, prepare(student, stage, spec), spec, dtype)
    teacher = None
    if stage.teacher == "separate":
        config = checkpoint.read_config(hub.config_folder(hub.resolve(parsed.base)))
        teacher = SupraForCausalLM._from_config(config, dtype=dtype).eval().requires_grad_(False)
    stepper = Stepper(stage, student, teacher, optimizer, 1.0, cpu, dtype)
    rows = parsed.micro_rows(spec)
    ids = torch.randint(260, (rows, 256))
    document = 256 if parsed.data.documents == "joined" else 128
    batch = Batch(ids, (torch.arange(256) % document).expand(rows, 256), ids)
    begin(stage, student, [batch], cpu, dtype)
    for _ in range(2):
        stepper.take([batch] * (parsed.rows(spec) // rows))


def handed_out(run) -> int:
    """The allocator's highest sum while `run` runs, as PyTorch's profiler follows it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        before = torch.empty(1)
        run()
        del before
    sums = totals(profile.profiler.kineto_results.experimental_event_tree())
    return max(sums) - sums[0]


STEPS_OF_DEEP_MODELS = [
    ("supra", "none", 64, {"kind": "finetune", "batch_tokens": 64}),
    ("supra", "none", 64, {"kind": "finetune", "batch_tokens": 4096, "activation_checkpointing": True}),
    ("supra", "every:4", 64, {"kind": "finetune", "batch_tokens": 1024, "micro_batch_tokens": 512}),
    ("window", "every:3", 256, {"kind": "distill", "batch_tokens": 1024, "activation_checkpointing": True}),
    ("gated", "none", 256, {"kind": "transfer", "batch_tokens": 512}),
    ("t2r", "first:3", 64, {"kind": "transfer", "batch_tokens": 128, "micro_batch_tokens": 64}),
    ("t2r", "none", 64, {"kind": "finetune", "batch_tokens": 64, "optimizer": "adamw-offload"}),
    ("supra", "none", 64, {"kind": "distill", "batch_tokens": 2048, "untie": True, "train": "mixer"}),
]


@pytest.mark.parametrize(("mixer", "keep", "seq_len", "stage"), STEPS_OF_DEEP_MODELS)
def test_a_deep_model_takes_what_its_first_layers_say(mixer, keep, seq_len, stage, monkeypatch):
    """Against the same step of all layers, in steps whose most is alive with the activations or with the gradients."""
    shape = {**SHAPE, "num_hidden_layers": 8, "tie_word_embeddings": True}
    teacher = {"teacher": "tiny"} if stage["kind"] == "distill" else {}
    stage = {"tokens": 4096, **teacher, **stage}
    tokenizer = {"vocab_size": 2048}  # the teacher's
    deep = recipe(stage, seq_len=seq_len, mixer=mixer, keep=keep, model=shape, tokenizer=tokenizer)
    few = accounting.plan(deep).stages[0]
    monkeypatch.setattr(layers, "FEW", 8)
    whole = accounting.plan(deep).stages[0]
    assert few.flops == whole.flops
    assert few.memory.total == pytest.approx(whole.memory.total, rel=0.005)
    assert few.memory.together == pytest.approx(whole.memory.together, rel=0.005)


def test_a_shortened_model_has_so_many_layers_of_each_kind_and_keeps_the_last():
    shape = {key: SHAPE[key] for key in SHAPE if key != "model_type"} | {"num_hidden_layers": 8}
    windows = ["full_attention"] * 4 + ["sliding_attention"] * 4
    base = SupraConfig.from_base(Qwen2Config(**shape, use_sliding_window=True, sliding_window=16, layer_types=windows))
    config = base.with_mixer("supra", {}, "every:2")
    counts = Counter({kind: 1 + (kind[0] == "supra") for kind in layers.kinds(config)})
    short = layers.shortened(config, counts)
    kinds = layers.kinds(short)
    assert Counter(kinds) == counts
    assert kinds[-1] == layers.kinds(config)[-1]
    assert len(SupraForCausalLM._from_config(short).base_model.layers) == len(kinds) == 6
    assert layers.kinds(config) == layers.kinds(base.with_mixer("supra", {}, "every:2"))


def test_planning_a_7b_recipe_allocates_nothing(monkeypatch):
    raw = {
        "base": "mistral-7b",
        "data": {"seq_len": 2048, "sources": [{"path": "python-stdlib"}]},
        "stages": [{"kind": "finetune", "tokens": 10_000_000, "batch_tokens": 65_536, "micro_batch_tokens": 2048}],
    }
    plan = accounting.plan(recipes.validate(raw, lookup=lookup))
    assert round(plan.model.new_parameters / 1e6, 1) == 570.6
    assert plan.memory_bytes > 16 * plan.model.parameters
    # Forward and backward take about six FLOPs a weight and token.
    assert plan.flops / plan.tokens == pytest.approx(6 * plan.model.parameters, rel=0.25)


def test_a_tied_model_counts_its_embedding_once():
    config = SupraConfig.from_base(LlamaConfig(**SHAPE | {"vocab_size": 512, "tie_word_embeddings": True}))
    untied = SupraConfig.from_base(LlamaConfig(**SHAPE | {"vocab_size": 512, "tie_word_embeddings": False}))
    assert accounting.measure(untied).parameters - accounting.measure(config).parameters == 512 * 64
