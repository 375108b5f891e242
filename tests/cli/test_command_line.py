"""The entry: help, verbs found by their files, exit codes, one sentence for every error."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from supra_cli import __main__ as entry
from supra_cli.core import errors

ROOT = Path(__file__).resolve().parent.parent.parent


def process(*arguments: str, code: str | None = None, **options) -> subprocess.CompletedProcess:
    """`supra` in a process of its own; `code` replaces the module."""
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "supra_cli"]
    environment = {**os.environ, **options.pop("env", {})}
    return subprocess.run([*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, **options)


@pytest.fixture
def failing(monkeypatch):
    """A verb `fail` that raises what it is given."""

    def install(error: BaseException) -> None:
        def run() -> None:
            raise error

        class Module:
            pass

        module = Module()
        module.run = run
        monkeypatch.setattr(entry, "_verbs", lambda: iter([("fail", module), ("other", module)]))

    return install


def test_help_names_the_four_verbs_first_and_loads_no_torch():
    code = """
import sys
from supra_cli.__main__ import main
assert main(["--help"]) == 0
heavy = {"torch", "transformers", "numpy", "pydantic", "datasets", "lm_eval"} & set(sys.modules)
assert not heavy, heavy
"""
    result = process(code=code)
    assert result.returncode == 0, result.stderr
    places = [result.stdout.index(f" {verb} ") for verb in ("convert", "uptrain", "eval", "generate", "doctor")]
    assert places == sorted(places)


def test_a_file_in_commands_is_a_verb():
    names = {name for name, _ in entry._verbs()}
    files = {path.stem for path in (ROOT / "supra_cli" / "commands").glob("*.py")}
    assert names == files - {"__init__", "console", "scores"}  # which show what verbs say


def test_every_verb_has_help_debug_and_quiet(supra):
    for name, module in entry._verbs():
        if hasattr(module, "app"):
            assert supra(name, "--help").code == 0
            continue
        result = supra(name, "--help")
        assert result.code == 0
        assert "--debug" in result.out
        assert "--quiet" in result.out


def test_the_version_is_printed(supra):
    import supra_cli

    assert supra("--version").out.strip() == supra_cli.__version__


def test_no_arguments_show_the_help(supra):
    result = supra()
    assert "convert" in result.out
    assert "error" not in result.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["convret"], "Did you mean 'convert'"),
        (["convert"], "takes a MODEL"),
        (["convert", "tiny", "--mixr", "supra"], "--mixr"),
        (["convert", "tiny", "--seed", "many"], "--seed"),
        (["convert", "tiny", "--seed", "-1"], "--seed"),
    ],
)
def test_a_wrong_command_line_is_exit_2_and_one_sentence(supra, arguments, words):
    result = supra(*arguments)
    assert result.code == 2
    assert words in result.error
    assert result.out == ""
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["convert", "tiny", "-o", "a", "-o", "b"], "--output/-o"),
        (["convert", "tiny", "-o", "a", "--output=a"], "--output/-o"),
        (["eval", "tiny", "--limit", "1", "--limit", "2"], "--limit"),
        (["generate", "tiny", "-p", "x", "--seed", "1", "--seed", "1"], "--seed"),
        (["generate", "tiny", "-p", "x", "--stream", "--no-stream"], "--stream/--no-stream"),
    ],
)
def test_an_option_that_takes_one_value_is_not_given_twice(supra, arguments, name):
    result = supra(*arguments)
    assert result.code == 2
    assert f"{name} is given 2 times, expected once" in result.error


def test_options_that_are_made_for_it_and_plain_flags_are_repeated(supra, base):
    repeated = ("--set", "mixer.gain=none", "--set", "mixer.gain=head", "-q", "-q", "--json", "--json")
    result = supra("convert", base, "--dry-run", *repeated)
    assert result.code == 0
    assert '"gain": "head"' in result.out


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.SupraError("failed"), 1),
        (errors.UsageError("wrong"), 2),
        (errors.NotFoundError("absent"), 3),
        (errors.NotAuthorisedError("gated"), 4),
        (errors.ResourceError("no GPU"), 5),
        (errors.Stopped("stopped"), 75),
        (KeyboardInterrupt(), 130),
        (MemoryError(), 5),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), 5),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), 5),
        (OSError(errno.ENOSPC, "No space left on device"), 1),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 1),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 1),
        (OSError(errno.EROFS, "Read-only file system", "/x"), 1),
        (OSError(errno.ELOOP, "Too many levels of symbolic links", "/x"), 2),
    ],
)
def test_every_kind_of_failure_has_its_exit_code_and_a_sentence(supra, failing, error, code):
    failing(error)
    result = supra("fail")
    assert result.code == code
    assert len(result.error.split()) > 1
    assert "internal error" not in result.error
    assert "Traceback" not in result.err


def test_ctrl_c_in_a_running_verb_is_told_once():
    command = [sys.executable, "-m", "supra_cli", "generate", "tiny", "-p", "class Reader:", "--max-new-tokens", "2000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    def heeded() -> None:  # what starts the tests in the background lets them ignore it
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, cwd=ROOT, preexec_fn=heeded, **pipes) as running:
        running.stdout.read(1)
        running.send_signal(signal.SIGINT)
        _, told = running.communicate(timeout=60)
    assert running.returncode == 130
    assert told.splitlines()[-1] == "error: interrupted"
    assert told.count("interrupted") == 1


@pytest.mark.parametrize("refused", ["cache/tokens/x", "cache/tokens", "cache", "."])
@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_refusal_in_the_cache_names_what_moves_the_cache(supra, failing, monkeypatch, tmp_path, refused, code):
    monkeypatch.setenv("SUPRA_CACHE", str(tmp_path / "new" / "cache"))
    failing(OSError(code, os.strerror(code), str(tmp_path / "new" / refused)))
    result = supra("fail")
    assert result.code == 1
    assert "set SUPRA_CACHE to a folder" in result.error
    assert " -o" not in result.error


def test_a_refusal_elsewhere_does_not_speak_of_the_cache(supra, failing, monkeypatch, tmp_path):
    monkeypatch.setenv("SUPRA_CACHE", str(tmp_path / "cache"))
    failing(OSError(errno.EROFS, "Read-only file system", str(tmp_path / "student")))
    assert supra("fail").error.endswith("the file system is read-only; choose a place you may write to")
    failing(OSError(errno.EISDIR, "Is a directory", str(tmp_path)))  # in which the cache lies, too
    assert "SUPRA_CACHE" not in supra("fail").error


def test_cuda_running_out_of_memory_is_exit_5(supra, failing):
    import torch

    failing(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    result = supra("fail")
    assert result.code == 5
    assert "smaller batch" in result.error


def test_an_internal_error_is_one_sentence_and_a_log_file(supra, failing, monkeypatch, tmp_path):
    monkeypatch.setattr(entry.tempfile, "gettempdir", lambda: str(tmp_path))
    failing(KeyError("surprise"))
    result = supra("fail")
    assert result.code == 1
    assert "internal error (KeyError: 'surprise')" in result.error
    (log,) = tmp_path.glob("supra-error-*.log")
    assert str(log) in result.error
    assert "Traceback" in log.read_text()


def test_an_internal_error_with_a_name_of_other_bytes_is_written_down(supra, failing, monkeypatch, tmp_path):
    monkeypatch.setattr(entry.tempfile, "gettempdir", lambda: str(tmp_path))
    failing(ValueError(os.fsdecode(b"caf\xe9")))
    assert supra("fail").code == 1
    (log,) = tmp_path.glob("supra-error-*.log")
    assert r"ValueError: caf\udce9" in log.read_text()


@pytest.mark.parametrize(
    "arguments",
    [("convert", b"caf\xe9"), ("convert", "tiny", "-o", b"caf\xe9"), ("convert", "tiny", b"--output=runs/caf\xe9")],
)
def test_a_name_that_is_not_utf8_is_refused_before_anything_is_written(supra, tmp_path, arguments):
    result = supra(*(os.fsdecode(argument) for argument in arguments))
    assert result.code == 2
    assert r"caf\udce9' is not UTF-8" in result.error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("output", ["loop", "loop/student"])
def test_a_link_that_leads_back_to_itself_is_one_sentence(supra, base, output):
    os.symlink("loop", "loop")
    result = supra("convert", base, "-o", output)
    assert result.code == 2
    assert "a link leads back to itself" in result.error
    assert os.listdir() == ["loop"]


def test_an_internal_error_without_room_for_a_log_is_still_told(supra, failing, monkeypatch):
    monkeypatch.setattr(entry.tempfile, "gettempdir", lambda: "/nowhere/at/all")
    failing(KeyError("surprise"))
    result = supra("fail")
    assert result.code == 1
    assert "Traceback" in result.err


def test_debug_shows_the_traceback(supra, failing):
    failing(errors.SupraError("failed"))
    assert "Traceback" in supra("fail", "--debug").err
    assert "Traceback" not in supra("fail").err


def test_a_closed_pipe_is_quiet():
    code = """
import sys
from supra_cli.__main__ import main
sys.exit(main(["--version"]))
"""
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert result.returncode == 1
    assert result.stderr == ""


def test_closed_streams_are_no_error():
    code = """
import sys
sys.stdout = sys.stderr = None  # as Python leaves them after `>&- 2>&-`
from supra_cli.__main__ import main
from supra_cli.commands import console
assert main(["--version"]) == 0
console.raw("text")
console.note("text")
"""
    assert process(code=code).returncode == 0


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_without_unicode_never_crashes(encoding):
    code = """
import sys
from supra_cli.__main__ import main
from supra_cli.commands import console
assert main(["--help"]) == 0
console.result("naïve 東京 →")
console.document({"text": "東京"})
console.table([("東京", 1)], ("→", "n"))
"""
    result = process(code=code, env={"PYTHONIOENCODING": encoding}, encoding=encoding)
    assert result.returncode == 0, result.stderr
    assert '"\\u6771\\u4eac"' in result.stdout


def test_no_color_is_respected():
    result = process("--help", env={"NO_COLOR": "1", "FORCE_COLOR": "1"})
    assert "\x1b[3" not in result.stdout


def test_the_shell_completes_verbs():
    result = process(
        code="from supra_cli.__main__ import main; main([])",
        env={"_SUPRA_COMPLETE": "complete_bash", "COMP_WORDS": "supra con", "COMP_CWORD": "1"},
    )
    assert result.stdout.split() == ["convert"]


def test_a_group_of_verbs_is_a_module_with_an_app(supra, monkeypatch):
    group = typer.Typer(help="Some verbs.")
    seen = []

    @group.command("list")
    def show(name: str, size: int = 0) -> None:
        """Show one."""
        seen.append(name)

    @group.command("other")
    def other() -> None:
        """Show none."""

    module = type("Module", (), {"app": group})
    monkeypatch.setattr(entry, "_verbs", lambda: iter([("things", module), ("more", module)]))
    assert supra("things", "list", "one", "--quiet").code == 0
    assert "--size is given 2 times" in supra("things", "list", "one", "--size", "1", "--size", "2").error
    assert seen == ["one"]


def test_doctor_tells_versions_and_devices(supra):
    import json

    result = supra("doctor", "--json")
    assert result.code == 0
    found = json.loads(result.out)
    assert found["versions"]["torch"]
    assert found["auto_device"] in ("cpu", "cuda", "mps")
