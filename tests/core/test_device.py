"""What a device and a number format stand for on machines that are not here: CUDA's functions answer for them."""

from __future__ import annotations

import contextlib

import pytest
import torch

from supra_cli.core import device
from supra_cli.core.errors import ResourceError, UsageError


@pytest.fixture
def gpus(monkeypatch):
    """Make this a machine of GPUs of these compute capabilities, the first being the current one."""

    def be(*capabilities):
        current = [0]

        @contextlib.contextmanager
        def switched(name):
            before = current[0]
            current[0] = int(str(name).partition(":")[2] or current[0])
            yield
            current[0] = before

        def has_bf16(including_emulation=True):
            return including_emulation or capabilities[current[0]] >= (8, 0)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "device", switched)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", has_bf16)
        device._tell_once.cache_clear()

    return be


def test_auto_is_bf16_on_a_gpu_that_has_it_and_fp32_elsewhere(gpus):
    assert device.dtype("auto", "cpu") is torch.float32
    gpus((8, 6))
    assert device.dtype("auto", "cuda") is torch.bfloat16
    assert device.dtype("bfloat16", "cuda:0") is torch.bfloat16


def test_auto_on_a_gpu_without_bf16_is_fp32_and_says_so_once(gpus, caplog):
    gpus((7, 5))
    with caplog.at_level("WARNING", "supra_cli"):
        assert [device.dtype("auto", "cuda") for _ in range(3)] == [torch.float32] * 3
    assert [record.getMessage() for record in caplog.records] == ["cuda has no bfloat16, so dtype auto is float32"]


def test_bfloat16_on_a_gpu_without_it_is_refused_in_one_sentence(gpus):
    gpus((7, 0))
    with pytest.raises(ResourceError, match=r"^dtype is bfloat16, which cuda can only emulate; say --dtype float32"):
        device.dtype("bfloat16", "cuda")
    assert device.dtype("float32", "cuda") is torch.float32


def test_each_gpu_of_a_machine_answers_for_itself(gpus):
    gpus((8, 9), (7, 5))
    assert device.dtype("auto", "cuda:0") is torch.bfloat16
    assert device.dtype("auto", "cuda:1") is torch.float32


def test_a_plan_for_a_gpu_on_a_machine_without_one_is_for_a_gpu_of_today(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.dtype("auto", "cuda") is torch.bfloat16


@pytest.mark.parametrize("name", ["cuda:2", "cuda:x", "cuda:-1"])
def test_a_gpu_that_is_not_there_is_refused_with_those_that_are(name, gpus):
    gpus((8, 0), (8, 0))
    assert device.resolve("cuda:1") == "cuda:1"
    with pytest.raises(ResourceError, match=rf"^no device '{name}' on this machine; available: cuda:0, cuda:1$"):
        device.resolve(name)


def test_an_unknown_device_is_a_usage_error():
    with pytest.raises(UsageError, match="unknown device 'cud'; did you mean 'cuda'"):
        device.resolve("cud")
