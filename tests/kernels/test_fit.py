"""Tiles for cards with less shared memory than Hopper: what is chosen, and in the interpreter what it computes."""

from __future__ import annotations

import pytest
import torch
from cases import assert_agrees, differentiate, inputs, packed, with_sums

pytest.importorskip("triton")
from supra_kernels.gpu import fit, launch

if torch.cuda.is_available():
    pytest.skip("on a CPU the interpreter runs it, which is off where there is a GPU", allow_module_level=True)

A10 = fit.Card("A10", 101_376, 72, hopper=False)
A100 = fit.Card("A100", 166_912, 108, hopper=False)
SIDE = {"size": 2, "whole": False, "programs": 2, "stages": 3}


def small(size):
    return fit.Card("small", size, 1, hopper=False)


def test_hopper_takes_the_tiles_it_was_tuned_for():
    assert fit.side(fit.H100, 128, 128, **SIDE) == fit.Fit(64, 128, 3, 2)
    assert fit.side(fit.H100, 128, 128, size=4, whole=False, programs=1, stages=2) == fit.Fit(64, 128, 2, 1)
    assert fit.side(fit.H100, 256, 256, size=4, whole=True, programs=1, stages=2) == fit.Fit(64, 256, 2, 1)
    assert fit.walk(fit.H100, 128, 128, size=2, programs=4, stages=3) == fit.Fit(64, 64, 3, 4)
    assert fit.walk(fit.H100, 128, 128, size=4, programs=1, stages=3) == fit.Fit(64, 64, 3, 1)
    assert fit.decay(fit.H100, 128, 128, size=2, programs=2, stages=2) == fit.Fit(64, 64, 2, 2)


def test_less_memory_takes_stages_before_neighbours_and_neighbours_before_width():
    assert fit.side(A100, 128, 128, **SIDE) == fit.Fit(64, 128, 3, 2)
    assert fit.side(A10, 128, 128, **SIDE) == fit.Fit(64, 128, 2, 2)
    assert fit.side(small(48 << 10), 128, 128, **SIDE) == fit.Fit(64, 128, 2, 1)
    assert fit.side(small(25 << 10), 128, 128, **SIDE) == fit.Fit(32, 64, 2, 1)


def test_tiles_are_no_wider_than_the_heads():
    for width in (1, 16, 40, 72):
        chosen = fit.side(fit.H100, width, width, **SIDE)
        assert chosen[:2] == (fit.tile(width), fit.tile(width, 128))


def test_what_fits_no_card_is_said_in_a_sentence():
    with pytest.raises(RuntimeError, match=r"take 149,504 bytes of shared memory, A10 has 101,376: use the form chunk"):
        fit.side(A10, 64, 512, size=4, whole=True, programs=1, stages=2)
    with pytest.raises(RuntimeError, match="H100 has 232,448"):
        fit.side(fit.H100, 512, 512, size=4, whole=True, programs=1, stages=2)
    assert fit.side(A100, 512, 512, size=4, whole=True, programs=1, stages=2) == fit.Fit(64, 512, 2, 1)


def test_a_card_is_read_from_its_properties(monkeypatch):
    class Properties:
        name, multi_processor_count, major = "RTX 4090", 128, 8
        shared_memory_per_block, shared_memory_per_block_optin = 49_152, 101_376

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    fit.card_of.cache_clear()
    assert fit.card_of(torch.device("cuda:7")) == ("RTX 4090", 101_376, 128, False)
    del Properties.shared_memory_per_block_optin
    fit.card_of.cache_clear()
    assert fit.card_of(torch.device("cuda:7")).shared_bytes == 49_152, "ROCm names no other"
    fit.card_of.cache_clear()


@pytest.mark.parametrize("after", ["norm", "sums", "plain"])
@pytest.mark.parametrize("decay", ["fixed", "token"])
def test_narrow_tiles_compute_the_same(decay, after, monkeypatch):
    """Value, gradients and state, packed and padded, with widths of several tiles whatever is narrowed."""
    monkeypatch.setattr(fit, "card_of", lambda device: small(36 << 10))
    launched = []
    for name in ("side", "walk", "decay"):

        def spy(*given, name=name, real=getattr(fit, name), **keys):
            launched.append((name, real(*given, **keys)))
            return launched[-1][1]

        monkeypatch.setattr(fit, name, spy)
    values, segment = inputs(1, 90, 2, 1, 40, 40, decay), packed(1, 90, padding=0.2)
    fused = {"norm": {"norm_eps": 1e-5}, "sums": {"denominator_min": 0.5}, "plain": {}}[after]
    values = with_sums(values) if after == "sums" else values
    got = differentiate("triton", values, torch.float32, segment, **fused)
    assert_agrees(got, differentiate("naive", values, torch.float64, segment, **fused), torch.float32)
    assert {name for name, _ in launched} == {"side", "walk", "decay"}
    assert all(tiles.inner < 64 for name, tiles in launched), launched


@pytest.mark.parametrize(("name", "value", "precision"), [
    ("allow_tf32", True, "tf32"), ("allow_tf32", False, "tf32x3"),
    ("fp32_precision", "tf32", "tf32"), ("fp32_precision", "ieee", "tf32x3"),
])  # fmt: skip
def test_either_name_of_pytorch_s_switch_says_how_fp32_is_multiplied(name, value, precision, monkeypatch):
    """allow_tf32 raises when it is read after the other was set."""
    monkeypatch.setattr(launch, "INTERPRETED", False)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        setattr(matmul, name, value)
        assert launch._precision() == precision
    finally:
        matmul.fp32_precision = before
