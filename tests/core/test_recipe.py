from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from tiny import tiny_config

from supra_cli.core import recipe as recipes
from supra_cli.core.data import sources
from supra_cli.core.errors import NotFoundError, UsageError
from supra_cli.core.lookup import lookup
from supra_cli.core.mixers import parse_options
from supra_cli.core.modeling import SupraConfig
from supra_cli.core.recipe.keep import layer_kinds
from supra_cli.core.recipe.options import describe, read

RAW: dict[str, Any] = {
    "base": "tiny",
    "mixer": {"name": "supra", "gain": "head"},
    "data": {"seq_len": 64, "sources": [{"path": "python-stdlib", "weight": 2.0}]},
    "stages": [
        {"kind": "transfer", "tokens": 1000},
        {"kind": "finetune", "tokens": 1001, "batch_tokens": 130, "z_loss": 1e-4},
    ],
}


def complaint(raw: dict[str, Any]) -> str:
    with pytest.raises(UsageError) as caught:
        recipes.validate(raw, lookup=lookup)
    return str(caught.value)


def changed(path: str, value: Any) -> dict[str, Any]:
    raw = copy.deepcopy(RAW)
    *parents, last = path.split(".")
    table: Any = raw
    for part in parents:
        table = table[int(part)] if isinstance(table, list) else table[part]
    table[int(last) if isinstance(table, list) else last] = value
    return raw


def test_a_recipe_survives_being_written_and_read() -> None:
    recipe = recipes.validate(RAW, lookup=lookup)
    import tomllib

    assert recipes.validate(tomllib.loads(recipes.dumps(recipe)), lookup=lookup) == recipe


def test_options_of_mixers_and_stages_are_the_further_keys_of_their_tables() -> None:
    recipe = recipes.validate(RAW, lookup=lookup)
    assert recipe.mixer.options == {"gain": "head"}
    assert recipe.stages[1].options == {"z_loss": 1e-4}


def test_steps_are_whole_rows_and_whole_steps() -> None:
    recipe = recipes.validate(RAW, lookup=lookup)
    stage = recipe.stages[1]
    assert recipe.rows(stage) == 2
    assert recipe.steps(stage) == 8


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("keeep", "none", "keeep: unknown key; did you mean 'keep'?"),
        ("data.seq_lenn", 3, "data.seq_lenn: unknown key; did you mean 'seq_len'?"),
        ("data.sources.0.wieght", 3, "data.sources.0.wieght: unknown key; did you mean 'weight'?"),
        ("stages.0.mixer_lrr", 3, "stages.0.mixer_lrr: unknown key; did you mean 'mixer_lr'?"),
        ("stages.1.zloss", 3, "stages.1.zloss: unknown key; did you mean 'z_loss'?"),
        ("mixer.gian", "head", "mixer.gian: unknown key; did you mean 'gain'?"),
        ("mixer.gain", "heads", "mixer.gain:"),
        ("mixer.name", "supr", "did you mean 'supra'?"),
        ("stages.0.kind", "transfre", "did you mean 'transfer'?"),
        ("data.seq_len", 1, "data.seq_len: input should be greater than or equal to 2, got 1"),
        ("stages.0.tokens", 0, "stages.0.tokens: input should be greater than 0, got 0"),
        ("stages.0.tokens", 2**63, "stages.0.tokens: input should be less than or equal to"),
        ("data.sources.0.path", "", "data.sources.0.path: string should have at least 1 character, got ''"),
        ("stages.0.lr", float("nan"), "stages.0.lr: input should be a finite number"),
        ("stages.0.micro_batch_tokens", 10**6, "more than batch_tokens"),
        ("data.sources", [], "data.sources: tuple should have at least 1 item"),
        ("stages", [], "stages: tuple should have at least 1 item"),
        ("checkpoint", {"keep_last": 1}, "checkpoint.keep_last"),
        ("model", {"model_type": "llama"}, "exactly one of 'base'"),
        ("model", {"n_layer": 10**9}, "model: n_layer is 1000000000, expected at most 1024"),
        ("tokenizer", {"vocab_size": 300}, "belong together"),
        ("mixer", 3, "mixer: input should be a valid dictionary"),
        ("mixer.qk_norm", 1, "mixer.qk_norm: input should be a valid boolean, got 1"),
        ("mixer.qk_norm", "yes", "mixer.qk_norm: input should be a valid boolean, got 'yes'"),
        ("stages.1.z_loss", "0.1", "stages.1.z_loss: input should be a valid number, got '0.1'"),
        ("stages.1.z_loss", 2, "stages.1: z_loss is 2.0, expected a number from 0 to 1"),
        ("data.sources.0.text", "content", "data.sources.0: text is 'content', but python-stdlib has no fields"),
        ("data.sources.0.name", "en", "data.sources.0: name is 'en', but only a dataset on the hub has one"),
        (
            "data.sources.0",
            {"path": "a.jsonl", "revision": "v1"},
            "data.sources.0: revision is 'v1', but only",
        ),
        (
            "data",
            {"sources": [{"path": "a.txt"}], "validation": [{"path": "b.txt"}] * 2, "validation_tokens": 4095},
            "data: validation_tokens is 4095, fewer than one row of 2048 for each of 2 sources",
        ),
        ("data.validation", [{"path": "a.jsonl", "weight": 2}], "data: validation.0 has a weight or repeat"),
        ("data.validation", [{"path": "a.jsonl", "repeat": "text"}], "data: validation.0 has a weight or repeat"),
        (
            "model",
            {"model_type": "llama", "hidden_sise": 64},
            "hidden_sise: unknown key; did you mean 'hidden_size'",
        ),
        ("model", {"model_type": "lama"}, "model.model_type: unknown base architecture 'lama'; did you mean 'llama'"),
        ("data", "text", "data:"),
    ],
)
def test_a_wrong_key_or_value_is_named(path: str, value: Any, expected: str) -> None:
    assert expected in complaint(changed(path, value))


def test_all_problems_are_told_at_once() -> None:
    raw = changed("keeep", 1)
    raw["stages"][0]["tokens"] = -1
    raw["mixer"]["gian"] = "x"
    raw["data"]["sources"][0]["weight"] = 0
    told = complaint(raw)
    assert all(part in told for part in ("keeep", "stages.0.tokens", "mixer.gian", "data.sources.0.weight"))


def test_overrides_reach_every_depth(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(tomli_w.dumps(RAW))
    overrides = ["stages.0.lr=1e-4", "seed=7", "mixer.name=t2r", "checkpoint.every_steps=9", "mixer.gain=none"]
    recipe = recipes.load(path, overrides)
    assert (recipe.stages[0].lr, recipe.seed, recipe.mixer.name, recipe.checkpoint.every_steps) == (1e-4, 7, "t2r", 9)


def test_a_recipe_and_a_mixer_read_options_alike() -> None:
    for options in ({"gian": "head"}, {"gain": "loud"}, {"qk_norm": 1}, {"qk_norm": "true"}, {"map": ["head"]}):
        with pytest.raises(UsageError) as caught:
            parse_options("supra", options)
        told = complaint(changed("mixer", {"name": "supra", **options})).splitlines()[-1].strip()
        assert told.partition(";")[0] in str(caught.value), options
    assert parse_options("supra", {"gain": "head"}).gain == "head"


@dataclass(frozen=True)
class Widths:
    widths: tuple[int, ...] = (8,)
    rate: float = 1.0


def test_an_option_takes_a_list_for_a_tuple_and_a_whole_number_for_a_float() -> None:
    assert read(Widths, {"widths": [4, 2], "rate": 2}, "mixer") == (Widths((4, 2), 2.0), [])
    options, problems = read(Widths, {"widths": [4, "2"], "rate": True, "rat": 1}, "mixer", ("name",))
    assert options is None
    assert [problem.partition(":")[0] for problem in problems] == ["mixer.rat", "mixer.widths.1", "mixer.rate"]


def test_what_is_valid_and_without_effect_is_logged_once(tmp_path: Path, caplog) -> None:
    """1000 tokens in steps of 4096 are one step of 64 rows, 1001 in steps of 130 eight steps of 2: 80 rows."""
    path = tmp_path / "r.toml"
    for weight, told in ((1, 0), (99, 1)):
        sources = [{"path": "python-stdlib", "weight": weight}, {"path": "other.txt", "weight": 1}]
        path.write_text(tomli_w.dumps(changed("data.sources", sources)))
        caplog.clear()
        recipe = recipes.load(path, lookup=lookup)
        assert sum(recipe.rows(stage) * recipe.steps(stage) for stage in recipe.stages) == 80
        assert caplog.text.count("is due less than one of the run's 80 rows") == told
        recipes.load(path)  # as on resume, when nothing is said again
        assert caplog.text.count("is due less than one") == told
    path.write_text(tomli_w.dumps(changed("stages.1.warmup_steps", 8)))
    recipes.load(path, lookup=lookup)
    assert "stages.1.warmup_steps is 8 and the stage has 8 steps: it never reaches its rate" in caplog.text


def test_a_recipe_with_a_byte_order_mark_is_read_and_a_folder_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_bytes(b"\xef\xbb\xbf" + tomli_w.dumps(RAW).encode())
    assert recipes.load(path).base == "tiny"
    with pytest.raises(UsageError, match="is a folder, expected a recipe; name the TOML file in it"):
        recipes.load(tmp_path)


def test_paths_of_set_are_relative_to_where_it_is_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        (folder / "corpus").mkdir(parents=True)
    (there / "r.toml").write_text(tomli_w.dumps(changed("data.sources", [{"path": "corpus"}, {"path": "a.txt"}])))
    monkeypatch.chdir(here)

    def paths(*overrides: str) -> list[str]:
        return [source.path for source in recipes.load(there / "r.toml", overrides).data.sources]

    assert paths() == [str(there / "corpus"), str(there / "a.txt")]
    assert paths("data.sources.0.path=corpus") == [str(here / "corpus"), str(there / "a.txt")]
    assert paths("data.sources.1.path=b.txt") == [str(there / "corpus"), str(here / "b.txt")]
    assert recipes.load(there / "r.toml", ["base=corpus"]).base == str(here / "corpus")


@pytest.mark.parametrize(
    "override",
    [
        "seed",
        "=3",
        "stages.9.lr=1",
        "stages.x.lr=1",
        "stages.-1.lr=1",
        "stages.lr=1",
        "base.deep=1",
        "stages.0.tokens.x=1",
        f"stages.{'9' * 5000}.lr=1",
    ],
)
def test_a_wrong_override_is_a_sentence(override: str, tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(tomli_w.dumps(RAW))
    with pytest.raises(UsageError, match="--set"):
        recipes.load(path, [override])


@pytest.mark.parametrize("key", ["stages.0.betas", "track", "mixer.key_width"])
def test_what_is_in_a_list_of_values_is_no_table(key: str) -> None:
    raw = copy.deepcopy(RAW)
    recipes.override(raw, f"{key}=[1, 2]")
    with pytest.raises(UsageError, match="'0' is a value, not a table"):
        recipes.override(raw, f"{key}.0.x=3")


def test_local_paths_are_relative_to_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    raw = changed("data.sources", [{"path": "corpus/*.jsonl"}, {"path": "python-stdlib"}, {"path": "org/set"}])
    (tmp_path / "r.toml").write_text(tomli_w.dumps(raw | {"base": "base"}))
    recipe = recipes.load(tmp_path / "r.toml")
    assert recipe.base == str(tmp_path / "base")
    assert [source.path for source in recipe.data.sources] == [
        str(tmp_path / "corpus/*.jsonl"),
        "python-stdlib",
        "org/set",
    ]


@pytest.mark.parametrize("folder", ["train[1]", "a?b*", "[ab]", "plain"])
def test_a_folder_of_any_name_may_hold_a_recipe_and_its_text(folder: str, tmp_path: Path) -> None:
    for place in (tmp_path / folder, tmp_path / "train1", tmp_path / "a"):  # which those names would match as a glob
        (place / "corpus" / "sub").mkdir(parents=True)
        (place / "corpus" / "sub" / "a[1].txt").write_text("text")
    (tmp_path / "a" / "gone.txt").write_text("text")
    paths = ["corpus", "corpus/*/*.txt", "corpus/sub/a[[]1].txt", "corpus/sub/a[1].txt", "gone.txt"]
    (tmp_path / folder / "r.toml").write_text(
        tomli_w.dumps(changed("data.sources", [{"path": path} for path in paths]))
    )
    *there, gone = recipes.load(tmp_path / folder / "r.toml").data.sources
    for source in there:
        assert sources.files(source, "train").paths == [tmp_path / folder / "corpus" / "sub" / "a[1].txt"]
    with pytest.raises(NotFoundError, match="no split 'train': none of its files is named for a split"):
        sources.files(there[1].model_copy(update={"split": "train"}), "train")
    with pytest.raises(NotFoundError, match="no data at"):
        sources.files(gone, "train")


@pytest.mark.parametrize(
    "content", [b"", b"base = ", b"\xff\xfe", b"[[stages]\n", b"base = 3\nbase = 4", b"seed = " + b"9" * 5000]
)
def test_a_malformed_file_is_a_sentence(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_bytes(content)
    with pytest.raises(UsageError):
        recipes.load(path, lookup=lookup)


def test_a_missing_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no recipe at"):
        recipes.load(tmp_path / "nothing.toml")


JUNK = [None, True, -1, 0, 1e308, float("inf"), float("nan"), "", "x" * 300, "☃", [], [1], {}, {"a": 1}, [[]], 2**70]


def test_two_thousand_mutations_are_either_valid_or_a_usage_error() -> None:
    chance = random.Random(0)
    refused = 0
    for _ in range(2000):
        raw = copy.deepcopy(RAW)
        for _ in range(chance.randrange(1, 4)):
            _mutate(raw, chance)
        try:
            recipes.validate(raw, lookup=lookup)
        except UsageError:
            refused += 1
    assert 500 < refused < 2000


def _mutate(value: Any, chance: random.Random) -> None:
    """Replace, remove, rename or add something somewhere inside."""
    while True:
        if not value:
            return
        key = chance.choice(list(value)) if isinstance(value, dict) else chance.randrange(len(value))
        if isinstance(value[key], dict | list) and chance.random() < 0.7:
            value = value[key]
            continue
        action = chance.randrange(4)
        if action == 0:
            value[key] = chance.choice(JUNK)
        elif action == 1:
            del value[key]
        elif action == 2 and isinstance(value, dict):
            value[str(key) + chance.choice("abx_")] = value.pop(key)
        elif isinstance(value, dict):
            value[chance.choice(["lr", "zzz", "name", "options", "self", "model_fields"])] = chance.choice(JUNK)
        return


def test_a_shipped_recipe_is_read_by_its_name_unless_a_file_has_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mistral").mkdir()
    assert recipes.load(Path("t2r")) == recipes.load(recipes.find("t2r"))
    assert recipes.load(Path("mistral")) == recipes.load(recipes.find("mistral"))
    (tmp_path / "t2r").write_text(recipes.find("demo").read_text(encoding="utf-8"), encoding="utf-8")
    assert recipes.load(Path("t2r")) == recipes.load(recipes.find("demo"))


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ("none", ()),
        ("all", (0, 1, 2, 3, 4, 5)),
        ("every:2", (1, 3, 5)),
        ("every:4", (3,)),
        ("every:6", (5,)),
        ("first:2", (0, 1)),
        ("last:1", (5,)),
        ("0,5,3", (0, 3, 5)),
        ("first:1,last:2", (0, 4, 5)),
        ("sliding", (1, 2)),
        ("sliding, every:3,0", (0, 1, 2, 5)),
        ("2", (2,)),
    ],
)
def test_keep_names_the_softmax_layers(keep: str, kept: tuple[int, ...]) -> None:
    assert layer_kinds(6, "supra", keep, sliding=[1, 2]) == [
        "softmax" if layer in kept else "supra" for layer in range(6)
    ]


def test_sliding_layers_are_kept_where_there_are_any() -> None:
    config = SupraConfig.from_base(tiny_config("gemma2"))
    assert config.with_mixer("supra", keep="sliding").swap.layers == ["softmax", "supra", "softmax"]
    assert SupraConfig.from_base(tiny_config("mistral")).with_mixer("supra", keep="sliding").swap.layers[1] == "softmax"
    with pytest.raises(UsageError, match="no sliding layers"):
        SupraConfig.from_base(tiny_config("llama")).with_mixer("supra", keep="sliding")


@pytest.mark.parametrize("keep", ["every:7", "first:7", "last:7", "6", "0,9", "first:1,last:7"])
def test_a_keep_outside_the_model_names_its_layers(keep: str) -> None:
    assert recipes.validate(changed("keep", keep)).keep == keep  # right for a model with more layers
    with pytest.raises(UsageError, match="the model has 6 layers"):
        layer_kinds(6, "supra", keep)


@pytest.mark.parametrize(
    "keep",
    [
        *("", "some", "every:0", "every:", "first:-1", "last:x", "-1", "1,,2", "all:1", "every:²", "None", "9" * 5000),
        *("none,all", "first:1,", "sliding:2"),
    ],
)
def test_a_keep_that_means_nothing_is_refused_before_a_model_is_known(keep: str) -> None:
    assert "keep: keep is" in complaint(changed("keep", keep))
    with pytest.raises(UsageError, match="expected none, all, auto:N or"):
        layer_kinds(6, "supra", keep)


def test_options_are_described_whatever_a_package_names_types_by():
    @dataclass(frozen=True)
    class Options:
        plain: int = 1
        """How many."""
        made: list = field(default_factory=lambda: [2])
        unseen: ForTypeCheckersAlone = 3  # noqa: F821

    described = describe(Options)
    assert {name: (option["type"], option["default"]) for name, option in described.items()} == {
        "plain": ("int", 1),
        "made": ("list", [2]),
        "unseen": ("ForTypeCheckersAlone", 3),
    }
    assert described["plain"]["help"] == "How many."
