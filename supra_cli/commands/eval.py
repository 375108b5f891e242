"""`supra eval`: what the student kept of its teacher."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from supra_cli.commands import console, scores
from supra_cli.core.files import write_json

_SECONDS_A_LINE = 30


def run(
    model: Annotated[
        str | None,
        typer.Argument(help="Directory, alias or hub id.", show_default="the newest finished output under runs/"),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            "-t",
            help="Measures, and tasks, groups or tags of lm-eval: a,b or -t a -t b.",
            show_default="stdlib_cloze,stdlib_ppl",
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the JSON document here too.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Questions a task, rows a figure of a measure; all, and 64, by default.")
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples in the prompt, else the task's own.")] = None,
    batch_size: Annotated[
        str, typer.Option(metavar="N|auto", help="Rows a forward pass; auto: what a quarter of the memory holds.")
    ] = "8",
    max_length: Annotated[
        int | None,
        typer.Option(min=16, help="Tokens of context.", show_default="the base's, at most 4096"),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--apply-chat-template", help="Ask in the model's chat template, as lm-eval does.")
    ] = False,
    include_path: Annotated[Path | None, typer.Option(help="Folder with lm-eval task files of your own.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Model to compare with, or none.", show_default="the student's base")
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Tokens, as 512,1024: gaps of repeats and recall_pairs, longest row of positions, prompts of RULER.",
            show_default="each measure's own",
        ),
    ] = None,
    with_baselines: Annotated[
        bool,
        typer.Option(
            "--baselines", help="Score an untrained window and the student before training on lm-eval's tasks too."
        ),
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (bf16 on CUDA), float32, bfloat16 or float16.")] = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Score again what was scored before.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Score a model on tasks, its teacher beside it: chance-corrected recovery, perplexity, standard errors."""
    from supra_cli.core import checkpoint, evaluate, hub

    evaluate.hush()
    start = time.monotonic()
    rows = _batch_size(batch_size)
    if output is not None:
        console.make_room(output)
    source = hub.chosen(model)
    console.note(f"model: {source}")
    with _watch() as progress:
        progress("", "reading the tasks and their data", 0, 0)
        asked, others = evaluate.split_names(tasks if tasks is not None else ["stdlib_cloze,stdlib_ppl"])
        tokens = _lengths(lengths)
        if others or not asked:
            ruler = {"tokenizer": str(hub.fetch(source)), "max_seq_lengths": list(tokens)} if tokens else None
            found = evaluate.find(others, include_path, metadata=ruler)
        else:
            found = evaluate.Tasks((), {}, {}, None)
            given = {"--num-fewshot": num_fewshot is not None, "--apply-chat-template": chat}
            _check_heeded({**given, "--include-path": include_path, "--baselines": with_baselines})
        if tokens:
            evaluate.check_lengths(asked, found)
        student = _subject(source, device, dtype)
        reference = _teacher(student.path, teacher, device, dtype)
        length = max_length or evaluate.context_length(student, reference)
        if rows is None:
            subjects = [subject for subject in (student, reference) if subject is not None]
            fitting = [evaluate.rows_that_fit(each.path, length, each.device, each.dtype) for each in subjects]
        settings = evaluate.Settings(
            limit=limit,
            num_fewshot=num_fewshot,
            batch_size=rows or min(fitting),
            batch_size_auto=rows is None,
            max_length=length,
            apply_chat_template=chat,
        )
        material = evaluate.material(student, reference, asked, settings, tokens) if asked else None
        # Baselines are made of the student's own base; another teacher is none.
        own = teacher in (None, checkpoint.read_provenance(student.path).get("base"))
        beside = evaluate.baselines(student, reference if own else None) if asked or with_baselines else {}
        document = evaluate.evaluate(
            student,
            reference,
            found,
            settings,
            baselines=beside if with_baselines else None,
            fresh=fresh,
            progress=progress,
        )
        if asked:
            subjects = {"student": student, **({"teacher": reference} if reference else {}), **beside}
            document["measures"], document["subjects"] = evaluate.measure(
                subjects, asked, material, fresh=fresh, progress=progress
            )
            document["seconds"] = round(time.monotonic() - start, 1)
    try:
        if output is not None:
            write_json(output, document)
    finally:  # what was paid for is shown, where it cannot be written too
        if json:
            console.document(document)
        else:
            scores.show(document, found.headline)
        scores.warn(document, found.headline)


def _lengths(text: str | None) -> tuple[int, ...]:
    from supra_cli.core.errors import UsageError

    parts = [] if text is None else [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise UsageError(f"--lengths is '{text}', expected numbers of tokens, as in 512,1024")
    return tuple(dict.fromkeys(map(int, parts)))


def _check_heeded(options: Mapping[str, object]) -> None:
    """UsageError for an option that only lm-eval's tasks heed, where none is asked."""
    from supra_cli.core.errors import UsageError

    for option, given in options.items():
        if given:
            raise UsageError(f"{option} is for tasks of lm-eval, and measures alone are asked; leave it out")


def _batch_size(text: str) -> int | None:
    """Rows, None for `auto`."""
    from supra_cli.core.errors import UsageError

    if text == "auto":
        return None
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise UsageError(f"--batch-size is '{text}', expected a number from 1, or auto")
    return int(text)


@contextmanager
def _watch() -> Iterator[Callable[[str, str, int, int], None]]:
    """Show that work goes on: one line that changes on a terminal, else a line every 30 seconds; nothing when quiet.

    From a thread, so that loading, drawing a long answer and resampling, which count nothing, are shown too.
    """
    stream, terminal = sys.stderr, sys.stderr.isatty()
    if console.is_quiet():
        yield lambda model, what, done, total: None
        return
    state: dict[str, Any] = {"line": ("", "", 0, 0), "since": time.monotonic()}
    finished = threading.Event()

    def progress(*line: Any) -> None:
        if line[:2] != state["line"][:2]:
            state["since"] = time.monotonic()
            if terminal:
                stream.write("\x1b[K")  # a note may follow
        state["line"] = line

    def show() -> None:
        while not finished.wait(0.5 if terminal else _SECONDS_A_LINE):
            text = _progress_line(*state["line"], time.monotonic() - state["since"])
            # On a terminal the cursor goes back, so that a note is not appended to the line.
            stream.write(f"\x1b[K{text[: shutil.get_terminal_size().columns - 1]}\r" if terminal else f"{text}\n")
            stream.flush()
        if terminal:
            stream.write("\x1b[K")

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield progress
    finally:
        finished.set()
        thread.join()


def _progress_line(model: str, what: str, done: int, total: int, seconds: float) -> str:
    begin = f"{model}: {what}" if model else what
    if not total:
        return f"{begin}, for {console.duration(round(seconds))}"
    left = f", about {console.duration(round(seconds / done * (total - done)))} left" if done else ""
    return f"{begin}: {done:,} of {total:,} requests in {console.duration(round(seconds))}{left}"


def _subject(source: Any, device: str, dtype: str) -> Any:
    from supra_cli.core import checkpoint, evaluate, hub
    from supra_cli.core import device as devices

    target = devices.resolve(device)
    kind = devices.dtype(dtype, target)
    path = hub.fetch(source)

    def load() -> tuple[Any, Any]:
        tokenizer = checkpoint.load_tokenizer(path)  # before the weights, which take longer to read
        return checkpoint.load(path, device=target, dtype=kind), tokenizer

    return evaluate.Subject(
        name=source.name,
        path=path,
        load=load,
        device=target,
        dtype=str(kind).removeprefix("torch."),
        # A folder of the hub's cache is a directory too, where it is named by its path.
        owned=source.kind == "directory" and hub.commit_of(path.resolve()) is None,
    )


def _teacher(student: Path, wanted: str | None, device: str, dtype: str) -> Any:
    """The teacher that was asked for, or the base that the student's provenance names; None for neither."""
    from supra_cli.core import checkpoint, hub
    from supra_cli.core.errors import NotFoundError

    if wanted == "none":
        return None
    base = wanted or checkpoint.read_provenance(student).get("base")
    if base is None:
        return None
    try:
        source = hub.resolve(base)
        console.note(f"teacher: {source}")
        return _subject(source, device, dtype)
    except NotFoundError as error:
        if wanted is not None:
            raise
        raise NotFoundError(
            f"the student's teacher is not here: {error}; name another with --teacher, or --teacher none"
        ) from error
