"""What PaliGemma's processor writes into a text, and how it takes samples without an image.

It writes the beginning token behind the last image, and a line feed behind the prompt. In a batch with images it writes
the token behind the sixth character of a text without one; a batch without images it refuses. The model takes both:
without an image the prefix is the beginning token, the prompt and the line feed.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import ProcessorMixin


def taking_text_alone(processor: ProcessorMixin) -> ProcessorMixin:
    """Return a processor that also takes samples without images: a copy where the family's own does not, else itself.

    What tells where the text's pieces go, and the check for images, are replaced on the copy alone. It takes texts as
    a list and images as a list for each text, or none at all.
    """
    if not _marks_the_prefix(processor):
        return processor
    copied: Any = copy.copy(processor)
    vars(copied)["prepare_inputs_layout"] = partial(_layout, processor)
    vars(copied)["validate_inputs"] = _unchecked
    return copied  # type: ignore[no-any-return]


PROMPT_END = "\n"


def laid_out(processor: ProcessorMixin, text: str) -> str:
    """Return a text with what PaliGemma's processor adds to it; with any other processor, the text.

    Args:
        processor: of the family.
        text: with one placeholder for each image, or none.
    """
    if not _marks_the_prefix(processor):
        return text
    family: Any = processor
    at = text.rfind(family.image_token)
    at = 0 if at < 0 else at + len(family.image_token)
    return f"{text[:at]}{family.tokenizer.bos_token}{text[at:]}{PROMPT_END}"


def prompt_end(processor: ProcessorMixin) -> str:
    """Return what stands between a prompt and its completion where no template says so: nothing, but for PaliGemma."""
    return PROMPT_END if _marks_the_prefix(processor) else ""


def _marks_the_prefix(processor: ProcessorMixin) -> bool:
    from transformers import PaliGemmaProcessor

    return type(processor) is PaliGemmaProcessor


def _layout(
    processor: ProcessorMixin, images: Sequence[Sequence[Any]] | None = None, text: Sequence[str] = (), **_: Any
) -> tuple[list[Any] | None, list[str], None, None]:
    """Do what `ProcessorMixin.prepare_inputs_layout` does, text by text."""
    flat = [image for row in images or () for image in row]
    return flat or None, [laid_out(processor, one) for one in text], None, None


def _unchecked(**_: Any) -> None:
    """Let everything pass: the collator has counted placeholders and images."""
