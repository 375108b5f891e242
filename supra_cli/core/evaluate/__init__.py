"""Honest evaluation: lm-evaluation-harness with the teacher beside the student, and perplexity in nats."""

from supra_cli.core.evaluate.batch import rows_that_fit
from supra_cli.core.evaluate.comparison import compare
from supra_cli.core.evaluate.measures import Material, measures
from supra_cli.core.evaluate.measuring import baselines, check_lengths, material, measure
from supra_cli.core.evaluate.nats import Perplexity, mean, next_tokens, perplexity, token_nats
from supra_cli.core.evaluate.run import Subject, context_length, evaluate
from supra_cli.core.evaluate.scoring import Settings, language_model, score
from supra_cli.core.evaluate.tasks import Tasks, bundled, find, hush, split_names

__all__ = [
    "Material",
    "Perplexity",
    "Settings",
    "Subject",
    "Tasks",
    "baselines",
    "bundled",
    "check_lengths",
    "compare",
    "context_length",
    "evaluate",
    "find",
    "hush",
    "language_model",
    "material",
    "mean",
    "measure",
    "measures",
    "next_tokens",
    "perplexity",
    "rows_that_fit",
    "score",
    "split_names",
    "token_nats",
]
