"""The ids of a model's media tokens: what to mask in the labels, and where not to cut."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fvlm_core.arch.facts import ArchFacts

if TYPE_CHECKING:
    from transformers import PretrainedConfig, ProcessorMixin


@dataclass(frozen=True)
class MediaTokenIds:
    """Token ids by what they stand for; the sets do not overlap.

    Attributes:
        image: pieces of images.
        video: pieces of videos.
        framing: what opens, closes or splits a media span.
    """

    image: frozenset[int]
    video: frozenset[int]
    framing: frozenset[int]

    @property
    def all(self) -> frozenset[int]:
        """Every id that no loss may be taken on."""
        return self.image | self.video | self.framing


def media_token_ids(facts: ArchFacts, config: PretrainedConfig, processor: ProcessorMixin) -> MediaTokenIds:
    """Return the ids of a model's media tokens.

    They come from the config fields, processor attributes and texts that the facts name, and from the processor's own
    ``image_token_ids`` and ``video_token_ids``. Without a config field, the processor's lists decide alone.

    Args:
        facts: of the model.
        config: the model's config.
        processor: the model's processor.
    """
    media = facts.media
    of_processor = set(_ids(processor.image_token_ids)), set(_ids(processor.video_token_ids))
    image = set(_ids(getattr(config, name) for name in media.image)) or of_processor[0]
    video = (set(_ids(getattr(config, name) for name in media.video)) or of_processor[1]) - image
    framing = of_processor[0] | of_processor[1] | set(_ids(getattr(config, name) for name in media.framing))
    framing |= set(_ids(getattr(processor, name) for name in media.processor if hasattr(processor, name)))
    if media.texts is not None:
        added = processor.tokenizer.added_tokens_decoder
        framing |= {number for number, token in added.items() if re.fullmatch(media.texts, token.content)}
    framing.discard(processor.tokenizer.unk_token_id)  # the processor names a token that its tokenizer does not have
    return MediaTokenIds(frozenset(image), frozenset(video), frozenset(framing - image - video))


def _ids(values: Iterable[Any]) -> Iterable[int]:
    """Flatten ids and lists of ids, without the None of tokens that do not exist."""
    for value in values:
        if isinstance(value, int):
            yield value
        elif isinstance(value, list | tuple):
            yield from _ids(value)
