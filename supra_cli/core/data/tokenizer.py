"""From a text to token ids, and whether a model has room for them; a byte-level BPE tokenizer trained on one's own
text, for a base that is itself trained from scratch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from supra_cli.core.errors import SupraError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

BEGIN, END, PAD = "<s>", "</s>", "<pad>"


def train(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Every byte is in the vocabulary, so no text is unknown; `<s>` opens a text, `</s>` is for whoever closes it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN, END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    begin = (BEGIN, tokenizer.token_to_id(BEGIN))
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[begin]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """UsageError for a tokenizer without a chat template."""
    if tokenizer.chat_template is None:
        raise UsageError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template; leave out --apply-chat-template, or take "
            "a model that was tuned for chats"
        )


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, close: bool = False) -> list[list[int]]:
    """The ids of each text, opened once by what the tokenizer puts before a text, if anything, and with `close` ended
    once by what it puts after one and by its end of text.

    A text that brings its beginning or its end is given no second one. What spells a special token is that token.
    """
    before, after = _template(tokenizer)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    for row, ids in enumerate(rows):
        start = 0
        while before and ids[start : start + len(before)] == before:
            start += len(before)
        ids = before + ids[start:]
        for tail in (after, end) if close else ():
            if ids[len(ids) - len(tail) :] != tail:
                ids = ids + tail
        rows[row] = ids
    return rows


def _template(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text: whatever `add_bos_token` or a template makes of it."""
    special = set(tokenizer.all_special_ids)
    # Not every vocabulary spells "a"; some token that it has it spells in any case.
    spelled = (tokenizer.decode([token]) for token in range(len(tokenizer)) if token not in special)
    for text in itertools.islice(itertools.chain(["a"], spelled), 1000):
        bare, whole = tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer(text)["input_ids"]
        for start in range(len(whole) if bare and special.isdisjoint(bare) else 0):
            if whole[start : start + len(bare)] == bare:
                return whole[:start], whole[start + len(bare) :]
    raise SupraError(
        f"what the tokenizer {tokenizer.name_or_path} puts before and after a text cannot be told from its tokens; "
        "restore its files"
    )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """SupraError unless the model has an embedding for every ordinary token of its tokenizer.

    Tokens that were added to a tokenizer, as padding or for images, often have none and are seldom met: `check_ids`
    refuses them where they are. That a model has more embeddings than tokens is usual.
    """
    highest = max(set(tokenizer.get_vocab().values()).difference(tokenizer.added_tokens_decoder), default=0)
    if highest >= config.vocab_size:
        raise SupraError(
            f"the tokenizer in {tokenizer.name_or_path} has {highest + 1:,} tokens, the model room for "
            f"{config.vocab_size:,}; they do not belong together; restore the model's own tokenizer files"
        )


def check_ids(ids: Iterable[int], tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """SupraError, naming the token, where one of `ids` is beyond the model's embedding."""
    highest = max(ids, default=0)
    if highest >= config.vocab_size:
        raise SupraError(
            f"the text holds token {highest}, {tokenizer.decode([highest])!r}, of the tokenizer "
            f"{tokenizer.name_or_path}, but the model {config.name_or_path} has tokens 0 to {config.vocab_size - 1}; "
            "leave it out of the text, or restore the tokenizer files that the model was trained with"
        )
