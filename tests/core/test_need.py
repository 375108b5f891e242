"""`keep = auto:N`: each layer alone with its mixer, and the neediest softmax again."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_base, tiny_model

from supra_cli.core import checkpoint, need
from supra_cli.core.data.packing import Batch
from supra_cli.core.errors import NonFiniteError, UsageError
from supra_cli.core.evaluate.nats import next_tokens

TEXT = "def read(self, size=-1):\n    return self.buffer[:size]\n" * 50


def batch(rows: int = 2) -> Batch:
    ids = torch.randint(3, 90, (rows, 24), generator=torch.Generator().manual_seed(rows))
    positions = torch.arange(24).repeat(rows, 1)
    positions[:, 10:] -= 10  # two documents a row
    return Batch(ids, positions, next_tokens(ids, positions))


@torch.no_grad()
def test_a_layer_is_judged_alone_in_the_model_that_was():
    torch.manual_seed(0)
    student = tiny_model("llama", "t2r").eval()
    batches = [batch(2), batch(3)]
    found = need.divergences(student, batches)
    for layer in range(3):
        wanted = 0.0
        for rows in batches:
            logits = []
            for keep in ("all", ",".join(str(other) for other in range(3) if other != layer)):
                model = tiny_model("llama", "t2r", keep).eval()
                shared = {name: x for name, x in student.state_dict().items() if name in model.state_dict()}
                model.load_state_dict(shared)
                logits.append(model(rows.input_ids, position_ids=rows.position_ids).logits.log_softmax(-1))
            each = (logits[0].exp() * (logits[0] - logits[1])).sum(-1)
            wanted += float(each[rows.labels >= 0].sum())
        assert found[layer] == pytest.approx(wanted / sum(rows.targets for rows in batches), rel=1e-4)


def test_a_divergence_that_is_no_number_ranks_nothing():
    student = tiny_model("llama", "t2r").eval()
    with torch.no_grad():
        student.model.norm.weight[3] = math.nan
    with pytest.raises(NonFiniteError, match=r"layer 0 is not finite.*weights"):
        need.divergences(student, [batch()])


def test_the_neediest_are_softmax_again_and_the_rest_is_as_it_was(tmp_path):
    base = save_base(tmp_path / "base", [TEXT])
    source = checkpoint.convert(base, tmp_path / "student", mixer="t2r", options={}, keep="none", seed=0)
    need.restore(source, tmp_path / "hybrid", checkpoint.load(source), [0, 2], overwrite=False)
    assert (tmp_path / "hybrid" / "model-base.safetensors").samefile(source / "model-base.safetensors")
    hybrid = checkpoint.load(tmp_path / "hybrid")
    assert hybrid.config.swap.layers == ["softmax", "t2r", "softmax"]
    before = checkpoint.load(source).state_dict()
    assert all(tensor.equal(before[name]) for name, tensor in hybrid.state_dict().items())
    assert {name.split(".")[2] for name in load_file(tmp_path / "hybrid" / "model-mixers.safetensors")} == {"1"}
    assert checkpoint.read_provenance(tmp_path / "hybrid")["base"] == checkpoint.read_provenance(source)["base"]
    # A recipe that says auto:2 goes on from such a student and from no other.
    assert hybrid.config.with_mixer("t2r", {}, "auto:2").swap.layers == hybrid.config.swap.layers
    with pytest.raises(UsageError, match="no layer has been ranked"):
        hybrid.config.with_mixer("t2r", {}, "auto:1")


def test_all_layers_may_be_softmax_again(tmp_path):
    base = save_base(tmp_path / "base", [TEXT])
    source = checkpoint.convert(base, tmp_path / "student", mixer="t2r", options={}, keep="none", seed=0)
    need.restore(source, tmp_path / "all", checkpoint.load(source), [0, 1, 2], overwrite=False)
    assert checkpoint.load(tmp_path / "all").config.swap.layers == ["softmax"] * 3


def test_the_largest_are_taken():
    assert need.most_needed({0: 0.1, 1: 0.7, 2: 0.3}, "auto:2") == [1, 2]
