"""What must be set before anything imports triton or a Hugging Face library, and the devices that tests range over."""

import logging
import os
import signal
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, by everything that a test starts too

DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]


@pytest.fixture(scope="session", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """The CPU, and a GPU where there is one: a test that takes it passes on each, number formats and all."""
    return request.param


@pytest.fixture(autouse=True)
def log() -> Iterator[None]:
    """The log as libraries have it, whatever `supra`, called in this process, has made of it before."""
    ours = logging.getLogger("supra_cli")
    yield
    ours.handlers.clear()
    ours.propagate = True
    ours.setLevel(logging.NOTSET)
