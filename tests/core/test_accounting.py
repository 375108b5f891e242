"""Plans against published counts, against formulas and against what real tensors take."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny import tiny_config
from transformers import LlamaConfig, Qwen2Config

from benchmarks import memory as bench
from supra_cli.core import accounting, checkpoint, hub
from supra_cli.core import recipe as recipes
from supra_cli.core.accounting import layers
from supra_cli.core.data.packing import Batch
from supra_cli.core.errors import UsageError
from supra_cli.core.lookup import lookup
from supra_cli.core.modeling import SupraConfig, SupraForCausalLM
from supra_cli.core.stages import Loss, Stage
from supra_cli.core.train.build import prepare, stage_of
from supra_cli.core.train.step import Computing, begin


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


@pytest.mark.parametrize(
    ("mixer", "keep", "dropped"),
    [
        ("supra", "none", ("the window of 7 tokens, in 2 of the layers", "the soft cap of scores, in 3 of the layers")),
        ("supra", "sliding", ("the soft cap of scores, in 1 of the layers",)),
        ("window", "none", ("the window of 7 tokens, in 2 of the layers",)),
        ("softmax", "all", ()),
    ],
)
def test_a_plan_names_what_swapped_layers_do_without(mixer, keep, dropped):
    base = SupraConfig.from_base(tiny_config("gemma2"))
    assert accounting.measure(base.with_mixer(mixer, {}, keep)).dropped == dropped


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
FINETUNE = {"kind": "finetune", "tokens": 4096, "batch_tokens": 2048}


def recipe(*stages, seq_len=64, mixer="supra", **keys):
    return recipes.validate(
        {
            "model": SHAPE,
            "tokenizer": {"vocab_size": 512},
            "init": "scratch",
            "mixer": mixer if isinstance(mixer, dict) else {"name": mixer},
            "data": {"seq_len": seq_len, "sources": [{"path": "python-stdlib"}]},
            "stages": list(stages) or [FINETUNE],
            **keys,
        },
        lookup=lookup,
    )


def first(*given, dtype=torch.float32, device="cuda", **keys) -> accounting.StagePlan:
    return accounting.plan(recipe(*given, **keys), dtype, device).stages[0]


def meta_model() -> SupraForCausalLM:
    return checkpoint.skeleton(accounting.student_config(recipe()))


def test_weights_gradients_and_moments_are_four_four_and_eight_bytes_a_parameter_shared_out_among_gpus():
    parameters = sum(p.numel() for p in meta_model().parameters())
    for gpus in (1, 2, 8):
        memory = first().memory(gpus)
        assert (memory.weights, memory.gradients, memory.optimizer) == tuple(n * parameters // gpus for n in (4, 4, 8))
        assert memory.copies == memory.teacher == memory.host == 0


def test_whole_on_each_of_several_gpus_are_two_blocks_and_what_is_outside_of_them_and_at_the_end_their_gradients():
    """Weights of blocks are in bf16 but for their mixers and norms; gradients are in fp32 when they are reduced."""
    model = meta_model()
    block = model.base_model.layers[0]
    norms = block.input_layernorm.weight.numel() + block.post_attention_layernorm.weight.numel()
    mixer, whole = (sum(p.numel() for p in part.parameters()) for part in (block.self_attn.mixer, block))
    outside = sum(p.numel() for p in model.parameters()) - 2 * whole
    weights = 2 * (2 * (whole - mixer - norms) + 4 * (mixer + norms)) + 4 * outside
    full = first(dtype=torch.bfloat16)
    assert [full.memory(gpus).gathered for gpus in (1, 2, 4)] == [0, weights, weights]
    one_row = {**FINETUNE, "batch_tokens": 64}
    assert first(one_row, dtype=torch.bfloat16).memory(2).gathered == weights + 2 * 4 * whole + 4 * outside
    assert first({**one_row, "kind": "transfer"}, dtype=torch.bfloat16).memory(2).gathered == weights + 2 * 4 * mixer


def test_a_teacher_is_shared_out_in_the_computing_dtype():
    stage = first(
        {**FINETUNE, "kind": "distill", "teacher": "tiny"}, tokenizer={"vocab_size": 2048}, dtype=torch.bfloat16
    )
    teacher = checkpoint.skeleton(checkpoint.read_config(hub.config_folder(hub.resolve("tiny"))))
    parameters = sum(p.numel() for p in teacher.parameters())
    assert [stage.memory(gpus).teacher for gpus in (1, 4)] == [2 * parameters, 2 * parameters // 4]


def test_a_stage_that_has_no_one_to_learn_from_is_refused_as_it_is_when_it_runs():
    with pytest.raises(UsageError, match="stage 'distill' learns from a teacher and this model has no base"):
        first({**FINETUNE, "kind": "distill"})


def test_no_part_of_a_small_step_is_less_than_nothing():
    raw = {"base": "tiny", "mixer": {"name": "supra"}, "data": {"seq_len": 64, "sources": [{"path": "python-stdlib"}]}}
    raw["stages"] = [{"kind": "distill", "tokens": 64, "batch_tokens": 64}]
    stage = accounting.plan(recipes.validate(raw, lookup=lookup), torch.bfloat16).stages[0]
    assert min(vars(stage.memory()).values()) >= 0


def test_each_gpu_has_its_part_of_the_rows_and_the_last_one_s_are_filled_up():
    """24 rows are 24, 12, 6 and 2 for 16; in micro-batches of 8 rows, and smaller ones need less memory."""
    stage = first({**FINETUNE, "batch_tokens": 24 * 64, "micro_batch_tokens": 8 * 64})
    activations = [stage.memory(gpus).activations for gpus in (1, 2, 4, 16)]
    assert activations[0] == activations[1] > activations[2] > activations[3]
    assert stage.flops(4) == stage.flops(1)
    assert stage.flops(16) == stage.flops(1) * 32 // 24


def test_8_bit_moments_are_two_bytes_a_number_and_their_blocks_scales():
    """Of matrices of 4096 numbers and more, in blocks of 256: fp32 scales, and a table of codes for each moment."""
    sizes = [parameter.numel() for parameter in meta_model().parameters()]
    coded = [size for size in sizes if size >= 4096 and size % 256 == 0]
    rest = sum(sizes) - sum(coded)
    assert coded
    assert rest
    wanted = 2 * sum(coded) + 2 * 4 * sum(coded) // 256 + 2 * 1024 * len(coded) + 8 * rest
    memory = first({**FINETUNE, "optimizer": "adamw8bit"}).memory()
    assert memory.optimizer == wanted
    assert memory.host == 0


def test_offloading_leaves_one_gpu_two_bytes_a_number_of_the_base_s_linear_maps_and_several_gpus_none():
    stage = first({**FINETUNE, "optimizer": "adamw-offload"}, dtype=torch.bfloat16)
    parameters, memory = stage.trained.total, stage.memory()
    projections = sum(p.numel() for name, p in meta_model().named_parameters() if "_proj" in name)
    assert memory.weights == 4 * (parameters - projections) + 2 * projections
    assert (memory.gradients, memory.optimizer) == (0, 0)
    # Of the head and the mixers' linear maps, which are in fp32.
    rest = [p for name, p in meta_model().named_parameters() if p.ndim > 1 and "_proj" not in name]
    assert memory.copies == pytest.approx(2 * (sum(p.numel() for p in rest) - 512 * 64), rel=0.05)
    assert memory.host == (4 + 4 + 8) * parameters
    assert (stage.memory(2).weights, stage.memory(2).host) == (0, 16 * parameters // 2)


def test_of_a_transfer_only_one_gpu_s_optimizer_is_offloaded():
    stage = first({**FINETUNE, "kind": "transfer", "optimizer": "adamw-offload"}, dtype=torch.bfloat16)
    plain = first({**FINETUNE, "kind": "transfer"}, dtype=torch.bfloat16)
    assert stage.memory().host == 16 * planned_new()
    assert stage.memory(2) == plain.memory(2)


def test_what_does_not_move_has_no_gradient_and_stays_in_float32_when_offloading():
    parameters, moving = sum(p.numel() for p in meta_model().parameters()), planned_new()
    assert first({**FINETUNE, "train": "mixer"}).memory().gradients == 4 * moving
    stage = first({**FINETUNE, "train": "mixer", "optimizer": "adamw-offload"}, dtype=torch.bfloat16)
    assert stage.memory().weights == 4 * parameters
    assert stage.memory().host == 16 * moving


def planned_new() -> int:
    return accounting.measure(accounting.student_config(recipe())).new_parameters


def test_copies_of_weights_are_two_bytes_a_number_of_every_matrix_that_is_multiplied_but_the_embedding():
    matrices = sum(p.numel() for p in meta_model().parameters() if p.ndim > 1) - 512 * 64
    stage = first(dtype=torch.bfloat16)
    assert stage.memory().copies == pytest.approx(2 * matrices, rel=0.05)
    assert stage.memory(2).copies < stage.memory().copies


def test_softmax_flops_are_those_of_the_formula():
    """Forward 2 and backward 4 a weight and token; scores and values 4·T·D a layer and token, times three as well."""
    length, layers, model_dim = 64, 2, 64
    stage = first(mixer="softmax", keep="all")
    attention = model_dim * model_dim * 2 + 2 * model_dim * 32
    weights = layers * (attention + 3 * model_dim * 96) + 512 * model_dim
    formula = FINETUNE["tokens"] * 3 * (2 * weights + layers * 4 * length * model_dim)
    # The attention's backward pass recomputes the scores: five products instead of four.
    assert stage.flops() == pytest.approx(formula, rel=0.1)


def test_recurrent_flops_are_linear_in_the_length():
    short, long = (first(seq_len=length).flops() for length in (256, 512))
    assert long == pytest.approx(short, rel=0.1)


def test_smaller_micro_batches_need_less_memory_and_the_same_work():
    whole, parts = (first({**FINETUNE, "micro_batch_tokens": tokens}) for tokens in (2048, 256))
    assert parts.memory().activations < whole.memory().activations / 4
    assert parts.flops() == pytest.approx(whole.flops(), rel=0.01)
    by_setting = whole.memory(1, parts.spec).total
    assert by_setting == pytest.approx(parts.memory().total, rel=0.02)


def test_activation_checkpointing_trades_memory_for_the_blocks_forward_pass():
    plain, checkpointed = (first({**FINETUNE, "activation_checkpointing": choice}) for choice in (False, True))
    assert checkpointed.memory().activations < 0.7 * plain.memory().activations
    head = 2 * 512 * 64 * FINETUNE["tokens"]
    assert checkpointed.flops() - plain.flops() == pytest.approx(plain.flops() / 3 - head, rel=0.15)


def test_boundaries_of_documents_cost_memory_and_no_products():
    data = {"seq_len": 256, "sources": [{"path": "python-stdlib"}]}
    joined, packed = (first(data={**data, "documents": how}, mixer="gated") for how in ("joined", "separate"))
    assert joined.memory().activations <= packed.memory().activations
    assert joined.flops() == packed.flops()


def test_untying_gives_the_head_weights_of_its_own():
    plan = accounting.plan(recipe({**FINETUNE, "untie": True}, model={**SHAPE, "tie_word_embeddings": True}))
    assert plan.stages[0].trained.total == plan.model.parameters + 512 * 64


# -- what real steps take ---------------------------------------------------------------------------------------------

STEPS_OF_EACH_KIND = [
    ("supra", "float32", "joined", {"kind": "finetune", "micro_batch_tokens": 512}),
    ("gated", "bfloat16", "separate", {"kind": "distill", "activation_checkpointing": True}),
    ("t2r", "float32", "separate", {"kind": "transfer"}),
    ("window", "bfloat16", "separate", {"kind": "finetune"}),
    ("lolcats", "bfloat16", "separate", {"kind": "finetune"}),
    ("mamba2", "float32", "joined", {"kind": "transfer"}),
    ("gated_delta", "bfloat16", "separate", {"kind": "finetune"}),
    ("kda", "float32", "joined", {"kind": "transfer"}),
    ("gated_delta", "float32", "joined", {"kind": "finetune"}, {"state_per": "kv_head", "key_width": 6}),
    ("kda", "float32", "separate", {"kind": "finetune"}, {"state_per": "kv_head", "key_width": 2}),
]


@pytest.mark.parametrize("case", STEPS_OF_EACH_KIND, ids=lambda case: f"{case[0]}-{len(case)}")
def test_the_planned_peak_is_what_the_allocator_hands_out_for_a_real_step(case):
    mixer, dtype, documents, stage, *options = case
    raw = {
        "base": "tiny",
        "keep": "every:3",
        "mixer": {"name": mixer} | dict(*options),
        "data": {"seq_len": 256, "documents": documents, "sources": [{"path": "python-stdlib"}]},
        "stages": [{"tokens": 1024, "batch_tokens": 1024, **stage}],
    }
    parsed, dtype = recipes.validate(raw, lookup=lookup), getattr(torch, dtype)
    planned = accounting.plan(parsed, dtype, "cpu").stages[0].memory().total
    assert planned == pytest.approx(handed_out(lambda: two_steps(parsed, dtype)), rel=0.1)


def two_steps(parsed: recipes.Recipe, dtype: torch.dtype) -> None:
    """Of real tensors; a row has two documents, or they are joined. The second step finds the moments."""
    (spec,), teacher = parsed.stages, None
    stage, computing = stage_of(spec), Computing(torch.device("cpu"), dtype, parsed.micro_rows(spec))
    student = SupraForCausalLM._from_config(accounting.student_config(parsed), dtype=torch.float32).train()
    optimizer = torch.optim.AdamW([p for _, p in prepare(student, stage, spec)], fused=True)
    if stage.teacher == "separate":
        config = checkpoint.read_config(hub.config_folder(hub.resolve(parsed.base)))
        teacher = SupraForCausalLM._from_config(config, dtype=dtype).eval().requires_grad_(False)
    ids, document = torch.randint(260, (parsed.rows(spec), 256)), 256 >> (parsed.data.documents != "joined")
    rows = Batch(ids, (torch.arange(256) % document).expand_as(ids), ids)
    begin(stage, student, rows, computing)
    for _ in range(2):
        for batch in computing.own(rows):
            autocast = computing.autocast()

            def backward(part: torch.Tensor, autocast=autocast) -> torch.Tensor:
                autocast.__exit__(None, None, None)
                part.backward()
                autocast.__enter__()
                return part.detach()

            with autocast:
                stage.loss(student, teacher, batch, backward)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def handed_out(run) -> int:
    """The allocator's highest sum while `run` runs, as PyTorch's profiler follows it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        before = torch.empty(1)
        run()
        del before
    waiting, sums = list(reversed(profile.profiler.kineto_results.experimental_event_tree())), []
    while waiting:
        event = waiting.pop()
        if event.tag.name == "Allocation":
            sums.append(event.extra_fields.total_allocated)
        waiting.extend(reversed(event.children))
    return max(sums) - sums[0]


def test_the_written_measurements_of_one_process_and_of_two_lie_within_a_tenth_of_the_plan(tmp_path):
    """Measured by benchmarks/memory.py, and planned here."""
    rows = json.loads((Path(__file__).parents[2] / "benchmarks/results/memory-cpu.json").read_text())["rows"]
    assert {row["processes"] for row in rows} == {1, 2}
    bench.write_inputs(tmp_path, bench.SHAPE)
    for row in rows:
        assert row["measured_mib"] == pytest.approx(bench.mib_planned(row["case"], tmp_path, "cpu"), rel=0.1), row


class Asking(Stage):
    """A stage of others: it asks for numbers of the data, and its loss has no logits."""

    def loss(self, student, teacher, batch, backward):
        hidden = student(input_ids=batch.input_ids, use_cache=False, objective=lambda hidden, head: hidden)
        scale = 2.0 if bool((batch.labels > 0).any()) else float(batch.labels.sum())
        return Loss(backward(hidden.float().square().sum() * scale), {})


def test_a_stage_of_others_is_planned_as_it_is(monkeypatch):
    monkeypatch.setattr("supra_cli.core.accounting.step.stage_of", lambda spec: Asking(None))
    asked = first()
    monkeypatch.undo()
    known = first()
    assert asked.memory().activations < known.memory().activations
    assert known.flops() - asked.flops() == 3 * 2 * 512 * 64 * FINETUNE["tokens"]


# -- models of few layers ---------------------------------------------------------------------------------------------

STEPS_OF_DEEP_MODELS = [
    ("supra", "every:4", 64, {"kind": "finetune", "batch_tokens": 1024, "micro_batch_tokens": 512}),
    ("window", "every:3", 256, {"kind": "distill", "batch_tokens": 1024, "activation_checkpointing": True}),
    ("t2r", "first:3", 64, {"kind": "transfer", "batch_tokens": 128, "micro_batch_tokens": 64}),
]


@pytest.mark.parametrize(("mixer", "keep", "seq_len", "stage"), STEPS_OF_DEEP_MODELS)
def test_a_deep_model_takes_what_its_first_layers_say(mixer, keep, seq_len, stage, monkeypatch):
    shape = {**SHAPE, "num_hidden_layers": 8, "tie_word_embeddings": True}
    teacher = {"teacher": "tiny"} if stage["kind"] == "distill" else {}
    given = {"tokens": 4096, **teacher, **stage}
    more = {"seq_len": seq_len, "mixer": mixer, "keep": keep, "model": shape, "tokenizer": {"vocab_size": 2048}}
    few = first(given, dtype=torch.bfloat16, **more).figures
    monkeypatch.setattr(layers, "FEW", 8)
    assert few == first(given, dtype=torch.bfloat16, **more).figures


def test_layers_with_options_of_their_own_are_planned_as_they_are(monkeypatch):
    shape = {**SHAPE, "num_hidden_layers": 8, "tie_word_embeddings": True}
    mixer = {"name": "gated_delta", "key_width": [1, 1, 1, 3, 1, 2, 1, 1]}
    given = {"kind": "finetune", "tokens": 4096, "batch_tokens": 512}
    few = first(given, model=shape, mixer=mixer)
    monkeypatch.setattr(layers, "FEW", 8)
    whole = first(given, model=shape, mixer=mixer)
    assert few.figures == whole.figures
    assert few.figures != first(given, model=shape, mixer={"name": "gated_delta"}).figures


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


def test_planning_a_7b_recipe_allocates_nothing():
    raw = {
        "base": "mistral-7b",
        "data": {"seq_len": 2048, "sources": [{"path": "python-stdlib"}]},
        "stages": [{"kind": "finetune", "tokens": 10_000_000, "batch_tokens": 65_536, "micro_batch_tokens": 2048}],
    }
    plan = accounting.plan(recipes.validate(raw, lookup=lookup))
    assert round(plan.model.new_parameters / 1e6, 1) == 570.6
    assert plan.memory_bytes() > 16 * plan.model.parameters
    # Forward and backward take about six FLOPs a weight and token.
    assert plan.flops() / 10_027_008 == pytest.approx(6 * plan.model.parameters, rel=0.25)
    # Half the time on twice the GPUs, whose memory is more than a half.
    assert plan.seconds("H200", 2) == plan.seconds("H200") / 2
    assert plan.memory_bytes() / 2 < plan.memory_bytes(2) < plan.memory_bytes()


def test_a_tied_model_counts_its_embedding_once():
    config = SupraConfig.from_base(LlamaConfig(**SHAPE | {"vocab_size": 512, "tie_word_embeddings": True}))
    untied = SupraConfig.from_base(LlamaConfig(**SHAPE | {"vocab_size": 512, "tie_word_embeddings": False}))
    assert accounting.measure(untied).parameters - accounting.measure(config).parameters == 512 * 64


# -- what fits --------------------------------------------------------------------------------------------------------

ONE_ROW = {"micro_batch_tokens": 64}
RECOMPUTED = {**ONE_ROW, "activation_checkpointing": True}
ORDER = [
    {},
    {"micro_batch_tokens": 1024},
    ONE_ROW,
    RECOMPUTED,
    {**RECOMPUTED, "optimizer": "adamw8bit"},
    {**RECOMPUTED, "optimizer": "adamw-offload"},
]


def test_the_nearest_setting_is_the_first_that_fits_in_the_order_of_harm(monkeypatch, tmp_path):
    """Nothing, fewer rows at a time, recomputing, 8-bit moments, the optimizer's state in CPU memory."""
    file = tmp_path / "r.toml"
    file.write_text(recipes.dumps(recipe()), encoding="utf-8")
    plan = accounting.plan(recipe())
    (stage,) = plan.stages
    sizes = [stage.memory(1, stage.spec.model_copy(update=changed)).total for changed in ORDER]
    assert sizes == sorted(sizes, reverse=True)
    for changed, size in zip(ORDER, sizes, strict=True):
        monkeypatch.setitem(accounting.GPUS, "small", ((size + 1) / accounting.ROOM / 1e9, 1))
        found = accounting.nearest(plan, "small")
        assert found.gpus == 1
        keys = {change.split(".")[2].split("=")[0] for change in found.changes}
        assert keys <= set(changed)
        assert ("optimizer" in keys) == ("optimizer" in changed)
        mended = accounting.plan(recipes.load(file, found.changes, lookup=lookup))
        assert mended.memory_bytes() == pytest.approx(found.memory_bytes, rel=0.02)


def test_where_one_gpu_is_too_small_more_of_them_are_and_the_smallest_fits_none(monkeypatch):
    plan = accounting.plan(recipe(model={**SHAPE, "num_hidden_layers": 32}))
    (stage,) = plan.stages
    least = stage.memory(2, stage.spec.model_copy(update=ORDER[-1])).total
    for room, gpus in ((least + 1, 2), (1000, None)):
        monkeypatch.setitem(accounting.GPUS, "small", (room / accounting.ROOM / 1e9, 1))
        found = accounting.nearest(plan, "small")
        assert (found and found.gpus) == gpus


def test_the_command_of_a_setting_names_nodes_processes_and_changes():
    plan = accounting.plan(recipe({**FINETUNE, "kind": "transfer"}, {**FINETUNE, "optimizer": "adamw8bit"}))
    assert [plan.fits("H200", gpus) for gpus in (1, 2)] == [True, False]
    commands = {gpus: accounting.nearest(plan, "H200", (gpus,)).command("uptrain -r r") for gpus in (1, 4, 12, 16)}
    assert "--nnodes 2" in commands[12]
    assert "--nproc-per-node 6" in commands.pop(12)
    assert commands == {
        1: "supra uptrain -r r",
        4: "torchrun --nproc-per-node 4 -m supra_cli uptrain -r r --set stages.1.optimizer=adamw",
        16: "torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint HOST:29500 --nproc-per-node 8 -m supra_cli "
        "uptrain -r r --set stages.1.optimizer=adamw",
    }
