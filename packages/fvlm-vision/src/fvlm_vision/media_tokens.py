"""The texts that a tokenizer reads as media: no author's text may hold them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    from transformers import ProcessorMixin


def media_text_pattern(processor: ProcessorMixin, media_ids: Collection[int]) -> re.Pattern[str] | None:
    """Return a pattern of the texts that would become media tokens, or None when there are none.

    Args:
        processor: its tokenizer reads the texts; its own placeholders count too.
        media_ids: the ids of the media tokens (`fvlm_core.arch.media_token_ids`).
    """
    added = processor.tokenizer.added_tokens_decoder
    texts = {added[token_id].content for token_id in media_ids if token_id in added}
    texts.update(processor.all_special_multimodal_tokens)
    return re.compile("|".join(map(re.escape, sorted(texts)))) if texts else None
