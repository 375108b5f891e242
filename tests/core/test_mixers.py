"""Each mixer against its paper: the quadratic formula in float64, written out for one document."""

from __future__ import annotations

import dataclasses
import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from supra_cli.core.errors import UsageError
from supra_cli.core.layout import HeadSpec, Layout
from supra_cli.core.mixers import mixers, parse_options, parts, softmax
from supra_cli.core.mixers.parts import slopes

# float64 throughout but for constants and states in fp32.
CLOSE = {"atol": 1e-5, "rtol": 1e-4}
T, K, V = 37, 6, 5


def build(name, heads=4, kv_heads=2, **options):
    torch.manual_seed(0)
    spec = HeadSpec(heads, kv_heads, head_dim=K, v_dim=V, model_dim=24, layer=0, scale=K**-0.5)
    mixer = mixers.get(name)(spec, parse_options(name, options))
    mixer.reset_parameters()
    return mixer.double()


def inputs(heads=4, kv_heads=2):
    shapes = (2, T, heads, K), (2, T, kv_heads, K), (2, T, kv_heads, V), (2, T, 24)
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def rope(x):
    """Rotation of the halves of the last dimension by the angle position / (1 + index)."""
    angle = torch.arange(x.shape[1])[:, None, None] / (1 + torch.arange(x.shape[-1] // 2))
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * angle.cos() - x2 * angle.sin(), x2 * angle.cos() + x1 * angle.sin()), -1)


def repeated(x, heads=4):
    return x.repeat_interleave(heads // x.shape[2], dim=2)


def causal(scores):
    return scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), 0)


def steps_back():
    """i - j, negative in the future."""
    return (torch.arange(T)[:, None] - torch.arange(T)).double()


def group_norm(o):
    return (o - o.mean(-1, keepdim=True)) / (o.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()


@pytest.mark.parametrize(
    "made",
    [lambda: nn.Linear(625, 1001), lambda: nn.Linear(625, 1001, bias=False), lambda: parts.HeadMap(7, 625, 143)],
)
def test_a_map_is_drawn_as_pytorch_draws_its_own(made):
    """Of so many numbers that they come in several pieces, the last of them odd."""
    torch.manual_seed(0)
    drawn = made()
    state = [parameter.fill_(torch.nan) for parameter in map(torch.detach, drawn.parameters())]
    parts.draw_map(drawn)
    for values in state:
        scaled = values.flatten() * 625**0.5
        assert scaled.abs().max() <= 1
        # Standard errors of a uniform's mean, variance and covariance of neighbours, times five.
        error = 5 / len(scaled) ** 0.5
        assert abs(scaled.mean()) < error * 3**-0.5
        assert abs(scaled.square().mean() - 1 / 3) < error * (4 / 45) ** 0.5
        assert abs((scaled[1:] * scaled[:-1]).mean()) < error / 3
        counts = torch.histc(scaled, 10, -1, 1)
        assert (counts - len(scaled) / 10).abs().max() < 5 * (len(scaled) * 0.09) ** 0.5


def alibi(heads):
    """γ_h = exp(-2^{-8(h+1)/H}) for a power of two."""
    return torch.tensor([math.exp(-(2 ** (-8 * (h + 1) / heads))) for h in range(heads)], dtype=torch.float64)


def hedgehog(heads, learned):
    heads = torch.einsum("bthk,hfk->bthf", heads, learned.weight) + learned.bias
    return torch.cat((heads.softmax(-1), (-heads).softmax(-1)), dim=-1)


def moved(mixer, by=0.3):
    for parameter in mixer.parameters():
        parameter.add_(torch.randn_like(parameter) * by)
    return mixer


def kept_of(gamma, late=0):
    """Π γ_t over j + late < t ≤ i, [2, H, T, T], of γ [2, T, H]."""
    kept = torch.zeros(2, 4, T, T, dtype=torch.float64)
    for i in range(T):
        for j in range(i + 1):
            kept[:, :, i, j] = gamma[:, j + 1 + late : i + 1].prod(dim=1)
    return kept


def decayed_sum(q, k, v, gamma, scale):
    weights = causal(torch.einsum("bihd,bjhd->bhij", q, k) * scale) * gamma[:, None, None] ** steps_back().clamp(min=0)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_supra_is_the_papers_formula(kv_heads):
    mixer = build("supra", kv_heads=kv_heads)
    q, k, v, x = inputs(kv_heads=kv_heads)
    o, state = mixer(q, k, v, x, rope, None, None)
    for_k = mixer.E if kv_heads == 4 else mixer.E_kv
    assert (mixer.E_kv is None) == (kv_heads == 4)
    q = rope((q.flatten(2) @ mixer.E.weight.T + mixer.E.bias).relu().view(q.shape))
    k = repeated(rope((k.flatten(2) @ for_k.weight.T + for_k.bias).relu().view(k.shape)))
    assert_close(o, group_norm(decayed_sum(q, k, repeated(v), alibi(4), K**-0.5)), **CLOSE)
    remaining = alibi(4) ** torch.arange(T - 1, -1, -1)[:, None]
    final = torch.einsum("th,bthk,bthv->bhkv", remaining, k, repeated(v))
    assert_close(state.S.double(), final, **CLOSE)


@torch.no_grad()
def test_supra_with_a_map_a_head_and_a_gain():
    mixer = build("supra", map="head", gain="head", slopes="retnet")
    mixer.norm.gain.uniform_(0.5, 2)
    q, k, v, x = inputs()
    o, _ = mixer(q, k, v, x, rope, None, None)
    q = rope((torch.einsum("bthk,hfk->bthf", q, mixer.E.weight) + mixer.E.bias).relu())
    k = rope((torch.einsum("bthk,hfk->bthf", k, mixer.E_kv.weight) + mixer.E_kv.bias).relu())
    gamma = 1 - 2.0 ** (-5 - torch.arange(4, dtype=torch.float64))
    expected = group_norm(decayed_sum(q, repeated(k), repeated(v), gamma, K**-0.5)) * mixer.norm.gain
    assert_close(o, expected, **CLOSE)


@torch.no_grad()
def test_supra_with_qk_norm_normalises_over_all_heads_after_the_relu():
    mixer = build("supra", heads=4, kv_heads=4, qk_norm=True)
    mixer.q_norm.weight.uniform_(0.5, 2)
    q, k, v, x = inputs(kv_heads=4)
    o, _ = mixer(q, k, v, x, rope, None, None)
    q, k = ((heads.flatten(2) @ mixer.E.weight.T + mixer.E.bias).relu() for heads in (q, k))
    q, k = group_norm(q) * mixer.q_norm.weight, group_norm(k) * mixer.k_norm.weight
    q, k = rope(q.unflatten(-1, (4, K))), rope(k.unflatten(-1, (4, K)))
    assert_close(o, group_norm(decayed_sum(q, k, v, alibi(4), K**-0.5)), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_t2r_is_the_papers_formula(kv_heads):
    mixer = build("t2r", kv_heads=kv_heads, feature_size=9)
    q, k, v, x = inputs(kv_heads=kv_heads)
    o, _ = mixer(q, k, v, x, rope, None, None)

    def phi(heads):
        return (torch.einsum("bthk,hfk->bthf", heads, mixer.phi.weight) + mixer.phi.bias).relu()

    q, k = phi(rope(q) * K**-0.5), phi(repeated(rope(k)))
    weights = causal(torch.einsum("bihf,bjhf->bhij", q, k))
    denominator = weights.sum(-1, keepdim=True).clamp(min=0.01)
    assert_close(o, torch.einsum("bhij,bjhd->bihd", weights / denominator, repeated(v)), **CLOSE)


@torch.no_grad()
def test_t2r_divides_by_no_less_than_a_hundredth():
    mixer = build("t2r", feature_size=3)
    mixer.phi.bias.fill_(-100)
    q, k, v, x = inputs()
    assert mixer(q, k, v, x, rope, None, None)[0].abs().max() == 0


def test_slopes_of_32_heads_are_the_ones_the_paper_prints():
    gamma = [math.exp(-s) for s in slopes("alibi", 32).tolist()]
    assert gamma[0] == pytest.approx(0.4313, abs=5e-5)
    assert gamma[-1] == pytest.approx(0.99610, abs=5e-6)
    assert gamma[-1] ** 2048 == pytest.approx(3.35e-4, rel=5e-3)


@pytest.mark.parametrize("rule", ["alibi", "retnet"])
@pytest.mark.parametrize("heads", [1, 2, 3, 7, 12, 40, 71, 128])
def test_every_head_count_has_distinct_decays(rule, heads):
    found = slopes(rule, heads).tolist()
    assert len(set(found)) == heads
    assert all(0 < slope <= 1 for slope in found)


def test_slopes_of_twelve_heads_follow_alibis_rule_for_other_counts():
    """2^-1 ... 2^-8 of eight heads, then every second one of sixteen."""
    expected = [2.0**-n for n in range(1, 9)] + [2.0**-n for n in (0.5, 1.5, 2.5, 3.5)]
    assert slopes("alibi", 12).tolist() == pytest.approx(expected)


def test_a_normalised_mixer_asks_for_normalised_targets():
    o = torch.randn(2, 3, 4, V, dtype=torch.float64) * 7 + 1
    assert_close(build("supra").target(o), group_norm(o), **CLOSE)
    assert build("supra", gain="head").target(o) is o
    assert build("t2r").target(o) is o


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("supar", {}, "did you mean 'supra'"),
        ("supra", {"slope": "alibi"}, "did you mean 'slopes'"),
        ("supra", {"slopes": "linear"}, "'alibi', 'retnet'"),
        ("supra", {"qk_norm": 1}, "valid boolean, got 1"),
        ("t2r", {"feature_size": True}, "valid integer, got True"),
        ("t2r", {"feature_size": 0}, "feature_size is 0"),
    ],
)
def test_a_wrong_option_is_named(name, options, said):
    with pytest.raises(UsageError, match=said):
        parse_options(name, options)


NUMBERS = [
    (name, field.name)
    for name in mixers
    for field in dataclasses.fields(mixers.get(name).Options)
    if type(field.default) in (int, float)
]


@torch.no_grad()
@pytest.mark.parametrize("value", [-1, 0, 0.5, 1, 3, 10**8, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("name", "option"), NUMBERS)
def test_a_number_that_an_option_takes_is_one_that_the_mixer_answers_with(name, option, value):
    others = {"branch": "gated_delta"} if (name, option) == ("lolcats", "key_width") else {}
    try:
        mixer = build(name, **others, **{option: value})
    except UsageError as refused:
        said = str(refused)
    else:
        said = None
    if said is not None:
        assert f"mixer.{option}" in said
        return
    q, k, v, x = inputs()
    layout = Layout(torch.tensor([[-1] * 7 + [0] * 10 + [1] * 20, [0] * 30 + [-1] * 7]))
    o, state = mixer(q, k, v, x, rope, None, layout)
    assert o[layout.segment >= 0].isfinite().all()
    assert mixer(q[:, :1], k[:, :1], v[:, :1], x[:, :1], rope, state, None)[0].isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("rule", ["retnet", "none"])
def test_retention_is_supra_without_a_map(rule):
    mixer = build("retention", slopes=rule)
    assert not list(mixer.parameters())
    q, k, v, x = inputs()
    o, _ = mixer(q, k, v, x, rope, None, None)
    gamma = 1 - 2.0 ** (-5 - torch.arange(4, dtype=torch.float64)) if rule == "retnet" else torch.ones(4).double()
    assert_close(o, group_norm(decayed_sum(rope(q), repeated(rope(k)), repeated(v), gamma, K**-0.5)), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("normaliser", ["denominator", "norm"])
def test_gated_is_its_formula(normaliser):
    mixer = build("gated", normaliser=normaliser, output_gate=True)
    moved(mixer)
    q, k, v, x = inputs()
    o, _ = mixer(q, k, v, x, rope, None, None)
    q, k = hedgehog(rope(q), mixer.phi_q), repeated(hedgehog(rope(k), mixer.phi_k))
    kept = kept_of((x @ mixer.decay.weight.T + mixer.decay.bias).sigmoid())
    weights = torch.einsum("bihf,bjhf->bhij", q, k) * kept
    if normaliser == "denominator":
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)
    expected = torch.einsum("bhij,bjhd->bihd", weights, repeated(v))
    expected = group_norm(expected) if normaliser == "norm" else expected
    gate = 2 * (x @ mixer.gate.weight.T).sigmoid().view(2, T, 4, V)
    assert_close(o, expected * gate, **CLOSE)


@torch.no_grad()
def test_gated_starts_near_no_decay_and_with_open_gates():
    mixer = build("gated", output_gate=True)
    q, k, v, x = inputs()
    assert_close(mixer.decay(x).sigmoid(), torch.full((2, T, 4), 0.99753, dtype=torch.float64), atol=1e-5, rtol=0)
    assert_close(mixer(q, k, v, x, rope, None, None)[0], build("gated")(q, k, v, x, rope, None, None)[0], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_hedgehog_is_its_formula_and_begins_with_the_teachers_q_and_k(kv_heads):
    mixer = build("hedgehog", kv_heads=kv_heads)
    q, k, v, x = inputs(kv_heads=kv_heads)
    assert_close(mixer.phi_q(q), torch.cat((q.softmax(-1), (-q).softmax(-1)), dim=-1))
    moved(mixer)
    o, _ = mixer(q, k, v, x, rope, None, None)
    weights = causal(
        torch.einsum("bihf,bjhf->bhij", hedgehog(rope(q), mixer.phi_q), repeated(hedgehog(rope(k), mixer.phi_k)))
    )
    assert_close(o, torch.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdim=True), repeated(v)), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_mamba2_is_the_papers_recurrence(kv_heads):
    mixer = moved(build("mamba2", kv_heads=kv_heads))
    q, k, v, x = inputs(kv_heads=kv_heads)
    o, _ = mixer(q, k, v, x, rope, None, None)
    C, B, v = rope(q), repeated(rope(k)), repeated(v)
    step = (1 + (x @ mixer.step.weight.T + mixer.step.bias).exp()).log()
    S, want = torch.zeros(2, 4, K, V, dtype=torch.float64), []
    for t in range(T):
        S = torch.exp(-mixer.A_log.exp() * step[:, t])[..., None, None] * S
        S = S + step[:, t, :, None, None] * B[:, t, :, :, None] * v[:, t, :, None]
        want.append(torch.einsum("bhk,bhkv->bhv", C[:, t], S) * K**-0.5 + mixer.D * v[:, t])
    gate = 2 * (x @ mixer.gate.weight.T).sigmoid().view(2, T, 4, V)
    assert_close(o, group_norm(torch.stack(want, 1)) * mixer.norm.gain * gate, **CLOSE)


@torch.no_grad()
def test_mamba2_begins_with_a_step_of_1_and_memories_of_10_to_1000_tokens():
    mixer = build("mamba2")
    q, k, v, x = inputs()
    assert_close(nn.functional.softplus(mixer.step(x)), torch.ones(2, T, 4, dtype=torch.float64), atol=1e-4, rtol=0)
    assert_close(1 / mixer.A_log.exp(), torch.logspace(3, 1, 4, dtype=torch.float64), atol=0, rtol=1e-4)
    o, _ = mixer(q, k, v, x, rope, None, None)
    gamma = (-torch.logspace(-3, -1, 4, dtype=torch.float64)).exp()
    want = group_norm(decayed_sum(rope(q), repeated(rope(k)), repeated(v), gamma, K**-0.5))
    assert_close(o, want, atol=1e-3, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("branch", ["hedgehog", "t2r", "gated"])
@pytest.mark.parametrize(("window", "sinks"), [(5, 2), (1, 0), (3, 7), (36, 0), (64, 4)])
def test_lolcats_is_two_attentions_under_one_denominator(window, sinks, branch):
    mixer = moved(build("lolcats", window=window, sinks=sinks, branch=branch))
    q, k, v, x = inputs()
    distance, first = steps_back(), torch.arange(T) < sinks
    seen = (distance >= 0) & ((distance < window) | first)
    scores = torch.einsum("bihd,bjhd->bhij", rope(q), repeated(rope(k))) * K**-0.5
    scores = scores.masked_fill(~seen, -math.inf)
    near = (scores - scores.amax(-1, keepdim=True)).exp()

    def phi(heads, learned):
        if branch != "t2r":
            return hedgehog(heads, learned)
        return (torch.einsum("bthk,hfk->bthf", heads, learned.weight) + learned.bias).relu()

    own = mixer.recurrence
    past = torch.einsum("bihf,bjhf->bhij", phi(rope(q), own.phi_q), repeated(phi(rope(k), own.phi_k)))
    past = past.masked_fill(seen | (distance < 0), 0) * own.log_f.exp()[:, None, None]
    if branch == "gated":
        past = past * kept_of((x @ own.decay.weight.T + own.decay.bias).sigmoid(), late=window)
    whole, window_alone = (near + past) / (near + past).sum(-1, keepdim=True), near / near.sum(-1, keepdim=True)
    past_alone = past / past.sum(-1, keepdim=True).clamp(min=1e-9)
    for only, weights in ((None, whole), ("window", window_alone), ("recurrence", past_alone)):
        mixer.only = only
        want = torch.einsum("bhij,bjhd->bihd", weights, repeated(v))
        assert_close(mixer(q, k, v, x, rope, None, None)[0], want, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 9])
def test_how_far_back_and_how_concentrated_attention_is_is_counted_without_its_weights(window):
    q, k, _, x = inputs()
    q, k = 4 * q, 4 * k  # concentrated, so that the estimate is close
    spec = HeadSpec(4, 2, head_dim=K, v_dim=20_000, model_dim=24, layer=0, scale=K**-0.5, window=window)
    layout = Layout(torch.tensor([[-1] * 7 + [0] * 10 + [1] * 20, [0] * 37]))
    counts = layout.segment == 0
    found = softmax.attention_moments(spec, q, k, x, rope, layout, counts)
    same = (layout.segment[:, :, None] == layout.segment[:, None]) & (steps_back() >= 0)
    seen = same if window is None else same & (steps_back() < window)
    scores = torch.einsum("bihd,bjhd->bhij", rope(q), repeated(rope(k))) * K**-0.5
    p = scores.masked_fill(~seen[:, None], -math.inf).softmax(-1)
    each = torch.stack(((p * steps_back()).sum(-1), p.square().sum(-1), torch.ones(2, 4, T)))
    want = each.masked_fill(~counts[:, None], 0).sum((1, 3))
    assert_close(found[[0, 2]], want[[0, 2]], atol=1e-3, rtol=1e-4)
    assert_close(found[1], want[1], atol=0, rtol=0.02)


@torch.no_grad()
@pytest.mark.parametrize("most", [1, 2])
@pytest.mark.parametrize("name", ["gated_delta", "kda"])
def test_calibration_sets_decay_and_strength_by_where_the_teacher_looks(name, most):
    mixer = moved(build(name, calibrate=True, key_width=2, negative_eigenvalues=most == 2))
    q, k, v, x = inputs()
    tokens, distance, concentration = 100.0, torch.tensor([0.0, 1.0, 10.0, 1e9]), torch.tensor([1.0, 0.5, 0.25, 0.0])
    moments = torch.stack((distance, concentration, torch.ones(4))) * tokens
    taught = torch.randn(2, T, 4, V, dtype=torch.float64)
    for _ in range(mixer.fits):
        mixer.fit(mixer.moments(mixer(q, k, v, x, rope, None, None)[0], taught, lambda: moments))
    want = -torch.tensor([5, math.log(2), math.log(2) / 10, 1e-3]).double()
    g = mixer._log_decay(x)
    assert_close(g, want.view(4, *[1] * (g.ndim - 3)).expand_as(g))
    assert_close(most * mixer.write(x).sigmoid(), torch.tensor([0.7, 0.5, 0.4, 0.3]).double().expand(2, T, 4))
    o, _ = mixer(q, k, v, x, rope, None, None)
    assert_close((o * o).sum((0, 1, 3)), (o * taught).sum((0, 1, 3)), msg="the gain is that of least squares")


@torch.no_grad()
def test_calibration_of_a_shared_state_asks_all_heads_that_read_it():
    mixer = moved(build("gated_delta", calibrate=True, state_per="kv_head"))
    q, k, v, x = inputs()
    distance, concentration = torch.tensor([1.0, 3.0, 10.0, 30.0]), torch.tensor([1.0, 0.5, 0.25, 0.0])
    moments = torch.stack((distance, concentration, torch.ones(4))) * 100
    taught = torch.randn(2, T, 4, V, dtype=torch.float64)
    mixer.fit(mixer.moments(mixer(q, k, v, x, rope, None, None)[0], taught, lambda: moments))
    want = -math.log(2) / torch.tensor([2.0, 20.0]).double()
    assert_close(mixer._log_decay(x), want.expand(2, T, 2))
    assert_close(mixer.write(x).sigmoid(), torch.tensor([0.6, 0.35]).double().expand(2, T, 2))


@torch.no_grad()
@pytest.mark.parametrize("name", ["gated_delta", "kda"])
def test_heads_that_read_one_state_are_heads_whose_states_are_alike(name):
    shared, apart = moved(build(name, key_width=2, state_per="kv_head")), build(name, key_width=2)
    weights = shared.state_dict()
    for key, own in apart.state_dict().items():
        if weights[key].shape != own.shape:
            each = weights[key].unflatten(0, (2, -1)).repeat_interleave(2, 0)
            weights[key] = each.flatten(0, 1)
    apart.load_state_dict(weights)
    given = (*inputs(), rope, None, None)
    (o, state), (want, states) = shared(*given), apart(*given)
    assert_close(o, want, **CLOSE)
    assert_close(state.S.repeat_interleave(2, 1), states.S, **CLOSE)


def test_a_state_per_kv_head_is_of_the_delta_rule_alone():
    with pytest.raises(UsageError, match=r"mixer\.state_per is of branch 'gated_delta', and mixer.branch is 't2r'"):
        parse_options("lolcats", {"branch": "t2r", "state_per": "kv_head"})


@torch.no_grad()
def test_lolcats_with_the_delta_rule_is_a_window_and_a_gated_delta_mixed_by_a_gate():
    mixer = moved(build("lolcats", window=5, sinks=2, branch="gated_delta", key_width=2))
    window, delta = build("window", window=5, sinks=2), build("gated_delta", key_width=2)
    delta.load_state_dict(mixer.recurrence.delta.state_dict())
    given = (*inputs(), rope, None, None)
    near, past = window(*given)[0], delta(*given)[0]
    q, k, _, x = given[:4]
    scores = torch.einsum("bihd,bjhd->bhij", rope(q), repeated(rope(k))) * K**-0.5
    back = torch.arange(T)[:, None] - torch.arange(T)
    seen = (back >= 0) & ((back < 5) | (torch.arange(T) < 2))
    mass = scores.masked_fill(~seen, -math.inf).logsumexp(-1).transpose(1, 2)
    p = (x @ mixer.recurrence.mix.weight.T + mixer.recurrence.mix.bias - mixer.recurrence.mass * mass).sigmoid()[
        ..., None
    ]
    for only, want in ((None, (1 - p) * near + p * past), ("window", near), ("recurrence", past)):
        mixer.only = only
        assert_close(mixer(*given)[0], want, **CLOSE)


@torch.no_grad()
def test_a_dropped_window_leaves_the_branch_alone_where_something_has_left_and_less_often_with_progress():
    mixer = build("lolcats", window=5, sinks=2, window_dropout=1.0)
    mixer.progress = 0.0
    q, k, v, x = inputs()
    answers = {}
    for only in ("window", "recurrence", None):
        mixer.only = only
        answers[only], _ = mixer.eval()(q, k, v, x, rope, None, None)
    dropped, _ = mixer.train()(q, k, v, x, rope, None, None)
    assert_close(dropped[:, :7], answers["window"][:, :7])
    assert_close(dropped[:, 7:], answers["recurrence"][:, 7:])
    mixer.progress = 1.0
    assert_close(mixer(q, k, v, x, rope, None, None)[0], answers[None])
    mixer.progress = 0.75
    many = [part.repeat(200, 1, 1, 1) if part.ndim == 4 else part.repeat(200, 1, 1) for part in (q, k, v, x)]
    rows = mixer(*many, rope, None, None)[0][:, -1]
    alone = (rows - answers["recurrence"][:, -1].repeat(200, 1, 1)).abs().amax((1, 2)) < 1e-9
    assert 0.15 < alone.double().mean() < 0.35


@torch.no_grad()
@pytest.mark.parametrize(("window", "sinks"), [(5, 2), (1, 0), (1, 3), (8, 0), (20, 4), (100, 4), (4, 30)])
def test_window_is_masked_softmax(window, sinks):
    mixer = build("window", window=window, sinks=sinks)
    q, k, v, x = inputs()
    o, _ = mixer(q, k, v, x, rope, None, None)
    scores = torch.einsum("bihd,bjhd->bhij", rope(q), repeated(rope(k))) * K**-0.5
    distance, first = steps_back(), torch.arange(T) < sinks
    seen = (distance >= 0) & ((distance < window) | first)
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    assert_close(o, torch.einsum("bhij,bjhd->bihd", weights, repeated(v)), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("lengths", [(T,), (10, 1, 26)], ids=["one document", "packed"])
def test_softmax_attention_is_its_formula_and_asks_for_no_math_kernel(kv_heads, lengths, monkeypatch):
    """On CUDA a mask together with enable_gqa leaves PyTorch its math kernel alone, with all scores in fp32."""
    asked = []

    def attention(*args, attn_mask, enable_gqa, **more):
        asked.append((attn_mask is not None, enable_gqa))
        return torch.nn.functional.scaled_dot_product_attention(
            *args, attn_mask=attn_mask, enable_gqa=enable_gqa, **more
        )

    monkeypatch.setattr(softmax, "scaled_dot_product_attention", attention)
    mixer = build("softmax", kv_heads=kv_heads)
    q, k, v, x = inputs(kv_heads=kv_heads)
    segment = torch.cat([torch.full((length,), number) for number, length in enumerate(lengths)]).expand(2, T)
    o, _ = mixer(q, k, v, x, rope, None, Layout(segment, None) if len(lengths) > 1 else None)
    scores = torch.einsum("bihd,bjhd->bhij", rope(q), repeated(rope(k))) * K**-0.5
    seen = (steps_back() >= 0) & (segment[0][:, None] == segment[0])
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    assert_close(o, torch.einsum("bhij,bjhd->bihd", weights, repeated(v)), **CLOSE)
    assert asked == [(len(lengths) > 1, len(lengths) == 1 and kv_heads < 4)]


def pieces(mixer, q, k, v, x, lengths, layouts=None):
    """The mixer called piece after piece; q and k are rotated already."""
    state, out, start = None, [], 0
    for number, length in enumerate(lengths):
        part = [heads[:, start : start + length] for heads in (q, k, v, x)]
        o, state = mixer(*part, lambda heads: heads, state, layouts[number] if layouts else None)
        out.append(o)
        start += length
    return torch.cat(out, dim=1)


@torch.no_grad()
@pytest.mark.parametrize(("window", "sinks"), [(5, 2), (1, 0), (1, 3), (8, 0), (20, 4), (100, 4), (4, 30)])
@pytest.mark.parametrize("lengths", [(1,) * T, (10, 1, 1, 25), (3, 34), (36, 1)])
def test_a_window_of_any_size_can_be_fed_in_pieces(window, sinks, lengths):
    mixer = build("window", window=window, sinks=sinks)
    q, k, v, x = inputs()
    assert_close(pieces(mixer, q, k, v, x, lengths), pieces(mixer, q, k, v, x, (T,)), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in mixers if name != "softmax"])
def test_padding_between_pieces_is_passed_over(name):
    """Left padding in a later piece, as when a conversation's turns have different lengths."""
    mixer = build(name, **({"window": 5, "sinks": 2} if name in ("window", "lolcats") else {}))
    q, k, v, x = inputs()
    expected = pieces(mixer, q, k, v, x, (20, 17))
    padded = [
        torch.cat((heads[:, :20], torch.full_like(heads[:, :3], 7.0), heads[:, 20:]), dim=1) for heads in (q, k, v, x)
    ]
    segment = torch.zeros(2, 20, dtype=torch.long)
    layouts = [None, Layout(torch.cat((segment[:, :3] - 1, segment[:, :17]), dim=1))]
    got = pieces(mixer, *padded, (20, 20), layouts)
    assert_close(torch.cat((got[:, :20], got[:, 23:]), dim=1), expected, **CLOSE)


# -- in half precision -------------------------------------------------------------------------------------------------


def rounded(mixer, given, dtype):
    """What the mixer is called with in `dtype`, in which its parameters are from here on, and the o of all that in
    float64."""
    given = [*(x.to(dtype) for x in given), lambda heads: heads, None, None]
    want, _ = mixer.to(dtype).double()(*(x.double() for x in given[:4]), *given[4:])
    mixer.to(dtype)
    return given, want


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "digits"), [(torch.bfloat16, 4e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("path", ["torch", "triton"])
@pytest.mark.parametrize(
    ("name", "options"),
    [("retention", {}), ("retention", {"gain": "head"}), ("mamba2", {}), ("gated", {"normaliser": "norm"})],
)
def test_normed_heads_have_their_digits_where_values_have_a_mean(name, options, path, dtype, digits, monkeypatch):
    """Un-normalised they are many times as large as what the norm leaves of them."""
    if path == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("on a CPU the interpreter runs it, which is off where there is a GPU")
    mixer, (q, k, v, x) = build(name, **options), inputs()
    given, want = rounded(mixer, (q, k, v + 30, x), dtype)
    monkeypatch.setenv("SUPRA_KERNEL", path)
    o, _ = mixer(*given)
    assert o.dtype == dtype
    assert (o - want).norm() <= digits * want.norm()


@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("softcap", [None, 200.0])
def test_a_windows_scores_have_their_digits_where_they_are_large(softcap, autocast):
    mixer = build("window", window=5, sinks=2)
    mixer.spec = dataclasses.replace(mixer.spec, softcap=softcap)
    q, k, v, x = inputs()
    given, want = rounded(mixer, (8 * q + 8, 8 * k + 8, v, x), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        o, _ = mixer(*given)
    assert (o - want).norm() <= 5e-3 * want.norm()


@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("name", "options", "maps"),
    [
        ("gated", {}, ("decay",)),
        ("gated_delta", {}, ("decay", "write")),
        ("kda", {}, ("decay", "write")),
        ("mamba2", {}, ("step",)),
        ("lolcats", {"branch": "gated"}, ("recurrence.decay",)),
        ("lolcats", {"branch": "gated_delta"}, ("recurrence.mix", "recurrence.delta.write")),
    ],
)
def test_what_decays_writes_and_shares_hang_on_is_computed_in_fp32(name, options, maps, autocast):
    """Under autocast, and of weights that are stored in bf16: beside a bias of 6 bf16 does not see a change of 1/64."""
    mixer = moved(build(name, **options), 0.01)
    parameters = torch.float32 if autocast else torch.bfloat16
    mixer, heard = mixer.to(parameters), {}
    for path in maps:
        mixer.get_submodule(path).register_forward_hook(lambda *call, path=path: heard.update({path: call[2]}))
    q, k, v, x = (part.bfloat16() for part in inputs())
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        mixer(q, k, v, x, lambda heads: heads, None, None)
    assert heard.keys() == set(maps)
    mixer.double()
    for path, y in heard.items():
        assert y.dtype == torch.float32
        assert_close(y.double(), mixer.get_submodule(path).forward(x.double()), atol=1e-5, rtol=1e-5)
