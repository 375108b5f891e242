"""Laws of adapters: a mixer calls its linear maps and never reads their weights, so that peft can wrap each of them."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tokens
from torch.testing import assert_close

from supra_cli.core.swap import swapped_layers

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def test_lora_on_every_linear_map_begins_at_the_model_trains_merges_and_comes_back(exact, base, mixer, tmp_path):
    model, ids = exact(base, mixer), tokens(2, 90)  # longer than the windows that mixers have by default
    linear = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear and ".mixer." in name}
    with torch.no_grad():
        before = model(ids).logits
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4))
    assert linear <= {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    with torch.no_grad():
        assert_close(adapted(ids).logits, before, **CLOSE)  # lora_B is 0
    train(adapted, ids)
    with torch.no_grad():
        after = adapted(ids).logits
    assert (after - before).abs().max() > 0.05
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(adapted.unload(), tmp_path)
    with torch.no_grad():
        assert_close(again(ids).logits, after, **CLOSE)
        merged = again.merge_and_unload()
        assert_close(merged(ids).logits, after, **CLOSE)
    assert [name for name, _ in swapped_layers(merged)] == [name for name, _ in swapped_layers(exact(base, mixer))]


def train(adapted: PeftModel, ids: torch.Tensor) -> None:
    """Two steps, after which every adapter of a mixer has moved."""
    adapters = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in adapters)
    optimizer = torch.optim.AdamW(adapters.values(), lr=1e-2)
    for _ in range(2):
        adapted(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(parameter.any() for name, parameter in adapters.items() if ".mixer." in name)
