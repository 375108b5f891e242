"""No mixer and no form of the operator asks the device for a number or mixes devices.

Under FakeTensorMode a question for a number (`bool(mask.all())`, `.item()`, a size that depends on values) raises, and
so does an operation on tensors of two devices. Tensors are on the meta device, and nothing makes that the default: a
tensor made without a device would be on the CPU.
"""

from __future__ import annotations

import pytest
import torch
from supra_kernels import chunk, documents
from supra_kernels import step as steps
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from supra_cli.core import ops
from supra_cli.core.layout import HeadSpec, Layout
from supra_cli.core.mixers import mixers, parse_options

SPEC = HeadSpec(heads=4, kv_heads=2, head_dim=8, v_dim=6, model_dim=32, layer=0, scale=8**-0.5)
RECURRENT = [(name, options) for name in mixers if name != "softmax" for options in ({}, *mixers.get(name).variants)]


def meta(*shape, **keys):
    return torch.empty(shape, device="meta", **keys)


def layouts(tokens):
    """None, and a segment alone and as a forward pass shares it; what is in it nobody knows."""
    segment = meta(2, tokens, dtype=torch.long)
    return None, Layout(segment), Layout.of(segment)


def call(mixer, tokens, layout, state, grad):
    shapes = ((2, tokens, heads, width) for heads, width in ((4, 8), (2, 8), (2, 6)))
    q, k, v = (meta(*shape, requires_grad=grad) for shape in shapes)
    rope = ops.Rotation(meta(1, tokens, 8), meta(1, tokens, 8))
    with torch.set_grad_enabled(grad):
        o, state = mixer(q, k, v, meta(2, tokens, 32), rope, state, layout)
        if grad:
            o.sum().backward()
            assert {x.grad.device.type for x in (q, k, v)} == {"meta"}
    assert o.device.type == "meta"
    assert {part.device.type for part in state} == {"meta"}
    return state


def test_a_question_for_a_number_raises_here():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        bool(meta(3, dtype=torch.bool).all())


@pytest.mark.parametrize("path", [None, "triton", "torch"])
@pytest.mark.parametrize(("name", "options"), RECURRENT)
def test_prefill_and_decode_steps_and_backward_ask_nothing_of_the_device(name, options, path):
    """Alone, with padding and packed; `path` is what runs on a CPU, on a GPU, and on one too old for Triton."""
    with FakeTensorMode(), ops.planning(path):
        with torch.device("meta"):
            mixer = mixers.get(name)(SPEC, parse_options(name, options))
        for prompt in layouts(37):
            state = call(mixer, 37, prompt, None, grad=False)
            for later in layouts(1):
                state = call(mixer, 1, later, state, grad=False)
            call(mixer, 37, prompt, None, grad=True)
            call(mixer, 37, prompt, mixer.init_state(2, "meta"), grad=True)


def test_softmax_asks_nothing_of_the_device_either():
    with FakeTensorMode():
        mixer = mixers.get("softmax")(SPEC, mixers.get("softmax").Options())
        for layout in layouts(9):
            q, k, v = (meta(2, 9, heads, width) for heads, width in ((4, 8), (2, 8), (2, 6)))
            o, _ = mixer(q, k, v, meta(2, 9, 32), lambda x: x, None, layout)
            assert o.device.type == "meta"


@pytest.mark.parametrize("decay", ["none", "fixed", "token"])
def test_the_chunked_and_the_step_form_ask_nothing_inside(decay):
    """Which FakeTensorMode does not see from outside, the chunked form being one operator."""
    with FakeTensorMode():
        q, do, k, v = meta(2, 150, 4, 8), meta(2, 150, 4, 6), meta(2, 150, 2, 8), meta(2, 150, 2, 6)
        g = {"none": None, "fixed": meta(4), "token": meta(2, 150, 4)}[decay]
        state, numbers = meta(2, 4, 8, 6), documents(meta(2, 150, dtype=torch.long))
        o, S, starts = chunk.forward(q, k, v, g, state, numbers, 1.0, True)
        chunk.backward(do, S, q, k, v, g, numbers, starts, 1.0, g is not None)
        first = [None if x is None else x if x.dim() == 1 else x[:, :3] for x in (q, k, v, g)]
        o, S = steps.step(*first, state=state, documents=numbers[:, :3])
        assert (o.device.type, S.device.type) == ("meta", "meta")


@pytest.mark.parametrize("decay", ["none", "fixed", "token"])
@pytest.mark.parametrize("after", [(1e-5, None), (None, 0.5)])
def test_the_launcher_of_the_kernels_asks_nothing(decay, after, monkeypatch):
    """As on a GPU, with every kernel a launch that does nothing."""
    pytest.importorskip("triton")
    from supra_kernels import library
    from supra_kernels.gpu import launch, tokens

    class NoKernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: None

    for module in (launch, tokens):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, NoKernel())
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with FakeTensorMode():
        q, k, v = meta(2, 150, 4, 8), meta(2, 150, 2, 8), meta(2, 150, 2, 6)
        g = {"none": None, "fixed": meta(4), "token": meta(2, 150, 4)}[decay]
        numbers, state = documents(meta(2, 150, dtype=torch.long)), meta(2, 4, 8, 6 + (after[1] is not None))
        o, S, row = library._triton(q, k, v, g, state, numbers, 1.0, *after)
        d_row = None if after[1] is None else torch.empty_like(row)
        given = (q, k, v, g, state, numbers, 1.0, o, row, d_row, after[1], g is not None)
        library._triton_backward(torch.empty_like(o), S, *given)
        one = [None if x is None else x if x.dim() == 1 else x[:, :1] for x in (q, k, v, g)]
        library._triton_step(*one, S, meta(1, 1, 8), meta(1, 1, 8), True, 1.0, *after)
