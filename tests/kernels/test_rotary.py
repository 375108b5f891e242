"""ReLU and rotation by one Triton kernel, in the interpreter or on a GPU, against its matrix in float64."""

from __future__ import annotations

import pytest
import torch
from cases import tables
from supra_kernels import rotary

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOSE = {"atol": 1e-6, "rtol": 1e-6}


def operands(batch, length, heads, width, rows, rotated=None):
    rng = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(batch, length, heads, width, generator=rng) for _ in range(2))
    return x, dy, *tables(rows, length, rotated or width)


def matrix(cos, sin, width):
    """R [...,K,K] with y = R x: row i has cos_i at i, and sin_i at the other half's place, negative in the first; what
    does not turn has 1 at i."""
    half = cos.shape[-1] // 2
    R = torch.eye(width, dtype=torch.float64).repeat(*cos.shape[:-1], 1, 1)
    for i in range(half):
        for row, column, sign in ((i, i + half, -1), (i + half, i, 1)):
            R[..., row, row], R[..., row, column] = cos[..., row].double(), sign * sin[..., row].double()
    return R


@pytest.mark.parametrize("form", ["chunk", "triton"])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    ("shape", "rows", "rotated"),
    [
        ((2, 5, 3, 8), 2, 8),
        ((2, 5, 17, 12), 1, 12),
        ((1, 1, 1, 2), 1, 2),
        ((1, 3, 16, 64), 1, 64),
        ((2, 3, 2, 11), 2, 6),
    ],
)
def test_rotary_and_its_gradient_equal_a_matrix_and_its_transpose(shape, rows, rotated, relu, form):
    if form == "triton":
        pytest.importorskip("triton")
    x, dy, cos, sin = operands(*shape, rows, rotated)
    R = matrix(cos, sin, shape[-1]).unsqueeze(2)
    leaf = x.to(DEVICE).requires_grad_()
    y = rotary(leaf, cos.to(DEVICE), sin.to(DEVICE), relu=relu, form=form)
    y.backward(dy.to(DEVICE))
    into, passes = (x.double().relu(), x.double() > 0) if relu else (x.double(), 1)
    torch.testing.assert_close(y.detach().cpu().double(), (R @ into.unsqueeze(-1)).squeeze(-1), **CLOSE)
    want = (R.mT @ dy.double().unsqueeze(-1)).squeeze(-1) * passes
    torch.testing.assert_close(leaf.grad.cpu().double(), want, **CLOSE)


@pytest.mark.parametrize("form", ["chunk", "triton"])
def test_the_relu_before_the_rotation_hides_no_nan(form):
    if form == "triton":
        pytest.importorskip("triton")
    x, _, cos, sin = operands(1, 2, 1, 4, 1)
    x[0, 1, 0, 2] = float("nan")
    y = rotary(x.to(DEVICE), cos.to(DEVICE), sin.to(DEVICE), relu=True, form=form)
    assert y.isnan().nonzero().tolist() == [[0, 1, 0, 0], [0, 1, 0, 2]]


@pytest.mark.parametrize(("rows", "length", "rotated"), [(3, 4, 8), (1, 5, 8), (1, 4, 10), (1, 4, 7)])
def test_tables_that_do_not_fit_are_refused(rows, length, rotated):
    x = torch.randn(2, 4, 1, 8)
    with pytest.raises(ValueError, match=r"cos, sin are \[2 or 1, 4, R\], R even and at most 8"):
        rotary(x, *tables(rows, length, rotated))


@pytest.mark.parametrize("form", ["chunk", "triton"])
def test_the_result_has_the_dtype_of_x_whatever_the_tables_have(form):
    if form == "triton":
        pytest.importorskip("triton")
    x, _, cos, sin = (t.to(DEVICE) for t in operands(1, 2, 1, 6, 1, 4))
    y = rotary(x.bfloat16(), cos, sin, form=form)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), rotary(x.bfloat16().float(), cos, sin, form="chunk"), atol=2e-2, rtol=1e-2)


def test_rotary_by_triton_refuses_float64():
    x, _, cos, sin = (t.double() for t in operands(1, 1, 1, 2, 1))
    with pytest.raises(ValueError, match="float64"):
        rotary(x, cos, sin, form="triton")


def test_rotary_by_triton_keeps_the_dtype_takes_strides_and_passes_opcheck():
    pytest.importorskip("triton")
    x, _, cos, sin = (t.to(DEVICE) for t in operands(2, 3, 4, 8, 1))
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(rotary(strided, cos, sin, form="triton"), rotary(x, cos, sin, form="triton"))
    narrow = rotary(x.bfloat16(), cos.bfloat16(), sin.bfloat16(), form="triton")
    assert narrow.dtype == torch.bfloat16
    want = rotary(*(t.bfloat16().double() for t in (x, cos, sin)), form="chunk")
    torch.testing.assert_close(narrow.double(), want, atol=4e-3, rtol=4e-3)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for relu in (False, True):
        torch.library.opcheck(torch.ops.supra.rotary.default, (x.requires_grad_(), cos, sin, relu), test_utils=tests)
        before = x.detach() if relu else None
        torch.library.opcheck(torch.ops.supra.rotary_backward.default, (x.detach(), before, cos, sin), test_utils=tests)
