"""The rotation by one Triton kernel, in the interpreter or on a GPU, against its matrix in float64."""

from __future__ import annotations

import pytest
import torch
from supra_kernels import rotary

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOSE = {"atol": 1e-6, "rtol": 1e-6}


def operands(batch, length, heads, width, tables):
    """cos and sin of both halves differ, so that halves that are mixed up show."""
    rng = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(batch, length, heads, width, generator=rng) for _ in range(2))
    cos, sin = (torch.randn(tables, length, width, generator=rng) for _ in range(2))
    return x, dy, cos, sin


def matrix(cos, sin):
    """R [...,K,K] with y = R x: row i has cos_i at i, and sin_i at the other half's place, negative in the first."""
    half = cos.shape[-1] // 2
    flat, across = torch.diag_embed(cos.double()), torch.zeros(*cos.shape, 2 * half, dtype=torch.float64)
    for i in range(half):
        across[..., i, i + half], across[..., i + half, i] = -sin[..., i].double(), sin[..., i + half].double()
    return flat + across


@pytest.mark.parametrize("form", ["chunk", "triton"])
@pytest.mark.parametrize(
    ("shape", "tables"), [((2, 5, 3, 8), 2), ((2, 5, 17, 12), 1), ((1, 1, 1, 2), 1), ((1, 3, 16, 64), 1)]
)
def test_rotary_and_its_gradient_equal_a_matrix_and_its_transpose(shape, tables, form):
    if form == "triton":
        pytest.importorskip("triton")
    x, dy, cos, sin = operands(*shape, tables)
    R = matrix(cos, sin).unsqueeze(2)
    leaf = x.to(DEVICE).requires_grad_()
    y = rotary(leaf, cos.to(DEVICE), sin.to(DEVICE), form=form)
    y.backward(dy.to(DEVICE))
    torch.testing.assert_close(y.detach().cpu().double(), (R @ x.double().unsqueeze(-1)).squeeze(-1), **CLOSE)
    torch.testing.assert_close(leaf.grad.cpu().double(), (R.mT @ dy.double().unsqueeze(-1)).squeeze(-1), **CLOSE)


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
    for transposed in (False, True):
        torch.library.opcheck(
            torch.ops.supra.rotary.default, (x.requires_grad_(), cos, sin, transposed), test_utils=tests
        )
