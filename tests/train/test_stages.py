"""The losses against formulas in float64, and which parameters move."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supra_cli.core import checkpoint
from supra_cli.core import recipe as recipes
from supra_cli.core.data.packing import IGNORED, Batch
from supra_cli.core.errors import UsageError
from supra_cli.core.stages import chunked, stages
from supra_cli.core.train.optimizer import adamw, lr_factor
from supra_cli.core.train.prepare import select, untie


@pytest.fixture(scope="module")
def student(base: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("student") / "supra"
    checkpoint.convert(base, folder, mixer="supra", options={}, keep="none", seed=0)
    return checkpoint.load(folder)


@pytest.fixture
def batch() -> Batch:
    torch.manual_seed(1)
    ids = torch.randint(3, 300, (2, 24))
    positions = torch.stack([torch.arange(24), torch.cat([torch.arange(9), torch.arange(15)])])
    labels = torch.cat([ids[:, 1:], torch.full((2, 1), IGNORED)], dim=1)
    labels[1, 8] = IGNORED
    return Batch(ids, positions, labels)


def make(kind: str, **options):
    stage = stages.get(kind)
    return stage(stage.Options(**options))


def spec(**settings) -> recipes.Stage:
    return recipes.Stage(kind="finetune", tokens=1000, **settings)


@pytest.mark.parametrize("pieces", [1 << 25, 7 * 50], ids=["whole", "in pieces"])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_cross_entropy_is_its_formula_value_and_gradient(
    pieces: int, z_loss: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "PIECE_NUMBERS", pieces)
    torch.manual_seed(0)
    hidden = torch.randn(2, 13, 8, requires_grad=True)
    weight = torch.randn(50, 8, requires_grad=True)
    labels = torch.randint(0, 50, (2, 13))
    labels[0, 3:5] = IGNORED
    total, nll = chunked.cross_entropy(hidden, lambda h: h @ weight.T, labels, z_loss)
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
def test_divergence_is_its_formula_value_and_gradient(pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "PIECE_NUMBERS", pieces)
    torch.manual_seed(0)
    hidden, target = torch.randn(2, 9, 8, requires_grad=True), torch.randn(2, 9, 6)
    weight, target_weight = torch.randn(50, 8), torch.randn(50, 6)
    labels = torch.randint(0, 50, (2, 9))
    labels[1, 4] = IGNORED
    total, nll = chunked.divergence(hidden, lambda h: h @ weight.T, target, lambda h: h @ target_weight.T, labels)
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
    chunked.cross_entropy(hidden, head, torch.randint(0, 50, (3, 21)))[0].backward()
    chunked.divergence(hidden, head, hidden.detach(), head, torch.randint(0, 50, (3, 21)))[0].backward()
    assert max(sizes) <= 300


def test_distilling_from_oneself_costs_nothing(student, batch: Batch) -> None:
    loss = make("distill").loss(student, student, batch)
    assert abs(loss.sum.item()) < 1e-3
    assert float(loss.metrics["nll"]) > 0


def test_finetune_is_the_mean_surprise_of_the_model(student, batch: Batch) -> None:
    loss = make("finetune").loss(student, None, batch)
    logits = student(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    wanted = F.cross_entropy(logits.double().flatten(0, 1), batch.labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss.sum.double(), wanted, rtol=1e-5, atol=1e-4)


def test_transfer_compares_every_layer_on_the_teachers_own_input(student, batch: Batch) -> None:
    """Recomputed from the base model's hidden states, which transfer must reproduce layer by layer."""
    from transformers import LlamaForCausalLM

    layers = [layer for _, layer in student.swapped_layers()]
    teacher = LlamaForCausalLM(student.config.plain())
    teacher.load_state_dict({k: v for k, v in student.state_dict().items() if ".mixer." not in k})
    inputs: list[Tensor] = []
    for block in teacher.model.layers:
        block.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: inputs.append(kwargs["hidden_states"]), with_kwargs=True
        )
    row = Batch(*(tensor[:1] for tensor in batch))
    teacher(input_ids=row.input_ids, use_cache=False)
    tables = teacher.model.rotary_emb(inputs[0], row.position_ids)

    stage = make("transfer")
    with stage.attached(student):
        loss = stage.loss(student, None, row)
    for number, (layer, hidden) in enumerate(zip(layers, inputs, strict=True)):
        o, _ = layer.heads(hidden, tables)
        heads = layer.softmax_heads(hidden, tables)
        taught = F.layer_norm(heads, heads.shape[-1:], eps=1e-5)
        wanted = (o - taught).square().sum() / taught.square().sum()
        torch.testing.assert_close(loss.metrics[f"layer.{number}"] / 24, wanted, rtol=1e-4, atol=1e-6)
    assert all("forward" not in vars(layer) for layer in layers)


def test_transfer_begins_with_the_gains_of_least_squares(base: Path, tmp_path: Path, batch: Batch) -> None:
    """At the minimum of Σ (gain · n − taught)² over one head, its derivative Σ (gain · n − taught) · n is zero."""
    checkpoint.convert(base, tmp_path / "gained", mixer="supra", options={"gain": "head"}, keep="none", seed=0)
    student = checkpoint.load(tmp_path / "gained")
    others = {name: value.clone() for name, value in student.state_dict().items() if not name.endswith("gain")}
    with torch.no_grad():
        make("transfer").begin(student, batch)
    assert all(value.equal(student.state_dict()[name]) for name, value in others.items())

    seen: list[tuple[Tensor, Tensor]] = []
    for _, layer in student.swapped_layers():

        def spy(hidden_states, position_embeddings=None, layout=None, layer=layer, **kwargs):
            taught = layer.softmax_heads(hidden_states, position_embeddings, layout)
            seen.append((layer.heads(hidden_states, position_embeddings, layout)[0], taught))
            return layer.arch.out(layer, taught.flatten(-2)), None

        layer.forward = spy
    with torch.no_grad():
        student(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    for got, taught in seen:
        slope = ((got - taught) * got).sum((0, 1, 3))
        assert (slope.abs() <= 1e-4 * got.square().sum((0, 1, 3))).all()
        assert not torch.allclose(got, taught)


def test_transfer_moves_mixers_only_and_no_gradient_crosses_layers(student, batch: Batch) -> None:
    stage = make("transfer")
    chosen = select(student, stage, spec())
    assert all(".mixer." in name for name, _ in chosen)
    student.zero_grad(set_to_none=True)
    with stage.attached(student):
        loss = stage.loss(student, None, batch)
    loss.sum.backward()
    before = {name: parameter.grad.clone() for name, parameter in chosen}
    with torch.no_grad():  # another first mixer: the second layer's gradient must not notice
        for name, parameter in chosen:
            if ".layers.0." in name:
                parameter.add_(1.0)
    student.zero_grad(set_to_none=True)
    with stage.attached(student):
        stage.loss(student, None, batch).sum.backward()
    for name, parameter in chosen:
        same = torch.equal(parameter.grad, before[name])
        assert same == (".layers.1." in name), name
    with torch.no_grad():
        for name, parameter in chosen:
            if ".layers.0." in name:
                parameter.sub_(1.0)


def test_a_stage_with_nothing_to_train_is_refused(base: Path) -> None:
    plain = checkpoint.load(base)
    with pytest.raises(UsageError, match="nothing to train"):
        select(plain, make("transfer"), spec())


def test_mixers_alone_can_be_trained_in_any_stage(student) -> None:
    names = [name for name, _ in select(student, make("finetune"), spec(train="mixer"))]
    assert names
    assert all(".mixer." in name for name in names)
    assert len(select(student, make("finetune"), spec())) > len(names)


def test_untied_weights_start_equal_and_part(base: Path) -> None:
    model = checkpoint.load(base)
    untie(model)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert head is not embedding
    assert torch.equal(head, embedding)
    assert not model.config.tie_word_embeddings


def test_groups_have_their_own_rates_and_vectors_do_not_decay(student) -> None:
    optimizer = adamw(select(student, make("finetune"), spec()), spec(lr=1e-4, mixer_lr=1e-2, weight_decay=0.1))
    for group in optimizer.param_groups:
        new = {".mixer." in name for name in group["names"]}
        assert len(new) == 1
        assert group["peak_lr"] == (1e-2 if new.pop() else 1e-4)
        assert all((parameter.ndim >= 2) == (group["weight_decay"] > 0) for parameter in group["params"])


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


def test_one_adamw_step_is_its_formula(student) -> None:
    parameter = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    parameter.grad = torch.tensor([[0.5, 0.25]])
    optimizer = adamw([("layer.weight", parameter)], spec(lr=0.1, weight_decay=0.5))
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"]
    optimizer.step()
    wanted = torch.tensor([[1.0, -2.0]]) * (1 - 0.1 * 0.5) - 0.1 * torch.tensor([[1.0, 1.0]])
    torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-5, atol=1e-6)
