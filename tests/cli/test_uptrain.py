"""`supra uptrain`, `recipe`, `data peek` and `report` as a user meets them."""

from __future__ import annotations

import errno
import json
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from supra_cli.core.mixers import mixers
from supra_cli.core.stages import stages

TEXT = "def read(self, size=-1):\n    return self.buffer[:size]\n" * 100


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUPRA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def recipe(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a recipe of one stage of two steps, with top-level keys replaced, beside its text."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "text.txt").write_text(TEXT)

    def write(**replaced: Any) -> Path:
        raw = {
            "base": str(base),
            "data": {
                "seq_len": 32,
                "sources": [{"path": "text.txt"}],
                "validation": [{"path": "text.txt"}],
                "validation_tokens": 64,
            },
            "stages": [{"kind": "finetune", "tokens": 128, "batch_tokens": 64, "lr": 1e-3}],
        }
        path = folder / "small.toml"
        raw = {key: value for key, value in (raw | replaced).items() if value is not None}
        path.write_text(tomli_w.dumps(raw))
        return path

    return write


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_prints_its_model_and_tells_the_rest_on_stderr(supra, recipe):
    result = supra("uptrain", "--recipe", recipe())
    assert result.code == 0, result.err
    assert result.out.strip() == "runs/small/last"
    for word in ("stage 0 (finetune): 2 steps", "step 2/2", "held out, step 0", "teacher", "saved runs/small/step-"):
        assert word in result.err
    assert (Path("runs/small/last") / "config.json").is_file()
    assert {"recipe.toml", "env.json", "metrics.jsonl"} <= {path.name for path in Path("runs/small").iterdir()}


def test_json_is_one_document_about_the_end(supra, recipe):
    result = supra("uptrain", "--recipe", recipe(), "-o", "out", "--json")
    document = json.loads(result.out)
    assert document["path"] == "out/last"
    assert document["tokens"] == 128
    assert document["loss"] > 0
    assert document["teacher_loss"] > 0
    assert set(document) == {"path", "loss", "teacher_loss", "tokens", "seconds"}


def test_set_changes_what_is_run_and_is_stored_with_it(supra, recipe):
    result = supra("uptrain", "--recipe", recipe(), "-o", "out", "--set", "stages.0.tokens=64", "--set", "seed=3")
    assert result.code == 0, result.err
    stored = tomllib.loads(Path("out/recipe.toml").read_text())
    assert (stored["stages"][0]["tokens"], stored["seed"]) == (64, 3)
    records = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["event"] == "step"] == [1]


@pytest.mark.parametrize("optimizer", ["adamw8bit", "adamw-offload"])
def test_an_optimizer_is_a_key_of_the_stage(optimizer, supra, recipe):
    if optimizer == "adamw8bit":
        pytest.importorskip("torchao", reason="torchao is not installed (extra 'lowbit')")
    result = supra("uptrain", "--recipe", recipe(), "-o", "out", "--set", f"stages.0.optimizer={optimizer}")
    assert result.code == 0, result.err
    assert tomllib.loads(Path("out/recipe.toml").read_text())["stages"][0]["optimizer"] == optimizer


def test_a_run_from_a_converted_model_takes_that_one(supra, recipe, base):
    assert supra("convert", base, "-o", "converted").code == 0
    assert supra("uptrain", "--recipe", recipe(), "--model", "converted", "-o", "out").code == 0
    assert (Path("out/converted")).resolve() == Path("converted").resolve()
    other = supra("uptrain", "--recipe", recipe(keep="first:1"), "--model", "converted", "-o", "other")
    assert other.code == 2
    assert "the recipe asks for" in other.error


def test_a_dry_run_prints_the_plan_and_writes_nothing(supra, recipe, tmp_path):
    result = supra("uptrain", "--recipe", recipe(), "-o", "out", "--dry-run")
    assert result.code == 0, result.err
    assert "finetune" in result.out
    assert "activations" in result.out
    assert list(tmp_path.iterdir()) == []
    document = json.loads(supra("uptrain", "--recipe", recipe(), "--dry-run", "--json").out)
    assert (document["steps"], document["tokens"]) == (2, 128)


def test_layers_that_are_chosen_by_need_are_not_planned_by_number(supra, recipe, base):
    path = recipe(keep="auto:2")
    for verb in (("plan",), ("uptrain", "--dry-run")):
        assert "4: 2 supra, 2 softmax (chosen by need at conversion)" in supra(*verb, "--recipe", path).out
        assert json.loads(supra(*verb, "--recipe", path, "--json").out)["model"]["layers"] is None
    assert "keep is 'auto:5' and the model has 4 layers" in supra("plan", "-r", recipe(keep="auto:5")).error
    assert supra("convert", base, "--keep", "0,2", "-o", "hybrid").code == 0
    planned = supra("uptrain", "--recipe", recipe(keep="auto:2"), "--model", "hybrid", "--dry-run")
    assert "(softmax: 0, 2)" in planned.out, planned.err


@pytest.mark.parametrize("more", [("-o", "out"), ("--dry-run",)])
def test_a_model_that_is_no_student_is_refused_with_what_makes_one(supra, recipe, base, more):
    for model, code in (("nope", 3), ("tiny", 3), (base, 2)):
        refused = supra("uptrain", "--recipe", recipe(), "--model", model, *more)
        assert refused.code == code
        assert str(model) in refused.error
        assert "`supra convert " in refused.error
        assert "leave --model out" in refused.error


def test_the_command_that_a_plan_gives_is_the_one_that_was_typed(supra, recipe, base):
    assert supra("convert", base, "--set", "mixer.gain=head", "-o", "a model").code == 0
    sets = ["--set", "stages.0.lr=1e-4", "--set", "mixer.gain = 'head'"]
    run = ["--model", "a model", "--output", "out", "--overwrite", "--device", "cuda"]
    for verb, options in {("plan",): [], ("uptrain", "--dry-run"): run}.items():
        typed = ["--recipe", str(recipe()), *options, "--dtype", "float32", *sets]
        document = json.loads(supra(*verb, *typed, "--json").out)
        commands = [setting["command"] for setting in document["nearest"].values()]
        assert {tuple(shlex.split(command)) for command in commands} == {("supra", "uptrain", *typed)}
        assert f"  {commands[0]}\n" in supra(*verb, *typed).out


# -- refusals: one sentence, the documented exit code, nothing lost ----------------------------------------------------


def test_a_recipe_that_is_not_there_is_exit_2(supra):
    result = supra("uptrain", "--recipe", "nowhere.toml")
    assert result.code == 2
    assert "nowhere.toml" in result.error
    assert "supra recipe list" in result.error


def test_a_recipe_that_is_not_toml_is_exit_2(supra, tmp_path):
    (tmp_path / "broken.toml").write_text("base = \n")
    result = supra("uptrain", "--recipe", "broken.toml")
    assert result.code == 2
    assert "not valid TOML" in result.error


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("stages.0.lr", "key=value"),
        ("stages.0.learning_rate=1", "stages.0.learning_rate: unknown"),
        ("stages.0.optimizer=adamw9bit", "stages.0.optimizer"),
        ("stages.0.lr=fast", "stages.0.lr"),
        ("stages.1.lr=1", "not one of the 1 entries"),
        ("stages.0.kind=finetun", "did you mean 'finetune'"),
        ("mixer.name=supr", "did you mean 'supra'"),
        ("seed.x=1", "'seed' is a value, not a table"),
        ("keep=every:0", "every:0"),
        ("stages.0.z_loss=2", "stages.0: z_loss is 2"),
    ],
)
def test_a_set_that_cannot_be_is_exit_2_and_says_why(override, told, supra, recipe):
    result = supra("uptrain", "--recipe", recipe(seed=1), "--set", override)
    assert result.code == 2, result.err
    assert told in result.err
    assert "Traceback" not in result.err


IMPOSSIBLE = {
    "seed": (2**63 - 1, 10**30, -1),
    "data.seq_len": (2**63 - 1, 10**30, -1),
    "tokenizer.vocab_size": (2**63 - 1, 10**30, -1),
    "stages.0.seq_len": (2**63 - 1, 10**30, -1),
    "stages.0.tokens": (10**400, 2**63 - 1, -1),
    "stages.0.batch_tokens": (2**63 - 1, 10**30, -1),
    "stages.0.micro_batch_tokens": (2**63 - 1, 10**30, -1),
    "stages.0.lr": ("nan", "inf", -1),
    "stages.0.clip_norm": ("nan", "inf", -1),
    "stages.0.betas": ("[nan, 0.9]", "[1, 0.9]"),
    "stages.0.z_loss": ("nan", "inf", 10**30, -1),
    "data.sources.0.weight": ("nan", "inf", -1),
    "mixer.window": (2**63 - 1, 10**30, 0, -1),
    "mixer.sinks": (2**63 - 1, 10**30, -1),
    "mixer.feature_size": (2**63 - 1, 10**30, 0, -1),
}


@pytest.mark.parametrize("key", IMPOSSIBLE)
def test_a_number_that_cannot_be_is_exit_2_planned_or_run(key, supra, recipe, tmp_path):
    name = {"mixer.feature_size": "t2r"}.get(key, "window")
    own = {"base": None, "model": {"model_type": "llama"}, "tokenizer": {}, "init": "scratch"}
    for value in IMPOSSIBLE[key]:
        path = recipe(mixer={"name": name}, **(own if key.startswith("tokenizer") else {}))
        for more in (["--dry-run"], ["-o", "out"]):
            result = supra("uptrain", "--recipe", path, "--set", f"{key}={value}", *more)
            assert result.code == 2, (value, result.err)
            assert key.rpartition(".")[2] in result.err
            assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "value", "code"),
    [
        ("stages.0.lr", 1e308, 1),
        ("stages.0.weight_decay", 1e308, 1),
        ("stages.0.lr", 1e-320, 0),
        ("stages.0.warmup_steps", 10**30, 0),
        ("stages.0.clip_norm", 1e308, 0),
        ("stages.0.final_lr_fraction", 1e-320, 0),
        ("data.sources.0.weight", 1e308, 0),
        ("data.validation_tokens", 10**30, 0),
        ("checkpoint.every_steps", 10**30, 0),
        ("checkpoint.keep_last", 10**30, 0),
        ("validate_every_steps", 10**30, 0),
    ],
)
def test_an_absurd_number_is_planned_and_run_to_a_documented_end(key, value, code, supra, recipe):
    assert supra("uptrain", "--recipe", recipe(), "--set", f"{key}={value}", "--dry-run").code == 0
    result = supra("uptrain", "--recipe", recipe(), "--set", f"{key}={value}", "-o", "out")
    assert result.code == code, result.err
    assert "internal error" not in result.err


def test_all_problems_of_a_recipe_come_at_once(supra, recipe):
    result = supra("uptrain", "--recipe", recipe(sed=1), "--set", "stages.0.lr=-1", "--set", "data.seq_len=0")
    assert result.code == 2
    for place in ("sed: unknown key; did you mean 'seed'?", "stages.0.lr", "data.seq_len"):
        assert place in result.err


def test_resume_and_overwrite_exclude_each_other(supra, recipe, tmp_path):
    result = supra("uptrain", "--recipe", recipe(), "-o", "out", "--resume", "--overwrite")
    assert result.code == 2
    assert "give one of them" in result.error
    assert not (tmp_path / "out").exists()
    planned = supra("uptrain", "--recipe", recipe(), "--resume", "--overwrite", "--dry-run")
    assert (planned.code, planned.error) == (2, result.error)


def test_an_occupied_directory_is_exit_2_and_left_alone(supra, recipe, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("precious")
    result = supra("uptrain", "--recipe", recipe(), "-o", "out")
    assert result.code == 2
    assert "--resume" in result.error
    assert contents(tmp_path / "out") == {"notes.txt": b"precious"}


def test_a_finished_run_is_refused_then_resumed_in_vain_then_overwritten(supra, recipe, tmp_path):
    assert supra("uptrain", "--recipe", recipe(), "-o", "out").code == 0
    before = contents(tmp_path / "out" / "step-000002")
    assert supra("uptrain", "--recipe", recipe(), "-o", "out").code == 2
    resumed = supra("uptrain", "--recipe", recipe(), "-o", "out", "--resume")
    assert resumed.code == 0
    assert "already finished" in resumed.err
    assert contents(tmp_path / "out" / "step-000002") == before
    changed = supra("uptrain", "--recipe", recipe(), "-o", "out", "--resume", "--set", "seed=9")
    assert changed.code == 2
    assert "the recipe is not the one" in changed.error
    assert supra("uptrain", "--recipe", recipe(), "-o", "out", "--overwrite").code == 0


def test_a_data_file_that_is_not_there_is_exit_3(supra, recipe):
    result = supra("uptrain", "--recipe", recipe(data={"seq_len": 32, "sources": [{"path": "missing.txt"}]}))
    assert result.code == 3, result.err
    assert "missing.txt" in result.error


@pytest.mark.parametrize(("flag", "kind"), [("--set", "base"), ("--model", "model")])
def test_a_directory_that_is_no_model_is_exit_3(flag, kind, supra, recipe, tmp_path):
    (tmp_path / "empty").mkdir()
    given = f"base={tmp_path / 'empty'}" if kind == "base" else tmp_path / "empty"
    result = supra("uptrain", "--recipe", recipe(), flag, given)
    assert result.code == 3, result.err
    assert "empty" in result.error


def test_an_unknown_device_or_dtype_is_exit_2(supra, recipe):
    for flag, value in (("--device", "gpu"), ("--dtype", "float12")):
        result = supra("uptrain", "--recipe", recipe(), flag, value)
        assert result.code == 2
        assert value in result.error


def test_float16_is_exit_2_run_or_planned_and_writes_nothing(supra, recipe, tmp_path):
    for verb in (["uptrain", "-o", "out"], ["uptrain", "--dry-run"], ["plan"]):
        result = supra(verb[0], "--recipe", recipe(), *verb[1:], "--dtype", "float16")
        assert result.code == 2, result.err
        assert "loss scaling" in result.error
        assert list(tmp_path.iterdir()) == []


def test_a_dry_run_plans_for_the_dtype_and_device_that_are_given(supra, recipe):
    shown = {
        (dtype, device): json.loads(
            supra("uptrain", "--recipe", recipe(), "--dry-run", "--json", "--dtype", dtype, "--device", device).out
        )
        for dtype in ("float32", "bfloat16")
        for device in ("cpu", "auto")
    }
    for (dtype, device), document in shown.items():
        assert (document["dtype"], document["device"]) == (dtype, "cpu" if device == "cpu" else "cuda")


# -- recipes, data, reports -------------------------------------------------------------------------------------------


def test_shipped_recipes_are_listed_shown_and_copied(supra, tmp_path):
    listed = json.loads(supra("recipe", "list", "--json").out)
    assert {"demo", "tinyllama-24gb", "mistral-80gb"} <= set(listed)
    assert all(entry["about"] for entry in listed.values())
    shown = supra("recipe", "show", "demo").out
    assert tomllib.loads(shown)["base"] == "tiny"
    assert supra("recipe", "copy", "demo", "mine.toml").out.strip() == "mine.toml"
    assert (tmp_path / "mine.toml").read_text().strip() == shown.strip()
    for target, told in {"mine.toml": "exists already", "nowhere/mine.toml": "there is no folder nowhere"}.items():
        refused = supra("recipe", "copy", "demo", target)
        assert refused.code == 2
        assert told in refused.error


def test_a_copy_that_the_disk_has_no_room_for_leaves_nothing_in_the_way(supra, monkeypatch, tmp_path):
    def fill(path: Path, text: str, **options: str) -> None:
        path.write_bytes(text[:10].encode())
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as full:
        full.setattr(Path, "write_text", fill)
        refused = supra("recipe", "copy", "demo")
    assert refused.code == 1
    assert "demo.toml: the disk is full" in refused.error
    assert list(tmp_path.iterdir()) == []
    assert supra("recipe", "copy", "demo").code == 0


def test_an_unknown_shipped_recipe_is_exit_2_with_a_near_miss(supra):
    for verb in ("show", "copy"):
        result = supra("recipe", verb, "dmo")
        assert result.code == 2
        assert "did you mean 'demo'" in result.error


def test_a_valid_recipe_is_printed_with_its_defaults_and_is_itself_a_recipe(supra, recipe, tmp_path):
    result = supra("recipe", "validate", recipe())
    assert result.code == 0, result.err
    resolved = tomllib.loads(result.out)
    assert resolved["stages"][0]["optimizer"] == "adamw"
    (tmp_path / "resolved.toml").write_text(result.out)
    assert supra("recipe", "validate", "resolved.toml").out == result.out
    assert supra("recipe", "validate", recipe(), "--set", "stages.0.lr=x").code == 2


def test_the_schema_says_what_every_key_means(supra):
    schema = json.loads(supra("recipe", "schema").out)
    for title, table in {"recipe": schema, **schema["$defs"]}.items():
        assert [name for name, key in table["properties"].items() if not key.get("description")] == [], title
    assert schema["$defs"]["Stage"]["properties"]["optimizer"]["enum"] == ["adamw", "adamw8bit", "adamw-offload"]


def test_every_option_of_a_mixer_and_of_a_stage_says_what_it_means(supra):
    found = json.loads(supra("recipe", "options", "--json").out)
    assert {kind: set(named) for kind, named in found.items()} == {"mixer": set(mixers), "stage": set(stages)}
    for name, options in [*found["mixer"].items(), *found["stage"].items()]:
        assert [key for key, option in options.items() if not option["help"]] == [], name
    assert found["mixer"]["supra"]["gain"]["choices"] == ["none", "head"]
    shown = supra("recipe", "options", "lolcats").out
    assert shown.startswith("mixer lolcats: A softmax window")
    assert '  branch = "hedgehog"  (hedgehog, t2r, gated, gated_delta)\n      The recurrent branch' in shown
    assert "  window = 64  (int | tuple[int, ...])\n      Tokens that a query" in shown  # of the class it extends
    assert "\nmixer" not in shown
    unknown = supra("recipe", "options", "lolcat")
    assert unknown.code == 2
    assert "did you mean 'lolcats'" in unknown.error


def test_peek_shows_rows_as_the_model_will_see_them(supra, recipe):
    document = json.loads(supra("data", "peek", recipe(), "-n", "3", "--json").out)
    assert len(document) == 3
    for row in document:
        assert row["tokens"] == 32 == sum(piece["tokens"] for piece in row["documents"])
    assert "self.buffer" in "".join(piece["text"] for piece in document[0]["documents"])
    plain = supra("data", "peek", recipe())
    assert plain.code == 0
    assert "row 1 from" in plain.out


def test_peek_shows_rows_of_the_first_stage(supra, recipe):
    stage = {"kind": "finetune", "tokens": 128, "batch_tokens": 64}
    path = recipe(stages=[stage | {"seq_len": 16}, stage | {"seq_len": 64}])
    (row,) = json.loads(supra("data", "peek", path, "-n", "1", "--json").out)
    assert row["tokens"] == 16 == sum(piece["tokens"] for piece in row["documents"])


def test_peek_shows_no_document_where_a_cut_row_is_empty(supra, recipe):
    path = recipe(data={"seq_len": 32, "documents": "cut", "sources": [{"path": "short.jsonl"}]})
    (path.parent / "short.jsonl").write_text('{"text": "one two three"}\n' * 40)
    (row,) = json.loads(supra("data", "peek", path, "-n", "1", "--json").out)
    (piece,) = row["documents"]
    assert row["tokens"] == 32 > piece["tokens"]
    assert "one two three" in piece["text"]


def test_peek_at_a_missing_file_is_exit_3(supra, recipe):
    result = supra("data", "peek", recipe(data={"seq_len": 32, "sources": [{"path": "missing.txt"}]}))
    assert result.code == 3
    assert "missing.txt" in result.error


def test_a_report_before_anything_was_scored_is_exit_3_and_says_how(supra, recipe):
    assert supra("uptrain", "--recipe", recipe(), "-o", "out").code == 0
    result = supra("report", "out")
    assert result.code == 3
    assert "supra eval out/last" in result.error


def test_a_report_of_something_else_is_exit_3(supra, tmp_path):
    result = supra("report", tmp_path)
    assert result.code == 3
    assert "no finished run" in result.error
