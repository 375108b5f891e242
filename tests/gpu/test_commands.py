"""The command line on a GPU, each verb a process of its own; `uptrain` also as torchrun's one rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w
import torch
from tiny import save_base
from transformers import AutoTokenizer

from supra_cli.core import checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TEXT = "def read(self, size=-1):\n    return self.buffer[:size]\n" * 400
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a base, a student of it, a text and a recipe."""
    folder = tmp_path_factory.mktemp("commands")
    save_base(folder / "base", [TEXT], hidden_size=256, head_dim=64, intermediate_size=512, num_hidden_layers=4)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    stage = {"tokens": 8192, "batch_tokens": 2048, "lr": 1e-3}
    recipe = {
        "base": "base",
        "keep": "1",
        "data": {"seq_len": 256, "sources": [{"path": "text.txt"}]},
        "stages": [
            {"kind": "transfer", **stage},
            {"kind": "distill", **stage},
            {"kind": "finetune", **stage, "activation_checkpointing": True},
        ],
    }
    (folder / "recipe.toml").write_text(tomli_w.dumps(recipe), encoding="utf-8")
    supra(folder, "convert", "base", "-o", "student", "--keep", "1")
    return folder


def supra(folder: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "SUPRA_CACHE": str(folder / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, *launcher, "-m", "supra_cli", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_doctor_names_the_card(folder: Path) -> None:
    assert torch.cuda.get_device_name() in supra(folder, "doctor")


def test_a_run_is_the_same_alone_and_as_one_rank_of_torchrun(folder: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")
    for name, launcher in (("alone", ()), ("ranked", torchrun)):
        supra(folder, "uptrain", "-r", "recipe.toml", "--model", "student", "-o", name, launcher=launcher)
    alone, ranked = losses(folder / "alone"), losses(folder / "ranked")
    assert len(alone) == 12
    assert ranked == pytest.approx(alone, rel=2e-2)
    assert alone[-1] < alone[-4]


@pytest.mark.parametrize("given", [(), ("--compile",), ("--dtype", "float32")], ids=" ".join)
def test_text_is_written(folder: Path, given: tuple[str, ...]) -> None:
    prompts = ("-p", "def read", "-p", "d")
    supra(folder, "generate", "student", *prompts, "--max-new-tokens", "40", "--temperature", "0", *given)


def test_compiled_text_is_the_same(folder: Path) -> None:
    call = ("generate", "student", "-p", "def read", "--max-new-tokens", "40", "--temperature", "0", "--quiet")
    call = (*call, "--dtype", "float32")
    assert supra(folder, *call, "--compile") == supra(folder, *call)


def test_bench_runs(folder: Path) -> None:
    supra(folder, "bench", "decode", "student")


@pytest.mark.parametrize("engine", ["triton", "torch"])
def test_an_exported_model_is_the_same_without_this_package(folder: Path, engine: str) -> None:
    """By the Triton kernels where `supra_kernels` can be imported, by the PyTorch form otherwise; says which, once."""
    if not (folder / "exported").exists():
        supra(folder, "export", "student", "-o", "exported")
    hidden = ("supra_cli",) if engine == "triton" else ("supra_cli", "supra_kernels")
    code = f"""
import logging, sys
sys.modules.update(dict.fromkeys({hidden}))
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("exported", trust_remote_code=True, dtype=torch.float32).cuda()
text = AutoTokenizer.from_pretrained("exported", trust_remote_code=True)
ids = text("def read", return_tensors="pt").to("cuda")
logging.basicConfig(level=logging.INFO)
print(model.generate(**ids, do_sample=False, max_new_tokens=24)[0].tolist())
with torch.no_grad():
    torch.save(model(ids.input_ids).logits.cpu(), "{engine}.pt")
"""
    path = os.pathsep.join([str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub"), "PYTHONPATH": path}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    model = checkpoint.load(folder / "student", dtype=torch.float32, device="cuda")
    ids = AutoTokenizer.from_pretrained(folder / "student")("def read", return_tensors="pt").to("cuda")
    wanted = model.generate(**ids, do_sample=False, max_new_tokens=24)[0].tolist()
    assert json.loads(done.stdout.splitlines()[-1]) == wanted
    with torch.no_grad():
        logits = model(ids.input_ids).logits.cpu()
    torch.testing.assert_close(torch.load(folder / f"{engine}.pt"), logits, rtol=1e-4, atol=1e-4)
    assert done.stderr.count(f"linear attention: {engine} on cuda") == 1, done.stderr[-3000:]
