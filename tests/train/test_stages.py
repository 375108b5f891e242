"""The losses against formulas in float64, and which parameters move."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import EXPERTS, VOCABULARY, softmax_heads, tiny_model
from torch import Tensor, nn

from supra_cli.core import checkpoint
from supra_cli.core import recipe as recipes
from supra_cli.core.archs import archs
from supra_cli.core.data.packing import IGNORED, Batch
from supra_cli.core.errors import SupraError, UsageError
from supra_cli.core.mixers import mixers
from supra_cli.core.stages import Stage, chunked, stages
from supra_cli.core.swap import mixer_names
from supra_cli.core.train.build import prepare, untie
from supra_cli.core.train.optimizer import adamw, lr_factor, matrices
from supra_cli.core.train.step import Computing, begin, take


@pytest.fixture(scope="module")
def student(base: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("student") / "supra"
    checkpoint.convert(base, folder, mixer="supra", options={}, keep="none", seed=0)
    return checkpoint.load(folder)


@pytest.fixture
def short(batch: Batch) -> Batch:
    """The batch in the vocabulary of `tiny_model`, for a stage that reads no labels but where they are."""
    return batch._replace(input_ids=batch.input_ids % VOCABULARY)


@pytest.fixture
def batch() -> Batch:
    torch.manual_seed(1)
    ids = torch.randint(3, 300, (2, 24))
    positions = torch.stack([torch.arange(24), torch.cat([torch.arange(9), torch.arange(15)])])
    labels = torch.cat([ids[:, 1:], torch.full((2, 1), IGNORED)], dim=1)
    labels[1, 8] = IGNORED
    return Batch(ids, positions, labels)


def keep(part: Tensor) -> Tensor:
    """In the place of a backward pass: the part with its graph."""
    return part


def propagate(part: Tensor) -> Tensor:
    part.backward(torch.ones_like(part))
    return part.detach()


ON_CPU = Computing(torch.device("cpu"), torch.float32, 64)


def start(stage: Stage, student: nn.Module, *parts: Batch) -> None:
    begin(stage, student, Batch(*map(torch.cat, zip(*parts, strict=True))), ON_CPU)


def make(kind: str, **options):
    stage = stages.get(kind)
    return stage(stage.Options(**options))


def spec(**settings) -> recipes.Stage:
    return recipes.Stage(kind="finetune", tokens=1000, **settings)


@pytest.mark.parametrize("pieces", [1 << 25, 7 * 50], ids=["whole", "in pieces"])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_cross_entropy_is_its_formula_value_and_gradient(
    pieces: int, z_loss: float, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "PIECE_NUMBERS", pieces)
    torch.manual_seed(0)
    hidden = torch.randn(2, 13, 8).to(device).requires_grad_()
    weight = torch.randn(50, 8).to(device).requires_grad_()
    labels = torch.randint(0, 50, (2, 13)).to(device)
    labels[0, 3:5] = IGNORED
    total, nll = chunked.cross_entropy(hidden, lambda h: h @ weight.T, labels, 50, z_loss)
    total.backward()

    h, w = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    wanted, wanted_nll = 0.0, 0.0
    for row, column in (labels != IGNORED).nonzero().tolist():
        logits = w @ h[row, column]
        log_z = logits.exp().sum().log()
        surprise = log_z - logits[labels[row, column]]
        wanted_nll = wanted_nll + surprise
        wanted = wanted + surprise + z_loss * log_z**2
    wanted.backward()
    for got, exact in ((total, wanted), (nll, wanted_nll), (hidden.grad, h.grad), (weight.grad, w.grad)):
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pieces", [1 << 25, 7 * 50], ids=["whole", "in pieces"])
def test_divergence_is_its_formula_value_and_gradient(
    pieces: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "PIECE_NUMBERS", pieces)
    torch.manual_seed(0)
    hidden, target = torch.randn(2, 9, 8).to(device).requires_grad_(), torch.randn(2, 9, 6).to(device)
    weight, target_weight = torch.randn(50, 8).to(device), torch.randn(50, 6).to(device)
    labels = torch.randint(0, 50, (2, 9)).to(device)
    labels[1, 4] = IGNORED
    total, nll = chunked.divergence(hidden, lambda h: h @ weight.T, target, lambda h: h @ target_weight.T, labels, 50)
    total.backward()

    h = hidden.detach().double().requires_grad_()
    p = (target.double() @ target_weight.double().T).softmax(-1)
    q = (h @ weight.double().T).softmax(-1)
    counted = labels != IGNORED
    wanted = (p * (p.log() - q.log())).sum(-1)[counted].sum()
    wanted.backward()
    torch.testing.assert_close(total.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), h.grad, rtol=1e-5, atol=1e-5)
    wanted_nll = -q.log().gather(-1, labels.clamp(min=0)[..., None])[..., 0][counted].sum()
    torch.testing.assert_close(nll.double(), wanted_nll.detach(), rtol=1e-5, atol=1e-5)


def test_no_piece_of_logits_is_larger_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "PIECE_NUMBERS", 300)
    sizes: list[int] = []

    def head(hidden: Tensor) -> Tensor:
        logits = hidden @ torch.ones(8, 50)
        sizes.append(logits.numel())
        return logits

    hidden = torch.randn(3, 21, 8, requires_grad=True)
    chunked.cross_entropy(hidden, head, torch.randint(0, 50, (3, 21)), 50)[0].backward()
    chunked.divergence(hidden, head, hidden.detach(), head, torch.randint(0, 50, (3, 21)), 50)[0].backward()
    assert max(sizes) <= 300


def test_distilling_from_oneself_costs_nothing(student, batch: Batch) -> None:
    loss = make("distill").loss(student, student, batch, keep)
    assert abs(loss.sum.item()) < 1e-3
    assert float(loss.metrics["nll"]) > 0


def test_finetune_is_the_mean_surprise_of_the_model(student, batch: Batch) -> None:
    loss = make("finetune").loss(student, None, batch, keep)
    logits = student(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    wanted = F.cross_entropy(logits.double().flatten(0, 1), batch.labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss.sum.double(), wanted, rtol=1e-5, atol=1e-4)


def test_transfer_compares_every_layer_on_the_teachers_own_input(student, batch: Batch) -> None:
    """Recomputed from the base model's hidden states, which transfer must reproduce layer by layer."""
    from transformers import LlamaForCausalLM

    layers = [layer for _, layer in student.swapped_layers()]
    teacher = LlamaForCausalLM(student.config.plain())
    teacher.load_state_dict({k: v for k, v in student.state_dict().items() if k not in mixer_names(student)})
    inputs: list[Tensor] = []
    for block in teacher.model.layers:
        block.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: inputs.append(kwargs["hidden_states"]), with_kwargs=True
        )
    row = Batch(*(tensor[:1] for tensor in batch))
    teacher(input_ids=row.input_ids, use_cache=False)
    tables = teacher.model.rotary_emb(inputs[0], row.position_ids)

    stage = make("transfer")
    start(stage, student, row)
    loss = stage.loss(student, None, row, propagate)
    for number, (layer, hidden) in enumerate(zip(layers, inputs, strict=True)):
        o, _ = layer.heads(hidden, position_embeddings=tables)
        heads = softmax_heads(layer, hidden, position_embeddings=tables)
        o, taught = o[:, :-1], F.layer_norm(heads, heads.shape[-1:], eps=1e-5)[:, :-1]  # the last predicts nothing
        wanted = 23 * (o - taught).square().sum() / taught.square().sum()
        torch.testing.assert_close(loss.metrics[f"layer.{number}"], wanted.detach(), rtol=1e-4, atol=1e-5)
    assert all("forward" not in vars(layer) for layer in layers)


def test_transfer_divides_by_what_the_first_step_had(student, batch: Batch) -> None:
    """A later batch with a teacher twice as loud costs what it costs, not what its own mean would make of it."""
    stage, other = make("transfer"), Batch(batch.input_ids.flip(1), batch.position_ids, batch.labels)
    start(stage, student, batch)
    constants = dict(stage.constants)
    loss = stage.loss(student, None, other, propagate)
    assert all(value.equal(constants[name]) for name, value in stage.constants.items())
    own = make("transfer")
    start(own, student, other)
    for number in range(2):
        ratio = own.constants[f"{number}.heads"] / constants[f"{number}.heads"]
        mine = own.loss(student, None, other, propagate).metrics[f"layer.{number}"]
        torch.testing.assert_close(loss.metrics[f"layer.{number}"], mine * ratio)
    student.zero_grad(set_to_none=True)


def test_transfer_begins_with_the_gains_of_least_squares(base: Path, tmp_path: Path, batch: Batch) -> None:
    """At the minimum of Σ (gain · n − taught)² over one head, its derivative Σ (gain · n − taught) · n is zero."""
    checkpoint.convert(base, tmp_path / "gained", mixer="supra", options={"gain": "head"}, keep="none", seed=0)
    student = checkpoint.load(tmp_path / "gained")
    others = {name: value.clone() for name, value in student.state_dict().items() if not name.endswith("gain")}
    start(make("transfer"), student, *(Batch(*(part[row : row + 1] for part in batch)) for row in (0, 1)))
    assert all(value.equal(student.state_dict()[name]) for name, value in others.items())

    seen: list[tuple[Tensor, Tensor]] = []
    for _, layer in student.swapped_layers():

        def spy(hidden_states, layer=layer, **call):
            taught = softmax_heads(layer, hidden_states, **call)
            seen.append((layer.heads(hidden_states, **call)[0], taught))
            return layer.arch.out(layer, taught.flatten(-2)), None

        layer.forward = spy
    with torch.no_grad():
        student(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    scored = (batch.labels != IGNORED)[..., None, None]
    for got, taught in seen:
        got, taught = got * scored, taught * scored
        slope = ((got - taught) * got).sum((0, 1, 3))
        assert (slope.abs() <= 1e-4 * got.square().sum((0, 1, 3))).all()
        assert not torch.allclose(got, taught)


def test_transfer_moves_mixers_only_and_no_gradient_crosses_layers(student, batch: Batch) -> None:
    stage = make("transfer")
    chosen = prepare(student, stage, spec())
    assert {name for name, _ in chosen} == mixer_names(student)
    start(stage, student, batch)
    student.zero_grad(set_to_none=True)
    stage.loss(student, None, batch, propagate)
    before = {name: parameter.grad.clone() for name, parameter in chosen}
    with torch.no_grad():  # another first mixer: the second layer's gradient must not notice
        for name, parameter in chosen:
            if ".layers.0." in name:
                parameter.add_(1.0)
    student.zero_grad(set_to_none=True)
    stage.loss(student, None, batch, propagate)
    for name, parameter in chosen:
        same = torch.equal(parameter.grad, before[name])
        assert same == (".layers.1." in name), name
    with torch.no_grad():
        for name, parameter in chosen:
            if ".layers.0." in name:
                parameter.sub_(1.0)
    student.zero_grad(set_to_none=True)


@pytest.mark.parametrize("mixer", ["gated", "supra", "t2r"])
def test_the_graph_of_a_layer_is_gone_before_the_next_ones_is_made(mixer: str, short: Batch) -> None:
    """The most numbers that are saved for a backward pass at once, of 2 layers and of 8."""
    most = {}
    for layers in (2, 8):
        model = tiny_model("llama", mixer, num_hidden_layers=layers).train()
        stage, alive, peak = make("transfer"), 0, 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal alive, peak
            held, size = tensor.detach().clone(), tensor.numel()
            alive += size
            peak = max(peak, alive)

            def gone() -> None:
                nonlocal alive
                alive -= size

            weakref.finalize(held, gone)
            return held

        prepare(model, stage, spec())
        start(stage, model, short)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held):
            stage.loss(model, None, short, propagate)
        assert alive == 0
        most[layers] = peak
    assert most[8] == most[2] > 0


def test_transfer_projects_once_a_layer(student, batch: Batch) -> None:
    stage, calls = make("transfer"), []
    start(stage, student, batch)
    hooks = [
        getattr(layer, name).register_forward_hook(lambda module, *_: calls.append(module))
        for _, layer in student.swapped_layers()
        for name in ("q_proj", "k_proj", "v_proj")
    ]
    stage.loss(student, None, batch, propagate)
    for hook in hooks:
        hook.remove()
    assert len(calls) == len(set(calls)) == len(hooks)


def test_transfers_teacher_drops_nothing_out_and_mixers_go_on_training(short: Batch) -> None:
    """As where a base has dropout: its attention and its blocks drop most of what they hold."""
    model = tiny_model("llama", "supra").train()
    stage, modes = make("transfer"), []

    class Dropping(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.inner(x), 0.9, self.training)

    for block in model.model.layers:
        block.mlp, block.self_attn.v_proj = Dropping(block.mlp), Dropping(block.self_attn.v_proj)
        block.self_attn.mixer.register_forward_hook(lambda module, *_: modes.append(module.training))
    start(stage, model, short)
    losses = [stage.loss(model, None, short, propagate).sum for _ in range(2)]
    assert losses[0].equal(losses[1])
    assert modes == [True] * 9
    assert all(module.training for module in model.modules())


def test_the_head_learns_under_autocast(device: str) -> None:
    """PyTorch once kept a cast copy of the head's weight that was made without gradient."""
    model = tiny_model("llama", "supra").to(device).train()
    ids = torch.randint(3, 97, (2, 12))
    batch = Batch(ids, torch.arange(12).expand(2, 12), ids)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    grads = []
    model.lm_head.weight.register_hook(grads.append)
    take(make("finetune"), model, None, optimizer, batch, Computing(torch.device(device), torch.bfloat16, 2), 1.0)
    assert grads[0].abs().sum() > 0


def test_a_trained_parameter_that_the_loss_does_not_reach_is_named(short: Batch) -> None:
    model = tiny_model("llama", "supra")
    mixer = next(model.swapped_layers())[1].mixer
    mixer.idle = nn.Linear(3, 3)
    stage = make("transfer")
    optimizer = adamw(model, prepare(model, stage, spec()), spec())
    start(stage, model, short)
    with pytest.raises(SupraError, match=r"does not depend on model.layers.0.self_attn.mixer.idle.weight"):
        take(stage, model, None, optimizer, short, ON_CPU, 1.0)


def test_a_transfer_whose_first_step_has_nothing_to_measure_is_a_sentence(student) -> None:
    ones = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(SupraError, match="two tokens of one document"):
        start(make("transfer"), student, Batch(ones, ones, torch.full_like(ones, IGNORED)))


def test_a_stage_with_nothing_to_train_is_refused(base: Path) -> None:
    plain = checkpoint.load(base)
    with pytest.raises(UsageError, match="nothing to train"):
        prepare(plain, make("transfer"), spec())


def test_mixers_alone_can_be_trained_in_any_stage(student) -> None:
    names = [name for name, _ in prepare(student, make("finetune"), spec(train="mixer"))]
    assert names
    assert set(names) == mixer_names(student)
    assert len(prepare(student, make("finetune"), spec())) > len(names)


def test_untied_weights_start_equal_and_part(base: Path) -> None:
    model = checkpoint.load(base)
    untie(model)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert head is not embedding
    assert torch.equal(head, embedding)
    assert not model.config.tie_word_embeddings


def test_groups_have_their_own_rates(student) -> None:
    chosen = prepare(student, make("finetune"), spec())
    optimizer = adamw(student, chosen, spec(lr=1e-4, mixer_lr=1e-2, weight_decay=0.1))
    for group in optimizer.param_groups:
        new = {name in mixer_names(student) for name in group["names"]}
        assert len(new) == 1
        assert group["peak_lr"] == (1e-2 if new.pop() else 1e-4)
        decaying = {name in matrices(student) for name in group["names"]}
        assert decaying == {group["weight_decay"] > 0}


DECAYING = {
    "gated": [({"output_gate": True}, {"phi_q.weight", "phi_k.weight", "decay.weight", "gate.weight"})],
    "gated_delta": [
        ({"output_gate": True}, {"phi_q.weight", "phi_k.weight", "write.weight", "decay.weight", "gate.weight"})
    ],
    "hedgehog": [({}, {"phi_q.weight", "phi_k.weight"})],
    "kda": [
        (
            {"output_gate": True},
            {"phi_q.weight", "phi_k.weight", "write.weight", "decay.0.weight", "decay.1.weight", "gate.weight"},
        )
    ],
    "lolcats": [
        ({"branch": "gated"}, {f"recurrence.{name}.weight" for name in ("phi_q", "phi_k", "decay")}),
        (
            {"branch": "gated_delta"},
            {
                "recurrence.mix.weight",
                *(f"recurrence.delta.{name}.weight" for name in ("phi_q", "phi_k", "write", "decay")),
            },
        ),
    ],
    "mamba2": [({}, {"step.weight", "gate.weight"})],
    "retention": [({"gain": "head"}, set())],
    "softmax": [({}, set())],
    "supra": [
        ({"gain": "head", "qk_norm": True, "map": kind}, {"E.weight", "E_kv.weight"}) for kind in ("dense", "head")
    ],
    "t2r": [({}, {"phi.weight"})],
    "window": [({}, set())],
}
"""Of every mixer, with the options that give it most parameters; none of them gains, biases, norms."""


@pytest.mark.parametrize("mixer", list(mixers))
def test_weight_decay_is_for_the_matrices_of_mixers(mixer: str) -> None:
    for options, decaying in DECAYING[mixer]:
        model = tiny_model("llama", mixer, options=options)
        new = mixer_names(model)
        assert {name.partition(".mixer.")[2] for name in matrices(model) & new} == decaying
        own = {
            name.partition(".")[2].replace(".recurrence", "").replace(".delta", "") for name in new - matrices(model)
        }
        assert own <= {
            f"layers.{n}.self_attn.mixer.{rest}"
            for n in range(3)
            for rest in (
                *("norm.gain", "q_norm.weight", "k_norm.weight", "E.bias", "E_kv.bias", "mix.bias"),
                *("phi.bias", "phi_q.bias", "phi_k.bias", "decay.bias", "decay.1.bias", "write.bias", "A_log", "gain"),
                *("log_f", "mass", "step.bias", "D", *(f"convolutions.{part}.weight" for part in range(3))),
            )
        }


@pytest.mark.parametrize("base", list(archs))
def test_weight_decay_is_for_the_matrices_of_bases(base: str) -> None:
    """In a base every matrix has two dimensions, or with experts three, and everything else one."""
    model = tiny_model(base, "softmax", tie_word_embeddings=False)
    two = {name for name, parameter in model.named_parameters() if parameter.ndim >= 2}
    assert matrices(model) & dict(model.named_parameters()).keys() == two
    assert {parameter.ndim for parameter in model.parameters()} == ({1, 2, 3} if base in EXPERTS else {1, 2})


def test_a_part_of_a_base_that_is_called_mixer_is_none_of_ours() -> None:
    """As in Mamba and its like, whose blocks keep their own work at `.mixer`."""
    model = tiny_model("llama", "supra", keep="0")
    model.model.layers[0].mixer = nn.Linear(4, 4)
    names = mixer_names(model)
    assert "model.layers.0.mixer.weight" not in names
    assert {name.split(".")[2] for name in names} == {"1", "2"}
    assert names == {name for name, _ in prepare(model, make("transfer"), spec())}


@pytest.mark.parametrize(
    ("schedule", "step", "wanted"),
    [
        ("cosine", 0, 0.1),
        ("cosine", 9, 1.0),
        ("cosine", 10, 1.0),
        ("cosine", 109, 0.2),
        ("cosine", 59, 0.2 + 0.8 * (1 + torch.cos(torch.tensor(torch.pi * 49 / 99)).item()) / 2),
        ("linear", 109, 0.2),
        ("linear", 43, 1 - 0.8 / 3),
        ("constant", 109, 1.0),
        ("cosine", 500, 0.2),
    ],
)
def test_the_rate_follows_its_schedule(schedule: str, step: int, wanted: float) -> None:
    stage = spec(schedule=schedule, warmup_steps=10, final_lr_fraction=0.2)
    assert lr_factor(step, 110, stage) == pytest.approx(wanted, abs=1e-6)


def test_one_adamw_step_is_its_formula(device: str) -> None:
    parameter = nn.Parameter(torch.tensor([[1.0, -2.0]], device=device))
    parameter.grad = torch.tensor([[0.5, 0.25]], device=device)
    layer = nn.Linear(2, 1, bias=False)
    layer.weight = parameter
    optimizer = adamw(layer, layer.named_parameters(), spec(lr=0.1, weight_decay=0.5))
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"]
    optimizer.step()
    wanted = torch.tensor([[1.0, -2.0]]) * (1 - 0.1 * 0.5) - 0.1 * torch.tensor([[1.0, 1.0]])
    torch.testing.assert_close(parameter.detach().cpu(), wanted, rtol=1e-5, atol=1e-6)
