"""README.md of an exported model, as the hub shows it."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import tomli_w
import torch
import yaml

from supra_cli import __version__
from supra_cli.core import checkpoint, hub, report
from supra_cli.core.evaluate import showing
from supra_cli.core.evaluate.store import folder_of
from supra_cli.core.modeling import SupraConfig
from supra_cli.core.recipe.keep import SOFTMAX


def card(path: Path, config: SupraConfig, name: str, dtype: torch.dtype | None = None) -> str:
    """What the model is, what it was made of, what was measured, how to load it. An export's own card goes on with it,
    since nothing else knows what it was made of. `dtype` is that of the weights where they are written in another one
    than they have had, in which nobody has scored them.
    """
    record = checkpoint.read_provenance(path)
    if not record and "supra" in (_head(path / "README.md").get("tags") or ()):
        text = (path / "README.md").read_text(encoding="utf-8", errors="replace")
    else:
        text = _new(path, config, name, record)
    if dtype is None:
        return text
    before = f"Taken before the weights were written in {str(dtype).removeprefix('torch.')}."
    return text.replace(f"{_SCORES}\n", f"{_SCORES}\n\n{before}\n", 1)


_SCORES = "## Scores"


def _new(path: Path, config: SupraConfig, name: str, record: Mapping[str, Any]) -> str:
    swap = config.swap
    base = hub.repo_of(record.get("base") or "")  # nothing of this machine's folders
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["supra"]}
    if base is not None:
        head |= {"base_model": base}
    head |= _licence(path, record.get("base"))
    kept = [str(layer) for layer, kind in enumerate(swap.layers) if kind == SOFTMAX]
    options = "".join(f", {key} = {value}" for key, value in swap.options.items())
    what = f"{base or f'a {swap.base} model'} whose attention was replaced by recurrent layers of fixed-size state"
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {name}\n",
        f"This is {what}, by `supra` {__version__}, which is named after [SUPRA](https://arxiv.org/abs/2405.06640).\n",
        f"- mixer: {swap.mixer}{options}\n- layers: {len(swap.layers)}, "
        + (f"{len(kept)} of them softmax attention still ({', '.join(kept)})" if kept else "all recurrent")
        + _training(record),
        _USAGE,
        *_scores(path),
        *_recipe(record.get("recipe")),
    ]
    if "license" not in head:
        parts.append("## Licence\n\nThat of the base model, which this one holds the weights of.\n")
    return "\n".join(parts)


_USAGE = """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("THIS", trust_remote_code=True)
```

The code beside the weights needs torch and transformers. On a GPU it takes supra's Triton kernels where a clone of its
repository is installed (`supra_kernels`; what PyPI calls `supra` is another project) and has one for the mixer, and
elsewhere PyTorch's operations, which are several times slower.
"""


def _licence(path: Path, base: str | None) -> dict[str, str]:
    """What the base's own card says of its licence, where it lies on this machine."""
    folders = [path, base and hub.cached(base)]
    for said in (_head(folder / "README.md") for folder in folders if folder):
        if "license" in said:
            return {key: said[key] for key in ("license", "license_name", "license_link") if key in said}
    return {}


def _head(card: Path) -> dict[str, Any]:
    """What a card says of its model for machines; nothing where there is none or it makes no sense."""
    text = card.read_text("utf-8", "replace") if card.is_file() else ""
    with suppress(yaml.YAMLError, ValueError):  # a date that there is not
        if found := re.match(r"---\n(.*?)\n---", text, re.DOTALL):
            said = yaml.safe_load(found[1])
            return said if isinstance(said, dict) else {}
    return {}


def _training(record: Mapping[str, Any]) -> str:
    tokens, before = record.get("tokens"), record.get("tokens_before")
    if tokens is None:
        return "\n"
    return f"\n- uptraining: {tokens:,} tokens" + (f", after {before:,} in another run\n" if before else "\n")


def _scores(path: Path) -> Iterator[str]:
    """Of the newest `supra eval` of these very weights, beside the teacher's."""
    weights = checkpoint.identity(path)
    found = report.results(folder_of(path, weights, owned=True), path)
    rows = [
        [
            *(task, metric, showing.shots(result["num_fewshot"]), result["samples"]),
            showing.figure(row["student"], row.get("stderr")),
            showing.figure(row["teacher"], row.get("teacher_stderr")),
        ]
        for task, result in sorted(found.items())
        for metric, row in result.get("metrics", {}).items()
    ]
    measures = {name: result["figures"] for name, result in sorted(found.items()) if "figures" in result}
    tables = [_table(["task", "metric", "n-shot", "questions", *_NAMES.values()], rows)] if rows else []
    if measures:
        roles, lines = showing.measured(measures, tuple(_NAMES))
        tables.append(_table(["measure", "of", "n", *(_NAMES.get(role, role) for role in roles)], lines))
    if tables:
        yield "\n\n".join([_SCORES, *tables]) + "\n"


_NAMES = {"student": "this model", "teacher": "its teacher"}


def _table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _recipe(recipe: Any) -> Iterator[str]:
    """As it was run, of files their names alone."""
    if recipe:
        told = _named(tomllib.loads(recipe) if isinstance(recipe, str) else recipe)
        yield f"## Recipe\n\n```toml\n{tomli_w.dumps(told)}```\n"


def _named(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _named(part, name) for name, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_named(part, key) for part in value]
    private = isinstance(value, str) and (value.startswith(("/", "~", "..")) or "://" in value)
    return Path(value).name if private else value
