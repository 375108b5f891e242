"""Text from a model: `prefill` reads the prompts in one pass, `decode` goes on by one token, in memory that stays."""

from supra_cli.core.generate.sampling import Sampling, choose
from supra_cli.core.generate.streaming import Piece, Stats, complete, decode, encode, eos_ids, prefill, stream
from supra_cli.core.generate.writer import Writer

__all__ = [
    "Piece",
    "Sampling",
    "Stats",
    "Writer",
    "choose",
    "complete",
    "decode",
    "encode",
    "eos_ids",
    "prefill",
    "stream",
]
