"""A byte-level BPE tokenizer trained on the spot from a made-up corpus: deterministic, a few dozen milliseconds."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 1024
"""Rows of a tiny embedding and head: a multiple of 64, as bitsandbytes' 4-bit kernels on CPU want it. The trained
vocabulary stays below it."""

_TRAINED_TOKENS = 896  # leaves room for each family's special tokens below VOCAB_SIZE
_WORDS = (
    "and are at describe digit document each find first for from has how image in invoice is it line list many name "
    "number of on page picture please price read receipt says see show sign table text that the there this title to "
    "total transcribe two user video what where which word write you"
)


@lru_cache(maxsize=1)
def _base_vocabulary() -> str:
    """Train the vocabulary that all families share, once a process; return it as the tokenizer's JSON."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    rng = random.Random(0)
    words = _WORDS.split(" ")
    lines = []
    for _ in range(200):
        picked = [rng.choice(words) if rng.random() < 0.8 else str(rng.randrange(10_000)) for _ in range(20)]
        lines.append(" ".join(picked))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_TRAINED_TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    return str(tokenizer.to_str())


def _put_first(tokenizer: Tokenizer, bos: str) -> None:
    """Make the tokenizer put ``bos`` before every text, as those of Llama, Mistral and Gemma do."""
    from tokenizers import processors

    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """Return the id of one of the tokenizer's tokens."""
    return int(tokenizer.get_vocab()[token])


def tiny_tokenizer(
    special: Sequence[str],
    *,
    eos: str,
    pad: str,
    bos: str | None = None,
    beyond: Sequence[str] = (),
    named: Mapping[str, str] | None = None,
) -> PreTrainedTokenizerFast:
    """Make a tokenizer of at most `VOCAB_SIZE` tokens that knows a family's special tokens.

    Args:
        special: every special token of the family; each becomes one id.
        eos: the token that ends an assistant's turn, one of ``special``.
        pad: the padding token, one of ``special``.
        bos: a token that the tokenizer puts before every text by itself, or None when the family has none.
        beyond: special tokens that get the ids from `VOCAB_SIZE` on: the model embeds them but can never say them
            (mllama's image token).
        named: extra attributes by which the processor class finds its tokens, e.g. ``{"image_token": "<image>"}``.

    Raises:
        ValueError: the special tokens do not fit.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_str(_base_vocabulary())
    tokenizer.add_special_tokens(list(special))
    room = VOCAB_SIZE - tokenizer.get_vocab_size()
    if room < 0:
        raise ValueError(f"{len(special)} special tokens are {-room} too many for a tiny vocabulary of {VOCAB_SIZE}.")
    if beyond:
        tokenizer.add_special_tokens([f"<|reserved_{i}|>" for i in range(room)])
        tokenizer.add_special_tokens(list(beyond))
    if bos is not None:
        _put_first(tokenizer, bos)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos,
        pad_token=pad,
        bos_token=bos,
        model_max_length=8192,
        extra_special_tokens=dict(named or {}),
    )
