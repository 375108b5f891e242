"""Text from a model: `prefill` reads the prompts in pieces, `decode` goes on by one token, in memory that stays."""

from supra_cli.core.generate.sampling import Sampling, choose
from supra_cli.core.generate.steps import compiled, decode, prefill
from supra_cli.core.generate.streaming import Piece, Stats, as_chat, complete, encode, eos_ids, stream, unused_settings
from supra_cli.core.generate.writer import Writer

__all__ = [
    "Piece",
    "Sampling",
    "Stats",
    "Writer",
    "as_chat",
    "choose",
    "compiled",
    "complete",
    "decode",
    "encode",
    "eos_ids",
    "prefill",
    "stream",
    "unused_settings",
]
