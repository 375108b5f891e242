"""A run that cannot start says why and leaves everything as it was: nothing made, nothing cleared."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tomli_w
from safetensors.torch import load_file, save_file

from supra_cli.core import corpus
from supra_cli.core.data import tokenizer as bpe

TEXT = "def read(self, size=-1):\n    return self.buffer[:size]\n"
STAGE = {"tokens": 128, "batch_tokens": 64, "lr": 1e-3}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUPRA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """Where recipes and data lie: good text, text that is too short, and bases that cannot be taken."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "text.txt").write_text(TEXT * 100)
    (folder / "short.txt").write_text("a")
    (folder / "records.jsonl").write_text('{"txt": "a"}\n' * 50)
    for name in ("damaged", "not-finite", "small-vocabulary", "no-tokenizer"):
        shutil.copytree(base, folder / name)
    weights = folder / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    spoilt = load_file(folder / "not-finite" / "model.safetensors")
    spoilt["model.norm.weight"][0] = float("nan")
    save_file(spoilt, folder / "not-finite" / "model.safetensors", metadata={"format": "pt"})
    for file in (folder / "no-tokenizer").glob("tokenizer*"):
        file.unlink()
    more = "".join(document.text for document in islice(corpus.documents("validation"), 5))
    bpe.train([more], 400).save_pretrained(folder / "small-vocabulary")
    return folder


@pytest.fixture
def recipe(folder: Path, base: Path) -> Callable[..., Path]:
    def write(**replaced: Any) -> Path:
        data = {"seq_len": 32, "sources": [{"path": "text.txt"}], "validation": [{"path": "text.txt"}]}
        raw = {"base": str(base), "stages": [{"kind": "finetune", **STAGE}], **replaced}
        raw["data"] = data | {"validation_tokens": 64} | raw.get("data", {})
        path = folder / "recipe.toml"
        path.write_text(tomli_w.dumps({key: value for key, value in raw.items() if value is not None}))
        return path

    return write


def stage(**settings: Any) -> dict[str, Any]:
    return {"stages": [{"kind": "finetune", **STAGE}, STAGE | settings]}


def source(**settings: Any) -> dict[str, Any]:
    return {"data": {"sources": [settings]}}


SCRATCH = {"base": None, "init": "scratch", "tokenizer": {"vocab_size": 300}}
TINY = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
HUGE = 10**18
FAULTS = {
    "a missing file": (source(path="missing.txt"), 3, "missing.txt"),
    "too little text": (source(path="short.txt"), 1, "fewer than one row"),
    "another field": (source(path="records.jsonl"), 1, "did you mean 'txt'"),
    "a dataset that is not reached": (source(path="org/set", repeat="text"), 3, "org/set"),
    "missing validation text": ({"data": {"validation": [{"path": "missing.txt"}]}}, 3, "missing.txt"),
    "too little validation text": ({"data": {"validation": [{"path": "short.txt"}]}}, 1, "at least one is needed"),
    "layers that are not there": ({"keep": "first:9"}, 2, "keep is 'first:9'"),
    "an impossible window": ({"mixer": {"name": "window", "window": 0}}, 2, "mixer.window"),
    "no such base": ({"base": "no-such-model"}, 3, "no-such-model"),
    "a damaged base": ({"base": "./damaged"}, 1, "damaged"),
    "a base that is not finite": ({"base": "./not-finite"}, 1, "is not finite"),
    "a tokenizer too large": ({"base": "./small-vocabulary"}, 1, "they do not belong together"),
    "no tokenizer": ({"base": "./no-tokenizer"}, 3, "has no tokenizer"),
    "nothing to train": ({"mixer": {"name": "softmax"}} | stage(kind="transfer"), 2, "nothing to train"),
    "a mixer without parameters": ({"mixer": {"name": "retention"}} | stage(kind="transfer"), 2, "nothing to train"),
    "activations of a transfer": (stage(kind="transfer", activation_checkpointing=True), 2, "activation_checkpointing"),
    "a teacher in vain": (stage(kind="transfer", teacher="tiny"), 2, "takes no teacher of its own"),
    "no such teacher": (stage(kind="distill", teacher="no-such-model"), 3, "no-such-model"),
    "no teacher": (SCRATCH | {"model": TINY} | stage(kind="distill"), 2, "learns from a teacher"),
    "an unknown shape": (SCRATCH | {"model": {"model_type": "lama"}}, 2, "model.model_type: unknown"),
    "a wrong shape": (SCRATCH | {"model": TINY | {"hidden_size": "wide"}}, 2, "[model]"),
    "a shape too large": (SCRATCH | {"model": TINY | {"intermediate_size": HUGE}}, 2, "[model]"),
    "too many layers": (SCRATCH | {"model": TINY | {"num_hidden_layers": 10**9}}, 2, "expected at most 1024"),
    "no layer": (SCRATCH | {"model": TINY | {"num_hidden_layers": 0}}, 2, "it has no layer"),
    "more weights than memory": (SCRATCH | {"model": TINY | {"intermediate_size": 10**10}}, 5, "GiB of weights"),
    "more words than memory": (SCRATCH | {"model": TINY | {"vocab_size": 10**12}}, 5, "GiB of weights"),
    "an absent tracker": ({"track": ["wandb"]}, 2, "pip install wandb"),
    "a tracker that wants a login": ({"track": ["trackio"]}, 1, "'trackio' does not start (no key for trackio)"),
    "a tracker that cannot write": ({"track": ["tensorboard"]}, 1, "'tensorboard' does not start (no room)"),
    "absent 8-bit moments": (stage(kind="finetune", optimizer="adamw8bit"), 2, "pip install torchao"),
}


class NoKey(Exception):
    """As wandb has a kind of its own: `wandb.Error`."""


def refuse(error: BaseException) -> Callable[..., None]:
    def start(*_: object, **__: object) -> None:
        raise error

    return start


def contents(folder: Path) -> dict[str, object]:
    """Everything below `folder`, links as links."""
    return {
        str(path.relative_to(folder)): path.readlink() if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def old_run(tmp_path_factory: pytest.TempPathFactory, folder: Path, base: Path) -> Path:
    from supra_cli.__main__ import main

    output = tmp_path_factory.mktemp("old") / "run"
    path = folder / "old.toml"
    data = {"seq_len": 32, "sources": [{"path": "text.txt"}]}
    path.write_text(tomli_w.dumps({"base": str(base), "data": data, "stages": [{"kind": "finetune", **STAGE}]}))
    assert main(["uptrain", "--recipe", str(path), "-o", str(output)]) == 0
    return output


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_that_cannot_start_leaves_everything_as_it_was(
    fault, supra, recipe, old_run, tmp_path, monkeypatch
) -> None:
    replaced, code, told = FAULTS[fault]
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    trackio = SimpleNamespace(init=refuse(NoKey("no key for trackio")), Error=NoKey)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    tensorboard = SimpleNamespace(SummaryWriter=refuse(OSError("no room")))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    shutil.copytree(old_run, tmp_path / "old", symlinks=True)
    before = contents(tmp_path)
    for arguments in (("-o", "new/run"), ("-o", "old", "--overwrite")):
        result = supra("uptrain", "--recipe", recipe(**replaced), *arguments)
        assert result.code == code, result.err
        assert told in result.err
        assert "internal error" not in result.err
        assert contents(tmp_path) == before


@pytest.mark.parametrize("change", [{"model_type": "lama"}, {"num_hidden_layers": -1}, {"num_attention_heads": 10**9}])
def test_a_shape_that_is_none_is_not_planned_either(change, supra, recipe) -> None:
    result = supra("uptrain", "--recipe", recipe(**SCRATCH | {"model": TINY | change}), "--dry-run")
    assert result.code == 2, result.err
    assert ("model.model_type: unknown" if "model_type" in change else "[model] describes no model") in result.err


@pytest.mark.parametrize("replaced", [{"keep": "first:1"}, {"base": "no-such-model", "mixer": {"name": "gated"}}])
def test_a_model_that_is_not_the_recipes_leaves_everything_as_it_was(
    replaced, supra, recipe, old_run, base, tmp_path
) -> None:
    shutil.copytree(old_run, tmp_path / "old", symlinks=True)
    assert supra("convert", base, "-o", "converted").code == 0
    before = contents(tmp_path)
    for arguments in (("-o", "new/run"), ("-o", "old", "--overwrite")):
        result = supra("uptrain", "--recipe", recipe(**replaced), "--model", "converted", *arguments)
        assert result.code == 2, result.err
        assert "the recipe asks for" in result.error
        assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["trackio", "tensorboard"])
def test_a_resume_without_its_tracker_leaves_everything_as_it_was(name, supra, recipe, tmp_path, monkeypatch) -> None:
    longer = {"stages": [{"kind": "finetune", **STAGE}, {"kind": "finetune", **STAGE, "lr": 1e30}]}
    assert supra("uptrain", "--recipe", recipe(**longer), "-o", "run").code == 1  # its second loss is not finite
    before = contents(tmp_path)
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=refuse(ValueError("no key"))))
    library = SimpleNamespace(SummaryWriter=refuse(OSError("no room")))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", library)
    result = supra("uptrain", "--recipe", recipe(**longer, track=[name]), "-o", "run", "--resume")
    assert result.code == 1
    assert f"'{name}' does not start" in result.error
    assert contents(tmp_path) == before


@pytest.mark.parametrize("file", ["env.json", "recipe.toml", "tokenizer.json", "model-mixers.safetensors"])
def test_a_disk_that_fills_at_the_start_leaves_everything_as_it_was(
    file, supra, recipe, old_run, tmp_path, monkeypatch
) -> None:
    """Full: `file` is the one that no longer fits."""
    from supra_cli.core.checkpoint import slices

    def fits(path: object) -> None:
        if file in Path(os.fsdecode(path)).name:  # or beside it, where a file is put in place once it is whole
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def checked(write: Callable[..., object], place: int) -> Callable[..., object]:
        return lambda *given, **named: fits(given[place]) or write(*given, **named)

    shutil.copytree(old_run, tmp_path / "old", symlinks=True)
    before, path = contents(tmp_path), recipe()
    monkeypatch.setattr(Path, "write_text", checked(Path.write_text, 0))
    monkeypatch.setattr(Path, "write_bytes", checked(Path.write_bytes, 0))
    monkeypatch.setattr(slices, "_write", checked(slices._write, 2))
    for arguments in (("-o", "new/run"), ("-o", "old", "--overwrite")):
        result = supra("uptrain", "--recipe", path, *arguments)
        assert result.code == 1, result.err
        assert "make room" in result.error or "the disk is full" in result.error
        assert contents(tmp_path) == before


def test_an_interrupt_at_the_start_leaves_everything_as_it_was(supra, recipe, old_run, tmp_path, monkeypatch) -> None:
    """The second Ctrl-C, that is; the first lets the run come to its first step and save."""
    from supra_cli.core import checkpoint

    shutil.copytree(old_run, tmp_path / "old", symlinks=True)
    before = contents(tmp_path)
    monkeypatch.setattr(checkpoint, "convert", refuse(KeyboardInterrupt()))
    for arguments in (("-o", "new/run"), ("-o", "old", "--overwrite")):
        assert supra("uptrain", "--recipe", recipe(), *arguments).code == 130
        assert contents(tmp_path) == before


@pytest.mark.parametrize("flag", ["--overwrite", "--resume"])
def test_what_no_run_has_written_is_never_cleared(flag, supra, recipe, tmp_path) -> None:
    for name in ("eval/mine.py", "step-1/mine.txt", "metrics.jsonl"):
        (tmp_path / "project" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "project" / name).write_text("mine")
    before = contents(tmp_path)
    result = supra("uptrain", "--recipe", recipe(), "-o", "project", flag)
    assert result.code == 2, result.err
    assert "holds files but no run" in result.error
    assert contents(tmp_path) == before


def test_an_output_that_cannot_be_made_is_exit_2(supra, recipe, tmp_path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "file").touch()
    for output in ("link", "link/run", "file/run"):
        result = supra("uptrain", "--recipe", recipe(), "-o", output)
        assert result.code == 2, result.err
        assert f"cannot make {output}" in result.error


def test_a_resume_that_cannot_go_on_leaves_everything_as_it_was(supra, recipe, folder, tmp_path) -> None:
    text = folder / "own.txt"
    text.write_text(TEXT * 100)
    own = source(path=str(text))
    longer = {"stages": [{"kind": "finetune", **STAGE}, {"kind": "finetune", **STAGE, "lr": 1e30}]}
    assert supra("uptrain", "--recipe", recipe(**own, **longer), "-o", "run").code == 1  # its second loss is not finite
    before = contents(tmp_path)
    for content, code in ((TEXT * 99, 1), ("", 1), (None, 3)):
        text.unlink() if content is None else text.write_text(content)
        result = supra("uptrain", "--recipe", recipe(**own, **longer), "-o", "run", "--resume")
        assert result.code == code, result.err
        assert "own.txt" in result.error
        assert contents(tmp_path) == before
