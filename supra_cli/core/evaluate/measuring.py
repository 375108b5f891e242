"""The measures of a model beside its baselines: the teacher, an untrained window, the student before training."""

from __future__ import annotations

import gc
import logging
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from supra_cli.core import checkpoint
from supra_cli.core.environment import versions
from supra_cli.core.errors import UsageError
from supra_cli.core.evaluate import keys
from supra_cli.core.evaluate.measures import NEED_TEACHER, OF_NO_TRAINING, OF_ONE_LENGTH, Material, measures
from supra_cli.core.evaluate.run import Progress, Subject, about, known, positions
from supra_cli.core.evaluate.scoring import Settings
from supra_cli.core.evaluate.store import Store
from supra_cli.core.evaluate.tasks import Tasks, is_of_lengths
from supra_cli.core.files import dumps
from supra_cli.core.mixers import mixers
from supra_cli.core.recipe.keep import SOFTMAX

log = logging.getLogger(__name__)

Figures = dict[str, dict[str, dict[str, dict[str, float]]]]
"""{measure: {label: {role: {value, low, high, n}}}}; roles are as in `supra eval`, or as in a report"""

BEFORE = "before training"
"""The baseline that the student was; the other is the untrained window."""

WINDOW = {"window": 64, "sinks": 4}
"""The window that needs no training, and so what every trained student has to beat."""


def baselines(student: Subject, base: Subject | None) -> dict[str, Subject]:
    """{role: subject}: models made of the same base, nothing of them trained, and the student's branches alone.

    `untrained window`   the mixer `window`, 64 tokens and 4 sinks, in the layers that the student has swapped
    `before training`    the student as it was converted: its own mixer, options, layers and seed; converted again
                         where its run kept no such model, or began with one that had been trained
    `<branch> only`      for a mixer with branches, the student with one of them

    None of them for a plain base; the second not for a student that was not trained.
    """
    swap = checkpoint.read_config(student.path).swap
    if not swap.any:
        return {}
    layers = [str(layer) for layer, kind in enumerate(swap.layers) if kind == SOFTMAX]
    keep = ",".join(layers) or "none"
    provenance = checkpoint.read_provenance(student.path)
    trained = bool(provenance.get("tokens"))
    found: dict[str, Subject] = {}
    if base is not None and (trained or (swap.mixer, swap.options) != ("window", WINDOW)):
        found["untrained window"] = _made(base, "untrained window", mixer="window", options=WINDOW, keep=keep, seed=0)
    if trained:
        seed = provenance.get("seed")  # of the conversion; that of the run's recipe may be another
        seed = _recipe(provenance).get("seed", 0) if seed is None else seed
        kept = student.path.resolve().parent / "converted"
        in_a_run = student.path.resolve().name.startswith("step-") and kept.exists()
        if in_a_run and not provenance.get("tokens_before"):
            found[BEFORE] = _at(student, kept)
        elif base is not None:
            given = {"mixer": swap.mixer, "options": swap.options, "keep": keep, "seed": seed}
            found[BEFORE] = _made(base, BEFORE, **given)
    for branch in mixers.get(swap.mixer).branches:
        found[f"{branch} only"] = _only(student, branch)
    return found


def check_lengths(names: Sequence[str], tasks: Tasks) -> None:
    """UsageError where neither the measures `names` nor the tasks heed `--lengths`."""
    if not any(map(is_of_lengths, tasks.leaves.values())) and not set(names) - set(OF_ONE_LENGTH):
        heeding = ", ".join(name for name in measures if name not in OF_ONE_LENGTH)
        raise UsageError(
            f"--lengths is for {heeding} and RULER's tasks, none of which is asked; leave it out or name one in --tasks"
        )


def material(
    student: Subject, teacher: Subject | None, names: Sequence[str], settings: Settings, lengths: tuple[int, ...] = ()
) -> Material:
    """What the measures `names` ask of the student and of all beside it. The length of training is that of the newest
    recipe that supra knows of, the student's or its teacher's, else the context of the settings.

    UsageError where a measure would have nothing to compare with, or no row, or a teacher that reads other tokens.
    """
    recipes = [_recipe(checkpoint.read_provenance(subject.path)) for subject in (student, teacher) if subject]
    known = [recipe["data"]["seq_len"] for recipe in recipes if "data" in recipe]
    asked = Material(
        checkpoint.load_tokenizer(student.path),
        rows=settings.limit or Material.rows,
        train_length=known[0] if known else settings.max_length,
        lengths=lengths,
        longest=positions(student, teacher),
        batch_size=settings.batch_size,
    )
    compared = [name for name in names if name in NEED_TEACHER]
    if compared and teacher is None:
        raise UsageError(f"{compared[0]} compares with a teacher and there is none; name one with --teacher")
    if "positions" in names and max(lengths, default=2) < 2:
        raise UsageError(f"positions takes rows of 2 tokens or more, got {max(lengths)} as the longest of --lengths")
    if teacher is not None:
        _check_tokens(asked, student, teacher, bool(compared))
    return asked


def _check_tokens(asked: Material, student: Subject, teacher: Subject, compared: bool) -> None:
    """UsageError unless the rows, which the student's tokenizer makes, say the same to the teacher; and unless logits
    are of as many numbers, where they are `compared`. That the teacher has further tokens is no harm.
    """
    theirs, ordinary = Material(checkpoint.load_tokenizer(teacher.path)), set(asked.words.tolist())
    ours, others = (each.tokenizer.get_vocab() for each in (asked, theirs))
    same = all(others.get(token) == number for token, number in ours.items() if number in ordinary)
    if not (same and asked.begin.equal(theirs.begin) and asked.text.equal(theirs.text)):
        raise UsageError(
            f"teacher {teacher.name} has another tokenizer than the student, and a measure gives both the same token "
            "numbers; name a teacher with the student's own, or --teacher none"
        )
    sizes = [checkpoint.read_config(subject.path).vocab_size for subject in (student, teacher)]
    if compared and sizes[0] != sizes[1]:
        raise UsageError(
            f"teacher {teacher.name} has a vocabulary of {sizes[1]}, the student {sizes[0]}; logits can only be "
            "compared over one vocabulary"
        )


def measure(
    subjects: Mapping[str, Subject],
    names: Sequence[str],
    material: Material,
    *,
    fresh: bool = False,
    progress: Progress = lambda model, what, done, total: None,
) -> tuple[Figures, dict[str, dict[str, Any]]]:
    """(the figures, what is known of each subject) of `subjects`, {role: model}, on the measures `names`.

    One model is in memory at a time, and the teacher beside it once a measure has compared the two. What was measured
    before for the same weights and rows is not measured again, unless `fresh`; the figures of all are left beside the
    student's own. UsageError for a measure that has no figure.
    """
    figures: Figures = {name: {} for name in names}
    told: dict[str, dict[str, Any]] = {}
    own: Store | None = None
    taught = subjects.get("teacher")
    compared = taught if set(names) & set(NEED_TEACHER) else None
    reference, of_teacher, _ = known(compared, progress) if compared else (None, None, None)
    questions = {name: _questions(name, material, reference) for name in names}
    teacher = None
    for role, subject in subjects.items():
        asked = [name for name in names if name not in NEED_TEACHER or (taught and role != "teacher")]
        weights, of_model, store = known(subject, progress)
        own = store if role == "student" else own
        key = {name: {**of_model, **questions[name]} for name in asked}
        for name in set(asked) & set(NEED_TEACHER):
            key[name]["teacher"] = of_teacher
        records = {} if fresh else {name: record for name in asked if (record := store.find(name, key[name]))}
        reused, model = list(records), None
        for name in asked:
            if name in records:
                continue
            if model is None:
                progress(subject.name, "loading", 0, 0)
                model = teacher if role == "teacher" and teacher is not None else subject.load()[0]
            if teacher is None and name in NEED_TEACHER:
                teacher, _ = taught.load()
            progress(subject.name, name, 0, 0)
            log.info("%s: %s", subject.name, name)
            values = measures.get(name)(model, material, teacher=teacher)
            if not values:
                raise UsageError(f"{name} has no row that fits; give shorter --lengths, or leave it out")
            records[name] = {"model": subject.name, "values": {k: v._asdict() for k, v in values.items()}}
            store.add(name, key[name], records[name])
        del model
        gc.collect()
        for name in asked:
            for label, value in records[name]["values"].items():
                figures[name].setdefault(label, {})[role] = value
        told[role] = about(subject, weights, store, reused)
    if own is not None:
        for name in names:
            what = {"figures": figures[name], "questions": keys.digest(dumps(questions[name], sort_keys=True))}
            own.note(name, told["student"]["weights"], {**what, "subjects": told})
        told["student"]["records"] = own.place
    return figures, told


def _questions(name: str, material: Material, teacher: str | None) -> dict[str, Any]:
    """What the measure is asked of: of the material what it reads, and the hash of the weights that it compares with.
    Two models that were asked so can stand in one row, whatever code and machine computed either.
    """
    asked = {
        "measure": name,
        "format": keys.FORMAT,
        "rows": material.rows,
        "train_length": material.train_length,
        "lengths": list(material.lengths),
        "longest": material.longest,
        "batch_size": material.batch_size,
        "seed": material.seed,
        "text": keys.digest(dumps([material.begin.tolist(), material.text.tolist()])),
        "python": versions()["python"],
        **({"teacher": teacher} if name in NEED_TEACHER else {}),
    }
    if name in OF_NO_TRAINING or (name == "positions" and material.lengths):
        del asked["train_length"]
    if name in OF_ONE_LENGTH:
        del asked["lengths"]
    return asked


def _recipe(provenance: Mapping[str, Any]) -> dict[str, Any]:
    return tomllib.loads(provenance["recipe"]) if isinstance(provenance.get("recipe"), str) else {}


def _made(base: Subject, name: str, **conversion: Any) -> Subject:
    """The model that converting `base` would give."""

    def load() -> tuple[Any, Any]:
        dtype = getattr(torch, base.dtype)
        model = checkpoint.converted(base.path, **conversion, device=base.device, dtype=dtype)
        return model, checkpoint.load_tokenizer(base.path)

    return replace(base, name=name, load=load, changes=conversion)


def _at(student: Subject, path: Path) -> Subject:
    def load() -> tuple[Any, Any]:
        model = checkpoint.load(path, device=student.device, dtype=getattr(torch, student.dtype))
        return model, checkpoint.load_tokenizer(path)

    return replace(student, name=BEFORE, path=path, load=load)


def _only(student: Subject, branch: str) -> Subject:
    """The student with one branch of its mixers."""

    def load() -> tuple[Any, Any]:
        model, tokenizer = student.load()
        for _, layer in model.swapped_layers():
            layer.mixer.only = branch
        return model, tokenizer

    return replace(student, name=f"{branch} only", load=load, changes={"only": branch})
