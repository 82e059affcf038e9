"""How many tokens a sample will have, its media included, without decoding a pixel: for length-grouped sampling."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from fvlm_core.errors import DataError
from fvlm_vision.expansion import adds_special_tokens
from fvlm_vision.paligemma import laid_out
from fvlm_vision.reading import placed

if TYPE_CHECKING:
    from fvlm_vision.reading import SampleReader
    from fvlm_vision.render import Rendered

logger = logging.getLogger(__name__)

_CHUNK = 256


class TokenCounter:
    """Counts the tokens of samples.

    An image's tokens follow from its size, which its header tells. Most processors work them out from a size, all but
    a constant (the marks around an image); the others are shown a blank image of each size once, and those that cut an
    image into crops only where it is alone (LLaVA-OneVision) two blank ones, where a sample has several.

    Args:
        processor: the family's processor.
        reader: of the collator; opens samples as it does.
        limit: the most tokens that a sample keeps; None for no limit.
    """

    def __init__(self, processor: Any, reader: SampleReader, limit: int | None) -> None:
        self.processor = processor
        self.reader = reader
        self.limit = limit
        self._of_size: dict[tuple[int, int, bool], int] = {}
        # By this a model is told which images were alone in their sample, and so cut.
        self._cuts_if_alone = "batch_num_images" in processor.image_processor.model_input_names
        self._of_video: dict[tuple[Any, ...], int] = {}
        self._marks: int | None = None

    def lengths(self, rows: Any, column: str = "length") -> list[int]:
        """Return the tokens of each row, at most `limit`.

        Args:
            rows: anything with a length and integer indices.
            column: a row that has it is not counted: it says how long it is.

        Raises:
            DataError: a row cannot be used; it is named.
        """
        started = time.monotonic()
        lengths: list[int] = []
        for start in range(0, len(rows), _CHUNK):
            lengths += self._chunk(rows, range(start, min(start + _CHUNK, len(rows))), column)
        logger.info("Counted the tokens of %d samples in %.1f s.", len(lengths), time.monotonic() - started)
        return lengths if self.limit is None else [min(length, self.limit) for length in lengths]

    def _chunk(self, rows: Any, numbers: range, column: str) -> list[int]:
        lengths: dict[int, int] = {}
        texts: dict[int, Rendered] = {}
        for number in numbers:
            row = rows[number]
            try:
                if isinstance(row, dict) and isinstance(row.get(column), int):
                    lengths[number] = row[column]
                    continue
                conversation, texts[number] = self.reader.text(row)
                beside_others = self._cuts_if_alone and len(conversation.images) > 1
                lengths[number] = sum(self._image_tokens(image, beside_others) for image in conversation.images)
                lengths[number] += sum(map(self._video_tokens, conversation.videos))
            except DataError as error:
                raise placed(error, number, "") from error
        if texts:
            for number, count in zip(texts, self._text_tokens([text.text for text in texts.values()]), strict=True):
                lengths[number] += count
        return [lengths[number] for number in numbers]

    def _image_tokens(self, source: Any, beside_others: bool) -> int:
        """Return how many tokens an image has beyond its one placeholder."""
        size = self.reader.resize.size_for(*self.reader.images.size(source))
        key = (*size, beside_others)
        if key not in self._of_size:
            tokens = self._blank_image_tokens(*size, count=2) // 2 if beside_others else self._tokens_of_size(*size)
            self._of_size[key] = tokens
        return self._of_size[key]

    def _text_tokens(self, texts: list[str]) -> list[int]:
        special = adds_special_tokens(self.processor, texts)
        texts = [laid_out(self.processor, text) for text in texts]
        return [len(ids) for ids in self.processor.tokenizer(texts, add_special_tokens=special)["input_ids"]]

    def _tokens_of_size(self, width: int, height: int) -> int:
        if not hasattr(self.processor, "_get_num_multimodal_tokens"):  # what vLLM plans its batches with
            return self._blank_image_tokens(width, height)
        if self._marks is None:
            self._marks = self._blank_image_tokens(64, 64) - self._worked_out(64, 64)
        return self._worked_out(width, height) + self._marks

    def _worked_out(self, width: int, height: int) -> int:
        counts: list[int] = self.processor._get_num_multimodal_tokens([(height, width)])["num_image_tokens"]
        return counts[0]

    def _blank_image_tokens(self, width: int, height: int, count: int = 1) -> int:
        images = [[Image.new("RGB", (width, height))] * count]
        return self._blank_tokens(self.processor.image_token * count, images=images)

    def _video_tokens(self, source: Any) -> int:
        """Return how many tokens a video has beyond its placeholder: as many as a blank one of its size and times."""
        metadata = self.reader.videos.look(source)
        key = (*metadata["frames_indices"], metadata["fps"], metadata["width"], metadata["height"])
        if key not in self._of_video:
            shape = len(metadata["frames_indices"]), 3, metadata["height"], metadata["width"]
            settings = {**self.reader.videos.settings(), "video_metadata": [metadata], "return_tensors": "pt"}
            blank = torch.zeros(shape, dtype=torch.uint8)
            self._of_video[key] = self._blank_tokens(self.processor.video_token, videos=[blank], videos_kwargs=settings)
        return self._of_video[key]

    def _blank_tokens(self, tokens: str, **media: Any) -> int:
        mark = (self.processor.tokenizer.bos_token or "") + tokens
        plain = {"add_special_tokens": False}
        whole = self.processor(text=[mark], text_kwargs=plain, **media)["input_ids"][0]
        return len(whole) - len(self.processor.tokenizer([laid_out(self.processor, mark)], **plain)["input_ids"][0])
