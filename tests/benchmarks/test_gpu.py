"""What `make gpu` runs, where there may be little more than torch, triton, transformers, pytest and pydantic."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MistralConfig

from benchmarks import gpu, measure
from supra_cli.core import bench
from supra_cli.core.flops import operator_flops
from supra_cli.core.generate import steps
from supra_cli.core.modeling import SupraConfig, SupraForCausalLM
from supra_cli.core.ops import linear_attention

ROOT = Path(__file__).resolve().parents[2]
END_TO_END = "tests/gpu/test_end_to_end.py"
ABSENT = (
    "typer", "rich", "lm_eval", "datasets", "accelerate", "hypothesis", "pytest_timeout", "torchao",
    "supra_cli.commands",
)  # fmt: skip
BLOCK = f"import sys; sys.modules.update(dict.fromkeys({ABSENT}))\n"


def alone(code: str) -> subprocess.CompletedProcess:
    """`code` in a process that can import none of ABSENT and sees no installation of this package."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-c", BLOCK + code]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


def test_the_gpu_tests_are_collected_with_little_installed():
    arguments = [*gpu.TESTS, "--collect-only", "tests/gpu", "tests/kernels/test_triton_gpu.py"]
    arguments = [part for part in arguments[2:] if part not in gpu.SIDE_BY_SIDE]
    done = alone(f"import pytest; sys.exit(pytest.main({arguments}))")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_decode_steps_in_a_cuda_graph" in done.stdout


def test_the_end_to_end_file_runs_with_little_installed():
    """On a CPU, as far as the teacher's own text."""
    arguments = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", "-k", "teacher_is_that", END_TO_END]
    done = alone(f"import pytest; sys.exit(pytest.main({arguments}))")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_the_benchmarks_run_with_little_installed(tmp_path):
    """Every command of `make gpu` on a tiny model: as it is there, but for device, model and sizes."""
    small = {
        "operator": ["--tokens", "65"],
        "step": ["--batches", "1", "2"],
        "decode": ["--model", "tiny", "--layers", "2", "--positions", "3", "5", "--batch", "2"],
        "train": ["--model", "tiny", "--layers", "2", "--shapes", "2x9"],
    }
    wanted = [arguments[1:] for _, arguments in gpu.PARTS.values() if arguments[0] == gpu.MEASURE]
    given = [[*asked, *small[asked[0]]] for asked in wanted]
    assert {asked[0] for asked in given} == set(small)
    code = f"""
import runpy
for number, given in enumerate({given}):
    sys.argv = ["measure", *given, "--device", "cpu", "--rounds", "1", "--output", f"{tmp_path}/{{number}}.json"]
    runpy.run_path("benchmarks/measure.py", run_name="__main__")
"""
    done = alone(code)
    assert done.returncode == 0, done.stderr[-3000:]
    for number, asked in enumerate(given):
        rows = json.loads((tmp_path / f"{number}.json").read_text())["rows"]
        assert all(row["matrix_gflops"] > 0 and row["roofline_ms"] > 0 for row in rows)
        if asked[0] == "train":
            assert [(row["mixer"], row["layers"]) for row in rows] == [("softmax", 2), ("supra", 2)]
            assert rows[0]["over_softmax"] == 1


@pytest.mark.parametrize(
    ("found", "measured"),
    [
        (
            {
                "benchmark": "operator",
                "rows": [
                    {"tokens": 8192, "ms": 2.0, "over_softmax": 6.0, "over_fla": None, "share_of_copy_rate": 0.7},
                    {"tokens": 32768, "ms": 7.0, "over_softmax": 20.0, "over_fla": None, "share_of_copy_rate": 0.8},
                ],
            },
            [6.0, None, 0.7, 3.5],
        ),
        (
            {"benchmark": "step", "rows": [{"batch": b, "share_of_copy_rate": s} for b, s in ((4, 0.1), (16, 0.9))]},
            [0.9],
        ),
        (
            {"benchmark": "decode", "model": "m", "rows": [{"over_softmax": 1.0}, {"over_softmax": 3.5}]},
            [3.5],
        ),
    ],
    ids=lambda given: given.get("benchmark") if isinstance(given, dict) else "",
)
def test_what_is_asked_of_a_gpu_is_held_against_its_rows(found, measured):
    assert [target["measured"] for target in measure.asked(found, "cuda")] == measured


def test_the_share_of_a_data_sheet_is_that_of_the_card(monkeypatch):
    shares = {}
    for card in ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA GeForce RTX 3090"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda card=card: card)
        shares[card] = measure.with_mfu([{"gflops": 312_000.0}])[0]["mfu"]
    assert list(shares.values()) == [pytest.approx(312 / 989), 1.0, None]


def test_all_parts_fit_in_ten_minutes_and_exist():
    assert sum(seconds for seconds, _ in gpu.PARTS.values()) <= gpu.SECONDS <= 595
    for _, arguments in gpu.PARTS.values():
        assert any((ROOT / argument).exists() for argument in arguments)


def test_the_way_of_a_model_from_end_to_end_is_tried_before_anything_is_measured():
    assert next(iter(gpu.PARTS)) == "tests"
    assert all(limit >= 40 for limit, _ in gpu.PARTS.values())


def test_no_benchmark_hides_a_module_that_others_import():
    """A script's own folder comes first on the path."""
    names = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert not names & {*sys.stdlib_module_names, *packages_distributions(), "fla"}


def test_a_part_that_fails_leaves_the_others_be(monkeypatch, tmp_path, capfd):
    good = tmp_path / "good.py"
    met = {"what": "x", "bound": "at least", "target": 1, "measured": 2.5}
    good.write_text(f"import json, sys; json.dump({{'targets': [{met}]}}, open(sys.argv[-1], 'w'))")
    slow = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(99)'])"
    parts = {"bad": (20, ["-c", "raise SystemExit(3)"]), "slow": (0.2, ["-c", slow]), "good": (20, [str(good)])}
    monkeypatch.setattr(gpu, "MEASURES", (str(good),))
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(tmp_path), "--seconds", "0"])
    assert gpu.main() == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [part["verdict"] for part in found["parts"]] == ["exit 3", "over 0.2 s", "ok"]
    assert capfd.readouterr().out.splitlines()[-1] == "x: 2.5 (at least 1)"


def test_a_part_that_is_not_there_is_said(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "operators"])
    with pytest.raises(SystemExit, match="2"):
        gpu.main()
    assert "no part 'operators' here; there are tests" in capsys.readouterr().err


SMALL = MistralConfig(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, sliding_window=None,
)  # fmt: skip


class HostTraffic(TorchDispatchMode):
    """What a CUDA graph cannot hold: tensors made from numbers of the host, and numbers asked of the device."""

    FORBIDDEN = ("aten.lift_fresh", "aten._local_scalar_dense", "aten.nonzero")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen += [name for name in self.FORBIDDEN if str(function).startswith(name)]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["softmax", "supra"])
def test_a_decode_step_can_be_captured(kind):
    torch.manual_seed(0)
    model = SupraForCausalLM._from_config(SupraConfig.from_base(SMALL, mixer=kind)).eval()
    token, cache = torch.zeros(2, dtype=torch.long), bench._read(model, 2, 16)
    given = (model, token, torch.full_like(token, 15), None, cache)
    steps.decode(*given)
    before = [layer.state.S if kind == "supra" else layer.keys for layer in cache.layers]
    with HostTraffic() as traffic:
        steps.decode(*given)
    assert not traffic.seen
    after = [layer.state.S if kind == "supra" else layer.keys for layer in cache.layers]
    assert [x.data_ptr() for x in before] == [x.data_ptr() for x in after]


def test_a_mask_covers_the_keys_that_a_step_reads():
    """Which transformers 5.17 writes out while a stream is captured, wanted or not; here padding makes it."""
    model = SupraForCausalLM._from_config(SupraConfig.from_base(SMALL, mixer="softmax")).eval()
    token, mask = torch.zeros(2, dtype=torch.long), torch.ones(2, 16, dtype=torch.long)
    mask[0, 0] = 0
    logits, cache = steps.decode(model, token, torch.full_like(token, 15), mask, bench._read(model, 2, 16))
    assert logits.shape == (2, 97)
    assert {layer.keys.shape[-2] for layer in cache.layers} == {16}


@pytest.mark.parametrize("path", ["torch", "triton"])
def test_flops_are_counted_inside_the_operator_too(path):
    if path == "triton":
        pytest.importorskip("triton")
    device = "cuda" if path == "triton" and torch.cuda.is_available() else "cpu"
    q, k, v = (torch.randn(1, 128, 2, 64, device=device, requires_grad=True) for _ in range(3))
    forward, backward = operator_flops(128 * 2, 64, 64, 64)
    assert bench.counted_flops(lambda: linear_attention(q, k, v, path=path)) == forward
    assert bench.counted_flops(lambda: linear_attention(q, k, v, path=path)[0].sum().backward()) == forward + backward
