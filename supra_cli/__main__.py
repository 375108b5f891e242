"""The command line: the Typer app, filled from `commands/`, and the one error boundary. No logic."""

from __future__ import annotations

import errno
import functools
import importlib
import inspect
import logging
import os
import pkgutil
import platform
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

import supra_cli.commands
from supra_cli.core.environment import versions
from supra_cli.core.errors import ResourceError, SupraError, UsageError, first_line
from supra_cli.core.files import cache_folder

# The order of `supra --help`: the path a model takes, then everything else by name.
_PATH = ("convert", "uptrain", "eval", "generate")

# Operating-system refusals that the user, not the program, has to mend.
_REFUSALS = {
    errno.ENOSPC: "the disk is full; what was complete before is untouched, so free some space and run again",
    errno.EDQUOT: "the disk quota is used up; free some space and run again",
    errno.EFBIG: "a file would be larger than is allowed here (see ulimit -f); choose another place or allow more",
    errno.EACCES: "permission denied; choose a place you may write to",
    errno.EPERM: "operation not permitted; choose a place you may write to",
    errno.EROFS: "the file system is read-only; choose a place you may write to",
    errno.ENOTDIR: "a file stands where a directory is needed; move it or choose another place",
    errno.EISDIR: "a directory stands where a file is needed; move it or choose another place",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.EIO: "the disk reported an input/output error; check it or choose another place",
}


def build() -> typer.Typer:
    """The app with one command, or group of commands, for each module in `supra_cli.commands` that offers one."""
    app = typer.Typer(
        name="supra",
        help="Turn a pretrained transformer into a recurrent model with a fixed-size state, and prove what that cost.",
        epilog="Exit codes: 0 done, 1 failed, 2 usage or recipe, 3 not found or offline, 4 not authorised, "
        "5 out of memory or unsupported hardware, 75 stopped after a clean save, 130 interrupted, 143 terminated.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for name, module in _verbs():
        if isinstance(group := getattr(module, "app", None), typer.Typer):
            for command in group.registered_commands:
                command.callback = _with_common_options(command.callback)
                command.cls = _Verb
            app.add_typer(group, name=name, no_args_is_help=True)
        else:
            app.command(name, cls=_Verb, no_args_is_help=False)(_with_common_options(module.run))
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `supra` with `arguments` (the process's own when None) and return its exit code, the error already told."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Python leaves None where a stream was closed (`>&-`).
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show a character shows `?` instead of crashing
            stream.reconfigure(errors="replace")
    _show_log(debug=False, quiet=False)
    try:
        _check_utf8(arguments)
        with _unwinding():
            code = build()(arguments, prog_name="supra", standalone_mode=False)
        if code == 130:  # what typer makes of a KeyboardInterrupt in a verb, without a word
            raise KeyboardInterrupt
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit complains again
        return 1
    except KeyboardInterrupt:
        return _tell("interrupted", 130)
    except _Terminated as signalled:
        return _tell(f"ended by {signalled.number.name}", 128 + signalled.number)
    except Exception as error:  # the one place: everything ends as a sentence and an exit code
        if logging.getLogger("supra_cli").isEnabledFor(logging.DEBUG):
            traceback.print_exc()
        return _tell(*_verdict(error, arguments))


def _check_utf8(arguments: Sequence[str]) -> None:
    """UsageError for an argument that is no text in UTF-8 nor in the locale's own encoding: safetensors and tokenizers
    cannot open a file of such a name.
    """
    for argument in arguments:
        try:
            argument.encode("utf-8")
        except UnicodeError:
            try:
                os.fsencode(argument).decode("utf-8")
            except UnicodeError:
                raise UsageError(
                    f"{argument!r} is not UTF-8, expected text or the name of a file in UTF-8; convert or rename it"
                ) from None


class _Terminated(BaseException):
    def __init__(self, number: int):
        self.number = signal.Signals(number)


@contextmanager
def _unwinding() -> Iterator[None]:
    """In here SIGTERM and SIGHUP end the process as Ctrl-C does, by way of every `finally`: nothing half-written stays.

    A signal that is ignored, as under nohup, still is, and torchrun's processes are ended as it knows it.
    """

    def end(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)  # a library may swallow the exception; a second ends the process
        raise _Terminated(number)

    alone = threading.current_thread() is threading.main_thread() and "TORCHELASTIC_RUN_ID" not in os.environ
    numbers = (signal.SIGTERM, signal.SIGHUP) if alone else ()
    caught = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in caught:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)


class _Verb(TyperCommand):
    """A command that takes an option once, unless it is made to be repeated: the parser would drop all but the last."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:  # which is how the shell completes
            _, _, order = self.make_parser(ctx).parse_args(args=list(args))
            order = [parameter for parameter in order if isinstance(parameter, TyperOption)]
            for option in order:
                is_plain_flag = option.is_flag and not option.secondary_opts
                if order.count(option) > 1 and not is_plain_flag and not option.multiple:
                    name = "/".join([*option.opts, *option.secondary_opts])
                    ctx.fail(f"{name} is given {order.count(option)} times, expected once; leave out the wrong ones")
        return super().parse_args(ctx, args)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(supra_cli.__version__)
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


def _verbs() -> Iterator[tuple[str, ModuleType]]:
    """(name, module) of every verb: a module of `commands` with a function `run` or a group `app`."""
    names = {module.name for module in pkgutil.iter_modules(supra_cli.commands.__path__)}
    for name in [*(verb for verb in _PATH if verb in names), *sorted(names.difference(_PATH))]:
        module = importlib.import_module(f"supra_cli.commands.{name}")
        if hasattr(module, "run") or hasattr(module, "app"):
            yield name, module


def _with_common_options(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with `--debug` and `--quiet` added, which set the level of the log on stderr."""
    signature = inspect.signature(command, eval_str=True)
    if "debug" in signature.parameters:  # a group's command, which was given them when the app was first built
        return command
    common = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option])
        for name, option in (
            ("quiet", typer.Option("--quiet", "-q", help="Only the result and errors.")),
            ("debug", typer.Option("--debug", help="Log everything; show the traceback of an error.")),
        )
    ]

    @functools.wraps(command)
    def wrapped(*args: Any, quiet: bool, debug: bool, **kwargs: Any) -> None:
        _show_log(debug=debug, quiet=quiet)
        with _no_bars() if quiet else nullcontext():
            command(*args, **kwargs)

    parameters = [*signature.parameters.values(), *common]
    wrapped.__signature__ = signature.replace(parameters=parameters)
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapped


def _show_log(*, debug: bool, quiet: bool) -> None:
    """Log our own messages to stderr as plain lines, and hush torchao, which transformers imports where it is there."""
    log = logging.getLogger("supra_cli")
    log.setLevel(logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.propagate = False
    for name in ("torchao", "torch.utils._pytree"):  # of GPU kernels and of a later torch
        logging.getLogger(name).setLevel(logging.NOTSET if debug else logging.ERROR)


@contextmanager
def _no_bars() -> Iterator[None]:
    """In here huggingface_hub draws no bar while it downloads."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    if shown:
        disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def _verdict(error: Exception, arguments: list[str]) -> tuple[str, int]:
    """(the sentence, the exit code) for anything that a command raised."""
    if isinstance(error, SupraError):
        return str(error), error.exit_code
    if isinstance(error, typer.TyperException):
        return _usage(error), error.exit_code
    if isinstance(error, typer.Abort):
        return "interrupted", 130
    if _is_out_of_memory(error):
        return (
            f"out of memory ({first_line(error)}); "
            "use a smaller batch, a shorter sequence, a smaller --dtype or a larger device",
            ResourceError.exit_code,
        )
    if _is_link_to_itself(error):
        return f"a link leads back to itself ({first_line(error)}); name another place", UsageError.exit_code
    if isinstance(error, OSError) and error.errno in _REFUSALS:
        return _refusal(error), SupraError.exit_code
    if "No space left on device" in str(error):  # as safetensors and tokenizers word it
        return f"{_REFUSALS[errno.ENOSPC]} ({error})", SupraError.exit_code
    return _internal(error, arguments), SupraError.exit_code


def _refusal(error: OSError) -> str:
    """What the operating system refused and where; no option moves supra's cache, so there its variable is named."""
    why = _REFUSALS[error.errno]
    if not isinstance(error.filename, str | bytes):
        return why
    name, cache = os.fsdecode(error.filename), ""
    with suppress(RuntimeError):  # a user without a home
        cache = os.path.realpath(cache_folder())
    refused = os.path.realpath(name)
    is_missing_parent = Path(cache).is_relative_to(refused) and not os.path.exists(refused)
    if cache and (Path(refused).is_relative_to(cache) or is_missing_parent):
        why = f"{why.partition(';')[0]}; set SUPRA_CACHE to a folder where you may write and there is room"
    return f"{name}: {why}"


def _usage(error: typer.TyperException) -> str:
    context = getattr(error, "ctx", None)
    message = error.format_message().strip()
    if context is None or not message:
        return message
    return f"{message.rstrip('.')}; see `{context.command_path} --help`"


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, by the types and words of Python, PyTorch on CUDA, MPS and CPU."""
    torch = sys.modules.get("torch")
    kinds = (MemoryError, torch.OutOfMemoryError) if torch is not None else (MemoryError,)
    words = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, kinds) or (
        isinstance(error, RuntimeError | OSError) and any(word in str(error) for word in words)
    )


def _is_link_to_itself(error: Exception) -> bool:
    """In the words of the operating system, and of pathlib before Python 3.13."""
    if isinstance(error, OSError):
        return error.errno == errno.ELOOP
    return isinstance(error, RuntimeError) and str(error).startswith("Symlink loop")


def _internal(error: Exception, arguments: list[str]) -> str:
    """Write what is needed to mend `error` to a log file; the sentence that names it."""
    report = "\n".join(
        [
            f"supra {arguments}",
            platform.platform(),
            *(f"{name} {version}" for name, version in versions().items()),
            "".join(traceback.format_exception(error)),
        ]
    )
    what = f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0]
    try:
        path = os.path.join(tempfile.gettempdir(), f"supra-error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log")
        with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(report)
    except OSError:
        sys.stderr.write(report)
        return f"internal error ({what}); this is a bug in supra, please report it with the text above"
    return f"internal error ({what}); this is a bug in supra, please report it with {path}"


def _tell(message: str, code: int) -> int:
    if message:  # `supra` alone has shown its help instead
        print(f"error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
