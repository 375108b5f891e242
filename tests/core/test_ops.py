"""The choice of a path: forced, told once, never silent; norm and denominator inside the operator and after it."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from supra_cli.core import ops
from supra_cli.core.errors import UsageError
from supra_cli.core.layout import HeadSpec
from supra_cli.core.mixers import mixers, parse_options


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
    monkeypatch.setattr(ops._log, "info", lambda message, *values: told.append(message % values))
    ops._tell_once.cache_clear()
    for length in (9, 1, 9):
        ops.linear_attention(*inputs(length))
    ops.linear_attention(*inputs(dtype=torch.float32))
    monkeypatch.setenv("SUPRA_KERNEL", "naive")
    ops.linear_attention(*inputs())
    assert told == [
        "linear attention: torch on cpu in float64",
        "linear attention: torch on cpu in float32",
        "linear attention: naive on cpu in float64",
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
