"""One result whatever the world: two, three and four ranks against one, in the loss, the gradients, the weights and the
rows; and a run that changes their number on its way.

Each world is started once, and makes all of its runs before the first test looks at any.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from safetensors.torch import load_file

from supra_cli.core import corpus
from supra_cli.core.mixers import mixers
from supra_cli.core.parallel import ALONE
from supra_cli.core.recipe.keep import SOFTMAX
from tests.parallel import worlds
from tests.parallel.launching import finish, made_once, start
from tests.tiny import save_base

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # the first to come makes what all look at

SIZES = [2, 3, 4]
KINDS = ("transfer", "distill", "finetune")
TIED = {"tied": True, "untied": False}
MIXERS = [mixer for mixer in mixers if mixer not in ("supra", SOFTMAX)]
STOPPED = {"3": ("long", 3), "7": ("long", 7), "12": ("long", 12), "offload": ("long offload", 12)}
"""Runs that end on two ranks, in the midst of one of their three stages, and go on in every world."""
TEXT = "".join(document.text for document in corpus.documents("validation"))[:60_000]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases, recipes and the runs of every world."""
    return made_once(tmp_path_factory, "worlds", make_all)


def make_all(root: Path) -> None:
    (root / "text.txt").write_text(TEXT, encoding="utf-8")
    for name, tied in TIED.items():  # of a width that neither three nor four ranks share evenly
        save_base(root / name, [TEXT], tie_word_embeddings=tied, intermediate_size=50)
    save_base(root / "experts", [TEXT], "mixtral")  # four, which three ranks do not share evenly
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUPRA_CACHE", str(root / "cache"))
        run_in_worlds(root)


def recipe(root: Path, name: str, base: str, stages: list[dict[str, Any]], **more: Any) -> Path:
    """Steps of seven rows, which no world shares evenly, at most two in a pass.

    At ten times the rate, gradients jump to fifty times their size where the output norm of a random base divides by
    next to nothing; what 20 steps then make of rounding depends on the processor, and is 1e-6 on one and 2e-3 on
    another.
    """
    shared = {"batch_tokens": 7 * 32, "micro_batch_tokens": 64, "lr": 1e-4, "warmup_steps": 5, "clip_norm": 1e6}
    path = root / f"{name}.toml"
    described = {
        "base": str(root / base),
        "mixer": {"name": "supra"},
        "data": {
            "seq_len": 32,
            "sources": [
                {"path": str(root / "text.txt"), "weight": 2.0},
                {"path": str(root / "text.txt"), "repeat": "text"},
            ],
            "validation": [{"path": str(root / "text.txt")}],
            "validation_tokens": 160,
        },
        "checkpoint": {"every_steps": 50, "keep_last": 2},
        "validate_every_steps": 10,
        "stages": [{**shared, **stage} for stage in stages],
    }
    path.write_text(tomli_w.dumps(described | more), encoding="utf-8")
    return path


def run_in_worlds(root: Path) -> None:
    tokens = 20 * 7 * 32
    single = {
        f"{kind}-{base}": {"recipe": recipe(root, f"{kind}-{base}", base, [{"kind": kind, "tokens": tokens}])}
        for kind in KINDS
        for base in TIED
    }
    fitted = {"name": "supra", "gain": "head"}
    transfer = [{"kind": "transfer", "tokens": tokens}]
    single["fit"] = {"recipe": recipe(root, "fit", "tied", transfer, mixer=fitted)}
    offloaded = [{"kind": "finetune", "tokens": tokens, "optimizer": "adamw-offload"}]
    single["offload"] = {"recipe": recipe(root, "offload", "tied", offloaded)}
    offloaded = [{**transfer[0], "optimizer": "adamw-offload"}]
    single["fit offloaded"] = {"recipe": recipe(root, "fit-offloaded", "tied", offloaded, mixer=fitted)}
    again = [{"kind": "finetune", "tokens": tokens, "activation_checkpointing": True}]
    single["bfloat16"] = {"recipe": recipe(root, "bfloat16", "tied", again), "dtype": "bfloat16"}
    more = {"kind": "finetune", "tokens": 5 * 7 * 32, "activation_checkpointing": True, "untie": True}
    single["bfloat16 offload"] = {
        "recipe": recipe(root, "bfloat16-offload", "tied", [{**again[0], "optimizer": "adamw-offload"}]),
        "dtype": "bfloat16",
    }
    single["untying"] = {"recipe": recipe(root, "untying", "tied", [{**more, "tokens": tokens}])}
    single["experts"] = {"recipe": recipe(root, "experts", "experts", [{"kind": "distill", "tokens": 5 * 7 * 32}])}
    data = {"seq_len": 32, "sources": [{"path": "someone/dataset"}]}
    single["hub"] = {"recipe": recipe(root, "hub", "tied", [more], data=data), "trick": "hub"}
    stages = [{"kind": kind, "tokens": 5 * 7 * 32} for kind in KINDS]
    rounded = {"every_steps": 50, "keep_last": 2, "dtype": "bfloat16"}
    long = {"recipe": recipe(root, "long", "tied", stages, checkpoint=rounded)}
    single["long"] = long
    offloaded = [{**stage, "optimizer": "adamw-offload"} for stage in stages]
    single["long offload"] = {"recipe": recipe(root, "long-offload", "untied", offloaded)}
    on_two = {}
    for mixer in MIXERS:
        # Two have nothing that transfer could train. A window is shorter than the rows.
        kinds = ["finetune"] if mixer in ("retention", "window") else ["transfer", "finetune"]
        two = [{"kind": kind, "tokens": 2 * 7 * 32} for kind in kinds]
        described = {"name": mixer} | ({"window": 8} if mixer in ("lolcats", "window") else {})
        on_two[mixer] = {"recipe": recipe(root, mixer, "tied", two, mixer=described)}
        on_two[f"{mixer}, bfloat16"] = {**on_two[mixer], "dtype": "bfloat16"}
    one = {"kind": "finetune", "tokens": 7 * 32}
    on_two["experts, bfloat16"] = {"recipe": recipe(root, "rounded", "experts", [one]), "dtype": "bfloat16"}
    for kind in ("transfer", "distill"):
        on_two[f"{kind}, bfloat16"] = {
            "recipe": recipe(root, f"{kind}-rounded", "tied", [{**one, "kind": kind}]),
            "dtype": "bfloat16",
        }
    on_two["clipped"] = {"recipe": recipe(root, "clipped", "tied", [{**one, "tokens": 3 * 7 * 32, "clip_norm": 0.1}])}
    for trick in ("measuring", "on one machine"):  # a world of one has no other machine
        on_two[trick] = {"recipe": recipe(root, trick.replace(" ", "-"), "tied", [{**one, "tokens": 3 * 7 * 32}])}
        on_two[trick]["trick"] = trick
    refused = {
        "rows apart": {"recipe": long["recipe"], "trick": "rows apart"},
        "recipes apart": {"recipe": long["recipe"], "recipe of the last": single["untying"]["recipe"]},
        **{
            f"unused in {kind}": {"recipe": single[f"{kind}-tied"]["recipe"], "trick": "unused"}
            for kind in ("transfer", "finetune")
        },
        "eight bits": {
            "recipe": recipe(root, "eight", "tied", [{"kind": "finetune", "tokens": 1000, "optimizer": "adamw8bit"}])
        },
    }
    for size in [*SIZES, 1]:
        tasks = dict(single)
        if size == 2:
            for name, (run, step) in STOPPED.items():
                tasks[f"stopped-{name}"] = {**single[run], "stop_after": step}
            tasks |= refused
            unseen = {**single["long"], "after": root / "2" / "stopped-7", "trick": "out of sight"}
            tasks["out of sight"] = unseen
        if size <= 2:
            tasks |= on_two
        for name, (run, _) in STOPPED.items():
            tasks[f"resumed-{name}"] = {**single[run], "after": root / "2" / f"stopped-{name}"}
        make(root, size, tasks)


def make(root: Path, size: int, tasks: dict[str, dict[str, Any]]) -> None:
    folder = root / str(size)
    folder.mkdir()
    runs = [{**task, "output": folder / name} for name, task in tasks.items()]
    (folder / "runs.json").write_text(json.dumps(runs, default=str))
    if size == 1:
        worlds.run(folder, ALONE)
        return
    ended = finish(start(size, [worlds.__file__, str(folder)], cache=root / "cache"), seconds=600)
    assert ended.returncode == 0, ended.stderr[-4000:]


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def weights(output: Path) -> dict[str, torch.Tensor]:
    masters = output / "last" / "training" / "masters.safetensors"
    if masters.exists():
        return load_file(masters)
    files = sorted((output / "last").glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


def far(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest difference, of the largest number of all."""
    assert ours.keys() == theirs.keys()
    largest = max(float(value.abs().max()) for value in theirs.values())
    return max(float((ours[name] - value).abs().max()) for name, value in theirs.items()) / largest


RUNS = [f"{kind}-{base}" for kind in KINDS for base in TIED] + [
    "fit",
    "fit offloaded",
    "offload",
    "untying",
    "experts",
    "hub",
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("run", RUNS)
def test_a_run_is_the_same_on_any_number_of_ranks(run: str, size: int, folder: Path) -> None:
    ours, theirs = folder / str(size) / run, folder / "1" / run
    at = 0 if run == "hub" else 1  # which alone is not validated at first
    first, wanted = metrics(ours)[at], metrics(theirs)[at]
    assert first["event"] == "step"
    assert first["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert first["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)
    gradients = load_file(theirs / "gradients.safetensors")
    assert any(gradient.any() for gradient in gradients.values())
    assert far(load_file(ours / "gradients.safetensors"), gradients) < 1e-5
    assert far(weights(ours), weights(theirs)) < 1e-4
    for one, other in zip(metrics(ours), metrics(theirs), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_what_was_fitted_is_offloaded_as_it_was_fitted(folder: Path) -> None:
    for size in ("1", "2"):
        plain, offloaded = (metrics(folder / size / run) for run in ("fit", "fit offloaded"))
        for one, other in zip(plain, offloaded, strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


@pytest.mark.parametrize("run", ["bfloat16", "bfloat16 offload"])
@pytest.mark.parametrize("size", [1, *SIZES])
def test_a_step_in_bfloat16_is_autocast_s_on_one_rank(size: int, run: str, folder: Path) -> None:
    """The weights that travel in bf16 are those that autocast rounds, so the loss is the same. Gradients of weights are
    rounded in every pass, to 2^-9 of themselves, and passes hold other rows in another world."""
    ours, theirs = folder / str(size) / run, folder / "1" / "bfloat16"
    assert metrics(ours)[1]["loss"] == pytest.approx(metrics(theirs)[1]["loss"], rel=1e-6)
    assert far(load_file(ours / "gradients.safetensors"), load_file(theirs / "gradients.safetensors")) < 2**-7


@pytest.mark.parametrize("run", [*MIXERS, "clipped", "measuring", "on one machine"])
def test_every_mixer_is_the_same_on_two_ranks(run: str, folder: Path) -> None:
    ours, theirs = folder / "2" / run, folder / "1" / run
    gradients = load_file(theirs / "gradients.safetensors")
    assert any(gradient.any() for gradient in gradients.values())
    assert far(load_file(ours / "gradients.safetensors"), gradients) < 1e-5
    for one, other in zip(metrics(ours), metrics(theirs), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


@pytest.mark.parametrize("run", [*MIXERS, "experts", "transfer", "distill"])
def test_a_step_in_bfloat16_is_the_same_on_two_ranks(run: str, folder: Path) -> None:
    ours, theirs = (folder / size / f"{run}, bfloat16" for size in ("2", "1"))
    assert metrics(ours)[1]["loss"] == pytest.approx(metrics(theirs)[1]["loss"], rel=1e-6)
    assert far(load_file(ours / "gradients.safetensors"), load_file(theirs / "gradients.safetensors")) < 2**-7


@pytest.mark.parametrize("size", [1, *SIZES])
@pytest.mark.parametrize("name", STOPPED)
def test_a_run_that_was_saved_on_two_ranks_goes_on_at_the_exact_next_row(name: str, size: int, folder: Path) -> None:
    resumed, whole = folder / str(size) / f"resumed-{name}", folder / "2" / STOPPED[name][0]
    steps = [line for line in metrics(resumed) if line["event"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, 16))
    wanted = [line for line in metrics(whole) if line["event"] == "step"]
    for one, other in zip(steps, wanted, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["sources"] == other["sources"]
    assert far(weights(resumed), weights(whole)) < 1e-4


@pytest.mark.parametrize("name", STOPPED)
def test_a_run_that_goes_on_in_the_same_world_ends_with_the_same_bits(name: str, folder: Path) -> None:
    resumed, whole = folder / "2" / f"resumed-{name}" / "last", folder / "2" / STOPPED[name][0] / "last"
    files = sorted(path.relative_to(whole) for path in whole.rglob("*.safetensors"))
    # A model saved in fp32 is its own masters.
    kept = {"optimizer.safetensors"} | ({"masters.safetensors"} if STOPPED[name][0] == "long" else set())
    assert {path.name for path in files} >= kept
    for path in files:
        assert (resumed / path).read_bytes() == (whole / path).read_bytes(), path


@pytest.mark.parametrize("size", SIZES)
def test_a_dataset_on_the_hub_is_read_by_one_rank(size: int, folder: Path) -> None:
    assert [path.name for path in (folder / str(size)).glob("hub.opened-*")] == ["hub.opened-0"]


@pytest.mark.parametrize(
    ("run", "sentence"),
    [
        ("rows apart", "the ranks have drawn different rows"),
        ("recipes apart", "rank 1 was started with another recipe"),
        ("out of sight", "rank 1 does not see "),
        ("unused in transfer", "the loss does not depend on model.layers.0.self_attn.mixer.forgotten"),
        ("unused in finetune", "the loss does not depend on model.layers.0.self_attn.mixer.forgotten"),
        ("eight bits", "'adamw8bit' trains on one rank, got 2"),
    ],
)
def test_what_cannot_be_right_on_several_ranks_is_refused(run: str, sentence: str, folder: Path) -> None:
    assert sentence in (folder / "2" / f"{run}.error").read_text()


def test_what_several_ranks_save_is_a_model_like_any_other(folder: Path, tmp_path: Path) -> None:
    from supra_cli.core import checkpoint

    for size in SIZES:
        saved = folder / str(size) / "finetune-untied" / "last"
        checkpoint.verify(saved)
        assert (
            checkpoint.load(saved).num_parameters()
            == checkpoint.load(folder / "1" / "finetune-untied" / "last").num_parameters()
        )
        assert not list((folder / str(size) / "finetune-untied").glob(".writing*"))
