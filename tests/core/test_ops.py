"""The choice of a path: forced, told once, never silent; norm and denominator inside the operator and after it."""

from __future__ import annotations

import logging

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from supra_cli.core import ops
from supra_cli.core.errors import UsageError
from supra_cli.core.layout import HeadSpec, Layout
from supra_cli.core.mixers import mixers, parse_options, parts


def inputs(length=9, dtype=torch.float64):
    torch.manual_seed(0)
    return *(torch.randn(2, length, heads, 8, dtype=dtype) for heads in (4, 2, 2)), -torch.rand(4, dtype=dtype)


@pytest.fixture
def forms(monkeypatch):
    """The forms that are asked of supra_kernels, in order."""
    asked, real = [], ops.supra_kernels.linear_attention

    def spy(*args, form, **kwargs):
        asked.append(form)
        return real(*args, form=form, **kwargs)

    monkeypatch.setattr(ops.supra_kernels, "linear_attention", spy)
    return asked


@pytest.mark.parametrize(("path", "form"), [("naive", "naive"), ("torch", "chunk"), ("triton", "triton")])
def test_the_variable_forces_a_form_with_the_same_result(path, form, forms, monkeypatch):
    if path == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("on a CPU the interpreter runs it, which is off where there is a GPU")
    q, k, v, g = inputs(dtype=torch.float32)
    want, end = ops.linear_attention(*(x.double() for x in (q, k, v, g)))
    monkeypatch.setenv("SUPRA_KERNEL", path)
    o, S = ops.linear_attention(q, k, v, g)
    assert forms[-1] == form
    assert_close(o.double(), want, atol=1e-5, rtol=1e-5)
    assert_close(S.double(), end, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 9])
def test_the_torch_path_is_the_chunk_form_at_any_length(length, forms, monkeypatch):
    monkeypatch.setenv("SUPRA_KERNEL", "torch")
    ops.linear_attention(*inputs(length))
    assert forms == ["chunk"]


def test_an_unknown_path_is_one_sentence_with_a_near_miss(monkeypatch):
    monkeypatch.setenv("SUPRA_KERNEL", "tritn")
    with pytest.raises(UsageError, match=r"'tritn', expected one of naive, torch, triton; did you mean 'triton'"):
        ops.linear_attention(*inputs())


def test_triton_without_a_gpu_or_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("SUPRA_KERNEL", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(UsageError, match="needs a CUDA device, got cpu"):
        ops.linear_attention(*inputs())


@pytest.mark.parametrize("forced", ["", "triton"])
def test_planning_for_a_gpu_takes_its_path_where_that_cannot_run(forced, forms, monkeypatch):
    """Of tensors without storage, whose shapes are all that is asked for."""
    monkeypatch.setenv("SUPRA_KERNEL", forced)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with FakeTensorMode(), ops.planning("triton"):
        q, k, v, g = inputs(dtype=torch.float32)
        o, S = ops.linear_attention(q, k, v, g)
    assert forms == ["triton"]
    assert (o.shape, S.shape) == (q.shape, (2, 4, 8, 8))


def test_a_failing_kernel_is_an_error_and_no_other_path(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(ops.supra_kernels, "linear_attention", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        ops.linear_attention(*inputs())


def test_which_path_ran_is_logged_once_for_a_device_and_dtype(monkeypatch):
    told = []
    monkeypatch.setattr(ops._log, "log", lambda level, message, *values: told.append((level, message % values)))
    ops._tell_once.cache_clear()
    for length in (9, 1, 9):
        ops.linear_attention(*inputs(length))
    ops.linear_attention(*inputs(dtype=torch.float32))
    monkeypatch.setenv("SUPRA_KERNEL", "naive")
    ops.linear_attention(*inputs())
    assert told == [
        (logging.INFO, "linear attention: torch on cpu in float64"),
        (logging.INFO, "linear attention: torch on cpu in float32"),
        (logging.INFO, "linear attention: naive on cpu in float64"),
    ]


def test_a_compiled_caller_keeps_one_graph():
    compiled = torch.compile(lambda *x: ops.linear_attention(*x, norm_eps=1e-5)[0], fullgraph=True, backend="eager")
    assert_close(compiled(*inputs()), ops.linear_attention(*inputs(), norm_eps=1e-5)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 37])
@pytest.mark.parametrize("gain", ["none", "head"])
@pytest.mark.parametrize("name", ["supra", "retention"])
def test_the_norm_in_the_operator_agrees_with_the_norm_after_it(name, gain, length, dtype, monkeypatch):
    """Value, state and gradients in fp32 to the bit; in bf16, where gradients of a norm cancel, value and state."""
    torch.manual_seed(0)
    mixer = mixers.get(name)(HeadSpec(4, 2, 8, 8, 32, 0, 8**-0.5), parse_options(name, {"gain": gain}))
    mixer.reset_parameters()
    q, k, v, _ = inputs(length, torch.float32)
    leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    mixer.to(dtype)

    def run():
        o, state = mixer(*leaves, torch.zeros(2, length, 32), lambda x: x, None, None)
        return o, state.S, *torch.autograd.grad(o.float().square().sum() + (o.float() ** 3).sum(), leaves)

    inside, real = run(), ops.supra_kernels.linear_attention

    def outside(*args, norm_eps, **kwargs):
        o, S = real(*args, **kwargs)
        return torch.nn.functional.layer_norm(o.float(), o.shape[-1:], eps=norm_eps).to(o.dtype), S

    monkeypatch.setattr(ops.supra_kernels, "linear_attention", outside)
    compared, tolerance = (None, 0) if dtype == torch.float32 else (2, 1e-2)
    for x, y in zip(inside[:compared], run()[:compared], strict=True):
        assert_close(x, y, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("length", [2, 37])
@pytest.mark.parametrize("name", ["t2r", "gated"])
def test_the_denominator_in_the_kernel_agrees_with_the_division_after_the_operator(name, length, monkeypatch):
    """Value, state and gradients; without gradients two tokens take the decode step."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("on a CPU the interpreter runs it, which is off where there is a GPU")
    torch.manual_seed(0)
    mixer = mixers.get(name)(HeadSpec(4, 2, 8, 8, 32, 0, 8**-0.5), mixers.get(name).Options())
    mixer.reset_parameters()
    q, k, v, _ = inputs(length, torch.float32)
    x = torch.randn(2, length, 32)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def run(path):
        monkeypatch.setenv("SUPRA_KERNEL", path)
        o, state = mixer(*leaves, x, lambda x: x, None, None)
        with torch.no_grad():
            quick, _ = mixer(*leaves, x, lambda x: x, None, None)
        return o, quick, state.S, *torch.autograd.grad((o**3).sum() + state.S.sum(), leaves)

    for got, want in zip(run("triton"), run("torch"), strict=True):
        assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("after", [{}, {"norm_eps": 1e-5}, {"denominator_min": 0.5}])
@pytest.mark.parametrize("decay", ["none", "fixed", "token"])
@pytest.mark.parametrize("path", ["torch", "triton", None])
def test_a_padded_decode_step_leaves_the_states_of_padding_as_they_are_to_the_bit(path, decay, after):
    """And steps the others as it would alone; a γ of 0, whose log is -inf, among them."""
    if path == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("on a CPU the interpreter runs it, which is off where there is a GPU")
    q, k, v, fixed = inputs(1, torch.float32)
    fixed[1] = float("-inf")
    g = {"none": None, "fixed": fixed, "token": fixed.expand(2, 1, 4)}[decay]
    state = torch.randn(2, 4, 8, 8 + ("denominator_min" in after))
    q, k, state = q.relu(), k.relu(), state.abs()
    layout = Layout.of(torch.tensor([[-1], [3]]))
    with torch.no_grad():
        o, S = ops.linear_attention(q, k, v, g, state=state.clone(), layout=layout, path=path, **after)
        alone = [None if x is None else x if x.dim() == 1 else x[1:] for x in (q, k, v, g)]
        want, end = ops.linear_attention(*alone, state=state[1:].clone(), path=path, **after)
        _, told = ops.linear_attention(q, k, v, g, state=state.clone(), layout=layout, path="naive", **after)
    assert torch.equal(S[:1], state[:1])
    assert o.isfinite().all()
    assert_close((o[1:], S[1:]), (want, end), atol=1e-6, rtol=1e-6)
    assert_close(S, told, atol=1e-5, rtol=1e-5)


def test_a_padded_decode_step_takes_the_form_of_a_decode_step(forms):
    layout = Layout.of(torch.tensor([[-1], [0]]))
    ops.linear_attention(*inputs(1), layout=layout)
    ops.linear_attention(*inputs(9), layout=Layout.of(torch.zeros(2, 9, dtype=torch.long)))
    assert forms == ["step", "chunk"]


@pytest.mark.parametrize("form", ["chunk", "step", "triton"])
def test_gradients_of_a_padded_step_are_those_of_the_recurrence(form):
    if form == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("on a CPU the interpreter runs it, which is off where there is a GPU")
    leaves = [x.requires_grad_() for x in inputs(1, torch.float32)]
    segment, state = torch.tensor([[-1], [0]]), torch.randn(2, 4, 8, 8)

    def gradients(form):
        o, S = ops.supra_kernels.linear_attention(*leaves, state=state, segment=segment, form=form)
        return torch.autograd.grad((o[1:] ** 2).sum() + (S**2).sum(), leaves)

    for got, want in zip(gradients(form), gradients("naive"), strict=True):
        assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_documents_are_coded_once_for_all_layers(monkeypatch):
    layout = Layout.of(torch.zeros(2, 9, dtype=torch.long))
    monkeypatch.setattr("supra_kernels.operator.coded", None)
    ops.linear_attention(*inputs(9), layout=layout)
    with pytest.raises(TypeError):
        ops.linear_attention(*inputs(9), layout=Layout(layout.segment))


def test_documents_that_are_not_those_of_the_segment_are_refused():
    segment = torch.zeros(2, 9, dtype=torch.long)
    for documents in (segment, segment[:, :5].int()):
        with pytest.raises(ValueError, match=r"documents is \[2, 9\] int32 beside a segment, got"):
            ops.linear_attention(*inputs(9), layout=Layout(segment, documents))


def test_an_exported_model_without_the_kernels_takes_the_form_of_pytorch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert ops.supra_kernels.default_form(OldGPU, None) == "triton"
    monkeypatch.setattr("supra_kernels.boundaries.kernels_are_here", lambda: False)
    assert ops.supra_kernels.default_form(OldGPU, None) == "chunk"


class OldGPU:
    """As much of a tensor on a T4 as the choice of a form asks for."""

    is_cuda, dtype, device, shape = True, torch.float32, torch.device("cuda:0"), (2, 9, 4, 8)


@pytest.mark.parametrize(("capability", "form"), [((7, 0), "chunk"), ((7, 5), "chunk"), ((8, 0), "triton")])
def test_a_gpu_older_than_triton_supports_takes_the_form_of_pytorch(capability, form, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert ops.supra_kernels.default_form(OldGPU, None) == form
    monkeypatch.setenv("SUPRA_KERNEL", "triton")
    if form == "triton":
        assert ops._forced(OldGPU.device) == "triton"
    else:
        with pytest.raises(UsageError, match=r"needs compute capability 8\.0 or more, got an older GPU as cuda:0"):
            ops._forced(OldGPU.device)


@pytest.fixture
def decays(monkeypatch):
    kept = {}
    monkeypatch.setattr(parts, "_decays", kept)
    return kept


def test_fixed_decays_are_made_once_a_device_and_for_few_shapes(decays):
    first = parts.log_decay("alibi", 6, "cpu")
    assert parts.log_decay("alibi", 6, torch.device("cpu")) is first
    assert_close(first.double(), -parts.slopes("alibi", 6), atol=0, rtol=1e-6)
    for heads in range(1, 200):
        parts.log_decay("retnet", heads, "cpu")
    assert len(decays) == 64
    assert parts.log_decay("alibi", 6, "cpu") is first, "a CUDA graph may read it"


def test_a_fixed_decay_made_in_inference_mode_serves_a_later_backward(decays):
    with torch.inference_mode():
        parts.log_decay("alibi", 4, "cpu")
    q, k, v, _ = inputs(9, torch.float32)
    o, _ = ops.linear_attention(q.requires_grad_(), k, v, parts.log_decay("alibi", 4, "cpu"))
    o.sum().backward()
    assert q.grad.isfinite().all()


def test_no_fake_traced_or_meta_decay_is_kept(decays):
    with FakeTensorMode():
        assert type(parts.log_decay("alibi", 4, "cpu")) is not torch.Tensor
    parts.log_decay("alibi", 4, "meta")
    compiled = torch.compile(lambda x: x * parts.log_decay("alibi", 4, x.device), fullgraph=True, backend="eager")
    assert_close(compiled(torch.ones(4)), parts.slopes("alibi", 4).neg().float())
    assert not decays
    kept = parts.log_decay("alibi", 4, "cpu")
    with FakeTensorMode():
        assert parts.log_decay("alibi", 4, "cpu") is not kept


@pytest.mark.parametrize("length", [1, 9])
def test_a_compiled_caller_makes_the_layout_in_the_same_graph(length):
    segment = torch.zeros(2, length, dtype=torch.long)
    segment[0, 0] = -1

    def call(q, k, v, g):
        return ops.linear_attention(q, k, v, g, layout=Layout.of(segment))[0]

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    assert_close(compiled(*inputs(length)), call(*inputs(length)))
