"""A model, its processor and images → what the model reads on them, batch by batch and without sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

PROMPT = "Read the text."
"""What quickstart asks about every image; one of the questions that the tiny VLM was pretrained with."""

LONGEST_ANSWER = 12
"""How many tokens an answer may have; a token is a character."""


def question(image: Image.Image | None, answer: str | None = None) -> list[dict[str, Any]]:
    """Write `PROMPT` about an image as the messages of a conversation, with its answer unless that is None.

    The image is left out of its block when it is None: a chat template needs only its place.
    """
    place = {"type": "image"} if image is None else {"type": "image", "image": image}
    messages = [{"role": "user", "content": [place, {"type": "text", "text": PROMPT}]}]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def transcribe(
    model: Any,
    processor: Any,
    images: Sequence[Image.Image],
    *,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Ask the model to read images, greedily.

    All images must give equally many tokens, as images of one size do: then every prompt has the same length and no
    padding is needed.

    Args:
        model: an image-text-to-text model, adapted or not; left in evaluation mode.
        processor: its processor.
        images: what to read.
        batch_size: how many at a time.
        progress: called after each batch with the number of images read in it.

    Returns:
        One string an image.
    """
    import torch

    model.eval()
    prompt = processor.apply_chat_template(question(None), add_generation_prompt=True, tokenize=False)
    answers: list[str] = []
    for start in range(0, len(images), batch_size):
        batch = list(images[start : start + batch_size])
        inputs = processor(images=batch, text=[prompt] * len(batch), return_tensors="pt").to(model.device)
        with torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=LONGEST_ANSWER, do_sample=False)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
        if progress is not None:
            progress(len(batch))
    return answers


def exact_match(answers: Sequence[str], truths: Sequence[str]) -> float:
    """Return the fraction of answers that equal their truth character by character."""
    return sum(answer == truth for answer, truth in zip(answers, truths, strict=True)) / len(truths)
