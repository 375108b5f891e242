"""The operators as torch.library sees them: schemas, fake implementations, gradients, whole graphs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import supra_kernels
import torch
from cases import inputs, packed, tables, with_sums
from supra_kernels import documents, linear_attention

TESTS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def arguments(decay, packing, state, length=40, dtype=torch.float32):
    q, k, v, g, initial = (None if x is None else x.to(dtype) for x in inputs(1, length, 2, 1, 4, 6, decay, state))
    leaves = [None if x is None else x.requires_grad_() for x in (q, k, v, g, initial)]
    return *leaves, documents(packed(1, length)) if packing else None, 0.5


@pytest.mark.parametrize(("decay", "packing"), [("none", False), ("fixed", True), ("token", False)])
def test_the_chunked_operator_passes_opcheck(decay, packing):
    torch.library.opcheck(torch.ops.supra.chunk.default, (*arguments(decay, packing, packing), True), test_utils=TESTS)


@pytest.mark.parametrize(("decay", "packing"), [("fixed", True), ("token", False)])
def test_the_triton_operator_passes_opcheck(decay, packing):
    pytest.importorskip("triton")
    torch.library.opcheck(
        torch.ops.supra.triton.default,
        (*arguments(decay, packing, True, 20), 1e-5 if packing else None, None, not packing),
        test_utils=TESTS,
    )


def test_the_triton_operator_with_a_denominator_passes_opcheck():
    pytest.importorskip("triton")
    q, k, v, g, state = (x.requires_grad_() for x in with_sums(inputs(1, 20, 2, 1, 4, 6, "token")))
    torch.library.opcheck(
        torch.ops.supra.triton.default,
        (q, k, v, g, state, documents(packed(1, 20)), 0.5, None, 0.5, False),
        test_utils=TESTS,
    )


def test_the_decode_step_operator_passes_opcheck():
    pytest.importorskip("triton")
    q, k, v, g, state, _, scale = (x.detach() if torch.is_tensor(x) else x for x in arguments("fixed", False, True, 1))
    torch.library.opcheck(
        torch.ops.supra.triton_step.default, (q, k, v, g, state, None, None, False, scale, None, None, True)
    )
    beside = with_sums([q, k, v, g, state])
    given = (*beside, *tables(1, 1, 4), True, scale, None, 0.5, False)
    torch.library.opcheck(torch.ops.supra.triton_step.default, given)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_caller_holds_the_operator_in_one_graph(dynamic):
    def call(q, k, v, g):
        o, S = linear_attention(q * 2, k, v, g, form="chunk")
        return o.square().sum() + S.sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (40, 70):
        q, k, v, g, *_ = arguments("fixed", False, False, length)
        want = torch.autograd.grad(call(q, k, v, g), (q, k, v, g))
        got = torch.autograd.grad(compiled(q, k, v, g), (q, k, v, g))
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y)


def test_only_the_final_state_may_be_used():
    q, k, v, g, state, _, _ = arguments("fixed", False, True, dtype=torch.float64)
    _, S = linear_attention(q, k, v, g, state=state, form="chunk")
    _, want = linear_attention(q, k, v, g, state=state, form="naive")
    leaves = (k, v, g, state)
    for x, y in zip(torch.autograd.grad(S.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True):
        torch.testing.assert_close(x, y)


def test_the_package_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from supra_kernels import linear_attention\n"
        "q = torch.ones(1, 8, 1, 2); linear_attention(q, q, q)\n"
        "linear_attention(q, q, q, form='triton')"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(supra_kernels.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert "needs the package triton, which is not installed" in done.stderr.splitlines()[-1]
