"""Which token ids stand for media: placeholders and the marks around them. They are never learned.

No list of ids is kept here. They are read from what the model's config and the processor declare (`image_token_id`,
`vision_start_token_id`, `boi_token_index`, …) and from the tokenizer's special tokens that are named after a medium.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

_MEDIUM = r"(?:image|img|vision|video|audio|boi|eoi|boa|eoa)"
_ATTRIBUTE = re.compile(rf"(?:.*_)?{_MEDIUM}(?:_\w*)?_?token(?:_id|_ids|_index)?|row_col_ids")
_SPECIAL = re.compile(rf"[<\[|/]+(?:\w+[_-])*{_MEDIUM}(?:[_-]\w+)*[>\]|]+|<row_\d+_col_\d+>", re.IGNORECASE)


def media_token_ids(config: PreTrainedConfig, processor: ProcessorMixin) -> frozenset[int]:
    """Return the ids of every media placeholder and media mark of a model.

    Args:
        config: the model's config, top level.
        processor: its processor, with a tokenizer.

    Returns:
        Token ids; empty for a processor that declares none.
    """
    tokenizer = processor.tokenizer
    found: set[int] = set()
    for owner in (config.to_dict(), vars(processor), _named_specials(tokenizer)):
        for name, value in owner.items():
            if _ATTRIBUTE.fullmatch(name):
                found.update(_ids(value, tokenizer))
    for modality_ids in (processor.image_token_ids, processor.video_token_ids, processor.audio_token_ids):
        found.update(_ids(modality_ids, tokenizer))
    for token_id, token in tokenizer.added_tokens_decoder.items():
        if token.special and _SPECIAL.fullmatch(token.content):
            found.add(token_id)
    return frozenset(found)


def _named_specials(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}


def _ids(value: Any, tokenizer: PreTrainedTokenizerBase) -> Iterable[int]:
    if isinstance(value, bool) or value is None:
        return ()
    if isinstance(value, int):
        return (value,) if value >= 0 else ()
    if isinstance(value, str):
        token_id = tokenizer.get_vocab().get(value)
        return () if token_id is None else (token_id,)
    if isinstance(value, list | tuple):
        return [token_id for item in value for token_id in _ids(item, tokenizer)]
    return ()


def media_text_pattern(processor: ProcessorMixin, media_ids: frozenset[int]) -> re.Pattern[str] | None:
    """Return a pattern of the texts that the tokenizer would read as media, or None when there are none."""
    added = processor.tokenizer.added_tokens_decoder
    texts = [re.escape(added[token_id].content) for token_id in media_ids if token_id in added]
    return re.compile("|".join(sorted(texts))) if texts else None
