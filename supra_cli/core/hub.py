"""A model's name → its directory: one that exists, an alias's, or that of `org/name` on the hub. Never guessed.

Plans need no weights: the `config.json` of every aliased base is bundled, so that `--dry-run` works without a network.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from supra_cli.core import connection, download
from supra_cli.core.errors import NotFoundError, SupraError, near_miss
from supra_cli.core.folder import INDEX, Place, check_model, named_shards, no_weights, weight_files

_ASSETS = Path(__file__).resolve().parent.parent / "assets"

BUNDLED = {"tiny": _ASSETS / "tiny"}
"""Aliases of the models that lie in the package, weights and all."""

ALIASES = {
    "llama-7b": "meta-llama/Llama-2-7b-hf",
    "llama-13b": "meta-llama/Llama-2-13b-hf",
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "llama2-13b": "meta-llama/Llama-2-13b-hf",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "pythia-160m": "EleutherAI/pythia-160m",
    "pythia-410m": "EleutherAI/pythia-410m",
    "pythia-1b": "EleutherAI/pythia-1b",
    "pythia-2.8b": "EleutherAI/pythia-2.8b",
    "pythia-6.9b": "EleutherAI/pythia-6.9b",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "tinyllama-1.1b": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
}
"""Short names of hub models; `assets/configs/<org>/<name>/config.json` holds the configuration of each."""

# What a model has besides its weights, of which only those that its index names are downloaded: pickles are never read;
# sub-folders (`original/`) and `consolidated*` repeat them in another layout.
_WANTED = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*", "README.md")
_DESCRIPTIONS = ("config.json", "generation_config.json", "adapter_config.json", "model_index.json")
_UNWANTED = ("*/*", "consolidated*")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True)
class Source:
    """Where a model comes from, as told from its name alone."""

    kind: Literal["directory", "alias", "hub"]
    name: str
    """What the user wrote."""
    repo: str | None = None
    """`org/name` on the hub; None for what lies on this machine."""
    revision: str | None = None
    """Branch, tag or commit on the hub; the newest when None."""
    path: Path | None = None
    """The directory, where it lies on this machine already."""

    def __str__(self) -> str:
        if self.kind == "directory":
            return f"directory {self.path}"
        place = f"bundled with supra, {self.path}" if self.repo is None else f"{self.repo} on the hub"
        revision = f" at {self.revision}" if self.revision else ""
        return f"alias {self.name}: {place}" if self.kind == "alias" else f"{place}{revision}"


def resolve(name: str) -> Source:
    """The source that `name` stands for; touches no network.

    A run directory stands for its `last` model; `org/name@revision`, or an alias with one, pins a commit. NotFoundError
    for anything else, UsageError where HF_ENDPOINT is no address.
    """
    connection.check_endpoint()
    if not name:  # which pathlib takes for the working directory
        raise NotFoundError("the name of the model is empty; name a directory ('.' is this one), an alias or org/name")
    path = Path(os.path.expanduser(name))  # pathlib's own raises for a user that is not there
    if path.is_dir():
        last = path / "last"
        return Source("directory", name, path=last if _is_model(last) and not _is_model(path) else path)
    if path.exists():
        raise NotFoundError(f"'{name}' is a file; a model is a directory with a config.json")
    if (found := alias(name)) is not None:
        return found
    known, _, revision = name.partition("@")
    if _HUB_ID.fullmatch(name) and not name.startswith("."):
        return Source("hub", name, repo=known, revision=revision or None)
    if "/" in name or "\\" in name:
        raise NotFoundError(f"there is no directory '{name}'")
    hint = near_miss(name, [*BUNDLED, *ALIASES])
    raise NotFoundError(f"no model '{name}': it is no directory, no alias and not of the hub's form org/name{hint}")


def alias(name: str) -> Source | None:
    """What `name`, an alias or one with @revision, stands for where no directory is called so; None for any other."""
    if name in BUNDLED:
        return Source("alias", name, path=BUNDLED[name])
    known, _, revision = name.partition("@")
    return Source("alias", name, repo=ALIASES[known], revision=revision or None) if known in ALIASES else None


def chosen(name: str | None) -> Source:
    """The source that `name` stands for, as `resolve` finds it; of None the newest finished output."""
    return resolve(str(newest_output()) if name is None else name)


def fetch(source: Source) -> Path:
    """The model's directory on this machine, downloaded to the hub's cache first where it must be.

    Raises NotFoundError (no such model, offline and not in the cache, no safetensors) or NotAuthorisedError (gated). A
    download that was cut off goes on where it was.
    """
    if source.repo is None:
        check_model(source.path)
        weight_files(source.path)
        return source.path
    with connection.translated(source):
        online = connection.online()
        path = _snapshot(source, _WANTED, online)
        if missing := [name for name in named_shards(path) if not (path / name).exists()]:
            _fetch_weights(source, path, missing, online)
    weight_files(path)
    return path


def open(name: str) -> Path:
    """The directory of the model that `name` stands for, as `resolve` and `fetch` find it."""
    return fetch(resolve(name))


def without_weights(source: Source) -> Path:
    """The model's directory as `fetch` finds it, for what lies beside the weights: of those none is downloaded."""
    if source.repo is None:
        check_model(source.path)
        return source.path
    with connection.translated(source):
        return _snapshot(source, _WANTED, connection.online())


def config_folder(source: Source) -> Path:
    """The directory with the model's config.json, without any weights; for aliased bases it is in the package."""
    if source.repo is None:
        return source.path
    if is_bundled(source):
        return _bundled(source)
    with connection.translated(source):
        return _snapshot(source, _DESCRIPTIONS, connection.online())


def is_bundled(source: Source) -> bool:
    """Whether the model's config.json is in the package or on this machine."""
    return source.repo is None or (source.revision is None and _is_model(_bundled(source)))


def _bundled(source: Source) -> Path:
    return _ASSETS / "configs" / source.repo


def commit_of(path: Path) -> str | None:
    """The hub commit of a model directory that lies in the hub's cache (`.../snapshots/<commit>`)."""
    path = Path(path).absolute()
    return path.name if path.parent.name == "snapshots" else None


def cached(name: str) -> Path | None:
    """The directory of a model that `lasting_name` named, if it is on this machine still; touches no network."""
    from huggingface_hub import try_to_load_from_cache

    if (repo := repo_of(name)) is None:
        folder = BUNDLED.get(name) or Path(name)
        return folder if _is_model(folder) else None
    config = try_to_load_from_cache(repo, "config.json", revision=name.partition("@")[2] or None)
    return Path(config).parent if isinstance(config, str) else None


def repo_of(name: str) -> str | None:
    """The hub repository of a model that `lasting_name` named; None for what lay on a machine alone."""
    return ALIASES.get(name) or (name.partition("@")[0] if _HUB_ID.fullmatch(name) else None)


def lasting_name(source: Source, folder: Path) -> str:
    """The model's name in a record that outlives this machine's caches: alias, `org/name@commit` or absolute path."""
    if source.repo is not None:
        commit = commit_of(folder)
        return f"{source.repo}@{commit}" if commit else source.repo
    return source.name if source.kind == "alias" else str(folder.resolve())


def newest_output(runs: Path = Path("runs")) -> Path:
    """The newest finished model under `runs`: `<run>/last` of an uptraining, or a converted directory itself.

    NotFoundError when there is none.
    """
    models = [folder / "last" if _is_model(folder / "last") else folder for folder in _folders(runs)]
    finished = [model for model in models if _is_model(model)]
    if not finished:
        raise NotFoundError(f"no MODEL given and no finished output under {runs}/; name a model or run `supra convert`")
    return max(finished, key=lambda model: ((model / "config.json").stat().st_mtime, str(model)))


def _folders(root: Path) -> Iterator[Path]:
    """The directories in `root`, one level of grouping (`runs/demo/converted`) included."""
    for folder in _visible(root):
        yield folder
        if not _is_model(folder) and not (folder / "recipe.toml").exists():
            yield from _visible(folder)


def _visible(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return sorted(folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))


def _is_model(path: Path) -> bool:
    return (path / "config.json").is_file()


def _snapshot(source: Source, only: tuple[str, ...], online: bool) -> Path:
    """The hub cache's directory with those files of `source`, which is a model."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import tqdm

    class NoBar(tqdm):
        """Of a few small files, whose bars would be drawn into a pipe, too."""

        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **{**settings, "disable": True})

    if online:
        connection.check_token()
    with connection.answers():
        folder = snapshot_download(
            source.repo,
            revision=source.revision,
            allow_patterns=list(only),
            ignore_patterns=list(_UNWANTED),
            local_files_only=not online,
            tqdm_class=NoBar,
        )
    path = Path(folder)
    check_model(path, lambda: _place(source, path, online))
    return path


def _fetch_weights(source: Source, path: Path, names: list[str], online: bool) -> None:
    """Download the weight files `names` of the commit whose directory is `path`."""
    from huggingface_hub import errors

    if not online:
        raise NotFoundError(
            f"{source.repo} is only in part on this machine ({names[0]} is not) and {connection.why_offline()}; "
            f"run `supra prefetch {source.name}` where there is a network"
        )
    try:
        download.complete(source.repo, path, names)
    except errors.RemoteEntryNotFoundError as error:
        if not (path / INDEX).exists():
            raise no_weights(_place(source, path, online)) from error
        raise SupraError(
            f"{source.repo} lacks a weight file that its {INDEX} names; tell who published it, or name another revision"
        ) from error


def _place(source: Source, path: Path, online: bool) -> Place:
    """The model by its name on the hub, with all files that it has there."""
    from huggingface_hub import HfApi

    if not online:
        return Place.hub(source.repo, source.revision, os.listdir(path))
    with connection.answers():
        files = HfApi().list_repo_files(source.repo, revision=path.name)
    return Place.hub(source.repo, source.revision, files)
