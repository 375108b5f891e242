"""Models by their names on the hub: the real client and a hub on loopback, when all goes well and when it does not."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fakehub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from safetensors.torch import load_file
from tiny import save_base
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
TEXT = "def read(self, size=-1):\n    return self.buffer[:size]\n"
NAME, LLAMA = "some-org/some-model", "meta-llama/Llama-2-7b-hf"
CHUNK = constants.DOWNLOAD_CHUNK_SIZE
"""Bytes that huggingface_hub writes at a time: what a broken connection brought beyond a multiple of it is lost."""

RECIPE = """
base = "{base}"
mixer = {{ name = "supra" }}
[data]
seq_len = 16
sources = [{{ path = "text.txt" }}]
[[stages]]
kind = "transfer"
tokens = 64
batch_tokens = 64
"""


@pytest.fixture(scope="session")
def large(tmp_path_factory) -> Path:
    """A model whose weights are three of the client's chunks long."""
    shape = {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 4800}
    model = save_base(tmp_path_factory.mktemp("models") / "large", [TEXT * 50], **shape)
    assert (model / "model.safetensors").stat().st_size > 2 * CHUNK
    return model


@pytest.fixture
def server() -> Iterator[fakehub.Hub]:
    with fakehub.running() as server:
        yield server


def environment(server: fakehub.Hub, home: Path) -> dict[str, str]:
    """Of a process whose hub is `server`, with an empty cache and no token."""
    ours = ("HF_", "HUGGING", "SUPRA_", "http_", "https_", "all_", "HTTP_", "HTTPS_", "ALL_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return clean | {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "SUPRA_CACHE": str(home / "supra"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]),
    }


@pytest.fixture
def process(server, tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """`supra` as a process of its own in an empty directory, as whoever types it runs it."""

    def run(*arguments: object, **variables: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "supra_cli", *map(str, arguments)]
        env = environment(server, tmp_path / "home") | variables
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture
def hub(server, supra, tmp_path, monkeypatch) -> Iterator[fakehub.Hub]:
    """The same for `supra` in this process: what huggingface_hub read from the environment is as it would be."""
    for name in {*os.environ} - {*environment(server, tmp_path / "home")}:
        monkeypatch.delenv(name)
    for name, value in environment(server, tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    values = {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "home" / "hub"),
        "HF_TOKEN_PATH": str(tmp_path / "home" / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between attempts
    close_session()
    yield server
    close_session()


@pytest.fixture
def cut_off(hub, monkeypatch) -> Callable[[], None]:
    """From when it is called there is no network, and HF_HUB_OFFLINE says so."""

    def cut() -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        hub.refusals["/"] = (500, {})

    return cut


def error_of(done: subprocess.CompletedProcess) -> str:
    """The one sentence of a process that failed, after which it says nothing."""
    *_, last = done.stderr.splitlines()
    assert last.startswith("error: "), done.stderr
    assert done.stdout == ""
    return last


def write_recipe() -> None:
    Path("text.txt").write_text(TEXT * 50)
    Path("r.toml").write_text(RECIPE.format(base=NAME))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


# -- What works


def test_an_alias_is_converted_from_its_gated_repository(process, server, base, tmp_path):
    """An alias, from its gated repository with a token; then the same without a network, from the cache."""
    commit = server.add(LLAMA, base, gated=True)
    done = process("convert", "llama-7b", HF_TOKEN=fakehub.TOKEN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "runs/llama-7b-supra"
    assert "downloading model.safetensors (1 of 1" in done.stderr
    converted = tmp_path / "runs" / "llama-7b-supra"
    record = json.loads((converted / "supra.json").read_text())
    assert record["base"] == f"{LLAMA}@{commit}"
    original = load_file(base / "model.safetensors")
    written = weights(converted)
    assert all(written[name].equal(tensor) for name, tensor in original.items())

    asked = len(server.requests)
    offline = process("convert", "llama-7b", "-o", "again", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert len(server.requests) == asked
    assert json.loads((tmp_path / "again" / "supra.json").read_text())["base"] == record["base"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("shard", ["5GB", "20KB"], ids=["one shard", "several shards"])
def test_a_hub_model_of_any_kind_is_converted(supra, hub, base, tmp_path, dtype, tied, shard):
    published = tmp_path / "published"
    shutil.copytree(base, published, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((published / "config.json").read_text()) | {"tie_word_embeddings": tied}
    (published / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(base).config)
    model.config.tie_word_embeddings = tied
    if tied:
        model.tie_weights()
    model.to(dtype).save_pretrained(published, max_shard_size=shard)
    hub.add(NAME, published)
    result = supra("convert", NAME)
    assert result.code == 0, result.err
    assert result.out.strip() == "runs/some-model-supra"
    original, written = weights(published), weights(Path("runs/some-model-supra"))
    assert ("lm_head.weight" in original) is not tied
    assert (len(list(published.glob("*.safetensors"))) > 1) is (shard == "20KB")
    assert all(written[name].equal(tensor) and tensor.dtype == dtype for name, tensor in original.items())
    assert supra("inspect", "runs/some-model-supra", "--verify").code == 0


def test_the_licence_of_a_hub_model_goes_with_its_export(supra, hub, base, tmp_path):
    shutil.copytree(base, tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    (tmp_path / "model" / "LICENSE").write_text("Do as you like.\n")
    hub.add(NAME, tmp_path / "model")
    for verb in (("convert", NAME, "-o", "student"), ("export", "student", "-o", "out")):
        assert (result := supra(*verb)).code == 0, result.err
    assert {"base_model: some-org/some-model", "license: apache-2.0"} <= set(
        Path("out/README.md").read_text().splitlines()
    )
    assert Path("out/LICENSE").read_text() == "Do as you like.\n"


def test_weights_that_the_index_does_not_name_are_not_downloaded(supra, hub, base, tmp_path):
    published = tmp_path / "published"
    shutil.copytree(base, published)
    for name in ("consolidated.safetensors", "pytorch_model.bin", "other.safetensors", "original/x.safetensors"):
        (published / name).parent.mkdir(exist_ok=True)
        (published / name).write_bytes(b"x" * 64)
    hub.add(NAME, published)
    assert supra("convert", NAME).code == 0
    assert list(hub.bytes_sent) == ["model.safetensors"]


def test_the_rows_of_a_recipe_are_shown_without_the_weights_of_its_base(supra, hub, base):
    hub.add(NAME, base)
    write_recipe()
    result = supra("data", "peek", "r.toml")
    assert result.code == 0, result.err
    assert "def read" in result.out
    assert not hub.bytes_sent
    assert supra("convert", NAME).code == 0  # which fetches what is not here yet


def test_a_revision_is_a_branch_or_a_commit_and_stays_the_one_that_is_named(supra, hub, base, large):
    old = hub.add(NAME, large)
    new = hub.add(NAME, base, branch="refined")
    for revision, commit in (("refined", new), (old, old), (new, new)):
        assert supra("convert", f"{NAME}@{revision}", "-o", "out", "--overwrite").code == 0
        assert json.loads(Path("out/supra.json").read_text())["base"] == f"{NAME}@{commit}"
    assert supra("convert", f"{NAME}@refined").out.strip() == "runs/some-model-supra"


def test_uptraining_from_a_hub_base_names_its_commit_and_works_from_the_cache(supra, hub, base, cut_off):
    commit = hub.add(NAME, base)
    write_recipe()
    for output in ("run", "offline"):
        result = supra("uptrain", "-r", "r.toml", "-o", output, "--device", "cpu")
        assert result.code == 0, result.err
        assert json.loads(Path(output, "last", "supra.json").read_text())["base"] == f"{NAME}@{commit}"
        cut_off()


def test_what_was_prefetched_is_there_without_a_network(supra, hub, base, cut_off):
    commit = hub.add(NAME, base)
    hub.add(LLAMA, base)
    result = supra("prefetch", "llama-7b", NAME, "--json")
    assert result.code == 0, result.err
    fetched = json.loads(result.out)["models"]
    assert list(fetched) == ["llama-7b", NAME]
    assert Path(fetched[NAME]).name == commit
    cut_off()
    for model in fetched:
        assert (offline := supra("generate", model, "-p", "def", "--max-new-tokens", 2)).code == 0, offline.err


def test_what_is_in_the_cache_is_not_downloaded_again(supra, hub, base):
    hub.add(NAME, base)
    for output in ("a", "b"):
        assert supra("convert", NAME, "-o", output).code == 0
    assert hub.bytes_sent["model.safetensors"] == (base / "model.safetensors").stat().st_size


def test_a_download_shows_a_bar_on_a_terminal(server, large, tmp_path):
    import pty
    import termios

    server.add(NAME, large)
    screen, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (25, 100))
    command = [sys.executable, "-m", "supra_cli", "convert", NAME]
    env = environment(server, tmp_path / "home")
    with subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=terminal) as running:
        os.close(terminal)
        shown = b""
        try:
            while piece := os.read(screen, 4096):
                shown += piece
        except OSError:  # what Linux says of a terminal that nobody writes to any more
            pass
    os.close(screen)
    assert running.returncode == 0, shown
    assert re.search(rb"model\.safetensors: +\d+%\|", shown), shown


def test_a_quiet_download_has_no_bar_and_later_ones_have(supra, hub, base, monkeypatch):
    from huggingface_hub import file_download
    from huggingface_hub.utils import are_progress_bars_disabled

    hub.add(NAME, base)
    get, without = file_download.http_get, []

    def watched(*arguments, **settings):
        without.append(are_progress_bars_disabled())
        return get(*arguments, **settings)

    monkeypatch.setattr(file_download, "http_get", watched)
    quiet = supra("prefetch", NAME, "--quiet")
    assert (quiet.code, quiet.err, set(without)) == (0, "", {True})
    shutil.rmtree("home")
    without.clear()
    assert supra("prefetch", NAME).code == 0
    assert set(without) == {False}


# -- A connection that is cut


@pytest.mark.parametrize("resets", [False, True], ids=["closed", "reset"])
def test_a_download_that_was_cut_goes_on_where_it_was(supra, hub, large, resets):
    hub.add(NAME, large)
    size = (large / "model.safetensors").stat().st_size
    hub.cuts["model.safetensors"], hub.resets = 2 * CHUNK - 1, resets  # what a reset overtakes is lost
    cut = supra("convert", NAME)
    assert (cut.code, cut.out) == (3, "")
    assert cut.error == (
        f"error: the connection to the hub broke off while fetching {NAME}; run again and it goes on from there"
    )
    assert not Path("runs").exists()

    hub.cuts.clear()
    hub.requests.clear()
    hub.bytes_sent.clear()
    done = supra("convert", NAME)
    assert done.code == 0, done.err
    assert "going on at 10.0)" in done.err
    assert hub.ranges("model.safetensors")[-1] == f"bytes={CHUNK}-"
    assert hub.bytes_sent["model.safetensors"] == size - CHUNK
    original, written = weights(large), weights(Path("runs/some-model-supra"))
    assert all(written[name].equal(tensor) for name, tensor in original.items())
    assert not list(Path("home").rglob("*.incomplete"))


def test_a_connection_that_is_reset_is_made_again_while_it_brings_something(supra, hub, large, monkeypatch):
    hub.add(NAME, large)
    hub.cuts["model.safetensors"], hub.resets = 2 * CHUNK - 1, True
    blob = fakehub._Handler._blob

    def mended(handler, *arguments):
        blob(handler, *arguments)
        hub.cuts.clear()

    monkeypatch.setattr(fakehub._Handler, "_blob", mended)
    assert supra("convert", NAME).code == 0
    assert f"bytes={CHUNK}-" in hub.ranges("model.safetensors")


def test_an_interrupted_download_goes_on_where_it_was(supra, hub, large, monkeypatch):
    from huggingface_hub import file_download

    hub.add(NAME, large)
    get = file_download.http_get

    def interrupted(url, stream, **settings):
        get(url, stream, **settings)
        if "model.safetensors" in url:
            stream.truncate(2 * CHUNK)
            raise KeyboardInterrupt

    monkeypatch.setattr(file_download, "http_get", interrupted)
    assert supra("convert", NAME).code == 130
    monkeypatch.setattr(file_download, "http_get", get)
    assert supra("convert", NAME).code == 0
    assert f"bytes={2 * CHUNK}-" in hub.ranges("model.safetensors")


def test_what_arrives_damaged_is_not_kept(supra, hub, base, monkeypatch):
    from huggingface_hub import file_download

    hub.add(NAME, base)
    get = file_download.http_get

    def flipped(url, stream, **settings):
        get(url, stream, **settings)
        if "model.safetensors" in url:
            path = Path(stream.name)
            stream.flush()
            data = path.read_bytes()
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    monkeypatch.setattr(file_download, "http_get", flipped)
    result = supra("convert", NAME)
    assert result.code == 1
    assert "model.safetensors did not arrive as the hub describes it" in result.error
    assert not Path("runs").exists()
    monkeypatch.setattr(file_download, "http_get", get)
    assert supra("convert", NAME).code == 0


# -- What a hub refuses


def as_gated(hub: fakehub.Hub, base: Path) -> None:
    hub.add(NAME, base, gated=True)


def as_absent(hub: fakehub.Hub, base: Path) -> None:
    pass


def answering(status: int, path: str = "/api/models/", **headers: str) -> Callable[[fakehub.Hub, Path], None]:
    def refuse(hub: fakehub.Hub, base: Path) -> None:
        hub.add(NAME, base)
        hub.refusals[path] = (status, {name.replace("_", "-"): value for name, value in headers.items()})

    return refuse


def no_hub(hub: fakehub.Hub, base: Path) -> None:
    """As a proxy's page to log in does."""
    hub.refusals["/"] = (200, {"Content-Type": "text/html"})


def saying(path: str, value: object) -> Callable[[fakehub.Hub, Path], None]:
    """JSON of another kind than a hub's."""

    def say(hub: fakehub.Hub, base: Path) -> None:
        hub.add(NAME, base)
        hub.answers[path] = value

    return say


NO_HUB = "is no Hugging Face hub; check HF_ENDPOINT"
UNSENDABLE = "the token for the hub holds characters that no token has; check HF_TOKEN"
REFUSALS: dict[str, tuple[Callable, str | None, int, str]] = {
    "gated, no token": (as_gated, None, 4, f"{NAME} is gated: accept its terms on its hub page"),
    "token of nobody": (as_gated, "hf_expired", 4, f"the hub refuses {NAME} (401); check HF_TOKEN"),
    "absent, no token": (as_absent, None, 3, "neither a directory here nor a model on the hub that you may see"),
    "absent": (as_absent, fakehub.TOKEN, 3, "neither a directory here nor a model on the hub that you may see"),
    "gated by its terms": (
        answering(403, f"/{NAME}/resolve/", X_Error_Code="GatedRepo"),
        fakehub.TOKEN,
        4,
        f"{NAME} is gated",
    ),
    "forbidden": (answering(403), fakehub.TOKEN, 4, f"the hub refuses {NAME} (403)"),
    "forbidden files": (answering(403, f"/{NAME}/resolve/"), fakehub.TOKEN, 4, f"the hub refuses {NAME} (403)"),
    "too many requests": (answering(429), None, 3, "the hub takes no more requests from here for now (429)"),
    "too many requests for files": (answering(429, f"/{NAME}/resolve/"), None, 3, "for now (429)"),
    "too many requests for weights": (answering(429, "/cdn/"), None, 3, "for now (429)"),
    "broken": (answering(500), None, 3, f"the hub did not deliver {NAME} (500)"),
    "storage broken": (answering(503, "/cdn/"), None, 3, f"the hub did not deliver {NAME} (503)"),
    "disabled": (
        answering(403, X_Error_Message="Access to this resource is disabled."),
        None,
        4,
        f"the hub refuses {NAME} (403) and says: Access to this resource is disabled.",
    ),
    "token that is no ASCII": (as_gated, "hf_é", 4, UNSENDABLE),
    "token that no header can hold": (as_gated, "hf_\x01", 4, UNSENDABLE),
    "no hub": (no_hub, None, 3, NO_HUB),
    "a model that is a list": (saying("/api/models/", []), None, 3, NO_HUB),
    "a model that is nothing": (saying("/api/models/", None), None, 3, NO_HUB),
    "a model without a commit": (saying("/api/models/", {"id": NAME, "sha": None}), None, 3, NO_HUB),
    "files that are numbers": (saying(f"/api/models/{NAME}/tree/", [1]), None, 3, NO_HUB),
    "files without names": (saying(f"/api/models/{NAME}/tree/", [{"type": "file"}]), None, 3, NO_HUB),
    "answers that lead to themselves": (answering(302, "/", Location="/"), None, 3, NO_HUB),
    "files that lead to themselves": (
        answering(302, f"/{NAME}/resolve/", Location=f"/{NAME}/resolve/"),
        None,
        3,
        NO_HUB,
    ),
    "weights that lead to themselves": (answering(302, "/cdn/", Location="/cdn/"), None, 3, NO_HUB),
    "answers that lead nowhere": (answering(302, "/", Location="ftp://a.b/"), None, 3, NO_HUB),
    "files at an address that is none": (answering(302, f"/{NAME}/resolve/", Location="http://["), None, 3, NO_HUB),
    "an answer that is not packed as it says": (answering(200, "/", Content_Encoding="gzip"), None, 3, NO_HUB),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_the_hub_refuses_is_one_sentence(supra, hub, base, monkeypatch, name):
    refuse, token, code, words = REFUSALS[name]
    refuse(hub, base)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    for verb in (("convert", NAME), ("prefetch", NAME)):
        result = supra(*verb)
        assert result.code == code, result.err
        assert words in result.error
        assert result.out == ""
        assert not Path("runs").exists()
        assert not list(Path("home").rglob("*.incomplete"))
    write_recipe()
    result = supra("uptrain", "-r", "r.toml", "-o", "run", "--device", "cpu")
    assert (result.code, words in result.error) == (code, True), result.err
    assert not Path("run").exists()


def test_a_gated_alias_is_refused_in_a_process_of_its_own(process, server, base, tmp_path):
    server.add(LLAMA, base, gated=True)
    done = process("convert", "llama-7b")
    assert done.returncode == 4
    assert error_of(done) == (
        f"error: {LLAMA} is gated: accept its terms on its hub page, then run `hf auth login` or set HF_TOKEN"
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("revision", ["nowhere", "0" * 40])
def test_a_revision_that_is_not_there(supra, hub, base, revision):
    hub.add(NAME, base)
    result = supra("convert", f"{NAME}@{revision}")
    assert result.code == 3
    assert result.error == f"error: {NAME} has no revision '{revision}'"


def test_a_shard_that_the_index_names_and_the_hub_lacks(supra, hub, base, tmp_path):
    published = tmp_path / "published"
    shutil.copytree(base, published, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(published, max_shard_size="60KB")
    (published / "model-00002-of-00004.safetensors").unlink()
    hub.add(NAME, published)
    result = supra("convert", NAME)
    assert result.code == 1
    assert f"{NAME} lacks a weight file that its model.safetensors.index.json names" in result.error
    assert not hub.bytes_sent


def test_a_download_without_room_begins_not_at_all(supra, hub, base, monkeypatch):
    hub.add(NAME, base)
    usage = shutil.disk_usage(base)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    result = supra("convert", NAME)
    assert result.code == 1
    assert "0.0 GiB are free; make room, or set HF_HOME" in result.error
    assert not hub.bytes_sent


def test_a_model_of_which_a_part_is_here_is_told_without_a_network(supra, hub, base, monkeypatch):
    hub.add(NAME, base)
    assert supra("convert", NAME, "--dry-run").code == 0  # of its config alone
    hub.cuts["model.safetensors"] = 100
    assert supra("convert", NAME).code == 3
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = supra("convert", NAME)
    assert result.code == 3
    assert (
        f"{NAME} is only in part on this machine (model.safetensors is not) and HF_HUB_OFFLINE is set" in result.error
    )
    assert f"supra prefetch {NAME}" in result.error


def test_a_hub_that_is_not_there(supra, hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    for arguments in (("convert", "llama-7b"), ("prefetch", "llama-7b")):
        result = supra(*arguments)
        assert result.code == 3
        assert result.error == (
            f"error: {LLAMA} is not on this machine and the hub cannot be reached; run `supra prefetch llama-7b` "
            "where there is a network, or give a model's directory"
        )
    assert not Path("runs").exists()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC], ids=errno.errorcode.get)
def test_a_cache_that_cannot_be_written(supra, hub, base, monkeypatch, code):
    hub.add(NAME, base)

    def refuse(*_, **__):
        raise OSError(code, os.strerror(code), "home/hub")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", refuse)
    result = supra("convert", NAME)
    assert result.code == 1
    assert ("set HF_HOME" if code != errno.ENOSPC else "the disk is full") in result.error
    assert not Path("runs").exists()


def test_a_bit_that_has_flipped_in_the_cache_is_found_by_verify(supra, hub, base):
    hub.add(NAME, base)
    assert supra("inspect", NAME, "--verify").code == 0
    (blob,) = (path for path in Path("home/hub").rglob("blobs/*") if len(path.name) == 64)
    data = blob.read_bytes()
    blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    result = supra("inspect", NAME, "--verify")
    assert result.code == 1
    assert "model.safetensors is not what the hub sent" in result.error
    blob.unlink()
    assert supra("inspect", NAME, "--verify").code == 0


def test_a_converted_model_on_the_hub_is_not_converted_again(supra, hub, base):
    assert supra("convert", base, "-o", "student").code == 0
    hub.add(NAME, Path("student"))
    result = supra("convert", NAME)
    assert result.code == 2
    assert f"'{NAME}' is converted already, to mixer 'supra'" in result.error
    assert not hub.bytes_sent
    assert supra("generate", NAME, "-p", "def", "--max-new-tokens", 2).code == 0


# -- What is on the hub and no model of ours


def published(*names: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for file in folder.glob("*.safetensors"):
            file.unlink()
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"{}" if name.endswith("json") else b"x" * 64)

    return make


def nothing_but(*names: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for file in folder.iterdir():
            file.unlink()
        published(*names)(folder)

    return make


def adapter(folder: Path) -> None:
    nothing_but("adapter_model.safetensors")(folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')


OTHERS: dict[str, tuple[Callable[[Path], None], int, str]] = {
    "pickles": (
        published("pytorch_model.bin"),
        3,
        f"{NAME} holds no safetensors weights but pickled weights (pytorch_model.bin); python -c "
        '"from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
        f"M.from_pretrained('{NAME}').save_pretrained('some-model'); "
        f"T.from_pretrained('{NAME}').save_pretrained('some-model')\" writes them as safetensors",
    ),
    "GGUF": (
        nothing_but("a.Q2_K.gguf", "a.BF16.gguf", "a.Q8_0.gguf"),
        3,
        f"{NAME} is no model: it holds no config.json but weights in GGUF (a.BF16.gguf); with `pip install gguf "
        'accelerate`, python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T',
    ),
    "GGUF and a config": (published("a.Q2_K.gguf", "a.Q8_0.gguf"), 3, "gguf_file='a.Q8_0.gguf'"),
    "adapter": (
        adapter,
        3,
        f"{NAME} holds a PEFT adapter of org/base, expected a whole model; merge it first: with `pip install peft`, "
        'python -c "from peft import AutoPeftModelForCausalLM as M; from transformers import AutoTokenizer as T; '
        f"M.from_pretrained('{NAME}').merge_and_unload().save_pretrained('MERGED'); "
        "T.from_pretrained('org/base').save_pretrained('MERGED')\"",
    ),
    "shards without their index": (
        published("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        1,
        f"{NAME} holds model-00001-of-00002.safetensors and 1 more but not their index",
    ),
    "one file of another name": (published("weights.safetensors"), 3, "download it and name it model.safetensors"),
    "one level down": (nothing_but("final/config.json"), 3, "a folder final does"),
    "diffusers": (nothing_but("model_index.json"), 3, "a diffusers pipeline"),
    "nothing": (nothing_but("README.md"), 3, f"{NAME} is no model: it holds no config.json; name a model"),
    "weights of TensorFlow": (published("tf_model.h5"), 3, f"{NAME} holds no safetensors weights but weights of Ten"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_model_of_ours_is_told_by_its_files(supra, hub, base, tmp_path, name):
    make, code, words = OTHERS[name]
    shutil.copytree(base, tmp_path / "published")
    make(tmp_path / "published")
    hub.add(NAME, tmp_path / "published")
    result = supra("convert", NAME)
    assert result.code == code
    assert words in result.error
    assert not Path("runs").exists()
    assert not hub.bytes_sent


def line_of(result) -> str:
    """The Python that a refusal gives to run."""
    return re.search(r'python -c "(.*)" writes', result.error).group(1)


def test_the_line_for_pickles_makes_a_model_of_them(supra, hub, base, tmp_path):
    shutil.copytree(base, tmp_path / "published", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(AutoModelForCausalLM.from_pretrained(base).state_dict(), tmp_path / "published" / "pytorch_model.bin")
    hub.add(NAME, tmp_path / "published")
    for model, result in ((NAME, "some-model"), ("published", "published")):
        subprocess.run([sys.executable, "-c", line_of(supra("convert", model))], check=True, capture_output=True)
        assert supra("convert", result, "-o", f"from-{result}").code == 0
        torch.testing.assert_close(weights(Path(result)), weights(base))


def test_the_line_for_gguf_makes_a_model_of_it(supra, hub, base, tmp_path):
    import gguf

    pytest.importorskip("accelerate")
    (tmp_path / "published").mkdir()
    write_gguf(gguf, base, tmp_path / "published" / "model.F16.gguf")
    hub.add(NAME, tmp_path / "published")
    for model, result in ((NAME, "some-model"), ("published", "published")):
        subprocess.run([sys.executable, "-c", line_of(supra("convert", model))], check=True, capture_output=True)
        assert supra("convert", result, "-o", f"from-{result}").code == 0
        torch.testing.assert_close(weights(Path(result)), weights(base))


def write_gguf(gguf, base: Path, file: Path) -> None:
    """The tiny Llama as llama.cpp's converter writes one: q and k with the halves of a head interleaved."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), json.loads((base / "tokenizer.json").read_text())
    shape, words = (
        model.config,
        tokenizer["model"]["vocab"] | {t["content"]: t["id"] for t in tokenizer["added_tokens"]},
    )
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(words, key=words.get))
    writer.add_token_types([1] * len(words))
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(shape.bos_token_id)
    writer.add_eos_token_id(shape.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": shape.num_attention_heads, "k_proj": shape.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_line_for_an_adapter_merges_it(supra, hub, base, tmp_path):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(base)
    changed = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, parameter in changed.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    changed.peft_config["default"].base_model_name_or_path = "org/base"
    changed.save_pretrained(tmp_path / "adapter")
    expected = changed.merge_and_unload().state_dict()
    hub.add("org/base", base)
    hub.add(NAME, tmp_path / "adapter")
    subprocess.run([sys.executable, "-c", line_of(supra("convert", NAME))], check=True, capture_output=True)
    assert supra("convert", "MERGED").code == 0
    written = weights(Path("MERGED"))
    torch.testing.assert_close(written, {name: expected[name] for name in written})
