"""One sample of a dataset, read as far as it can be without its neighbours: text, trained spans, opened media."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fvlm_core.errors import DataError
from fvlm_vision.render import Rendered, Renderer, ResponseMarks
from fvlm_vision.rows import NumberedSample, PlacedSample
from fvlm_vision.samples import Conversation, FormattingFunc, read_sample

if TYPE_CHECKING:
    import re

    from PIL import Image
    from transformers import ProcessorMixin

    from fvlm_vision.media import ImageReader
    from fvlm_vision.places import Kind
    from fvlm_vision.resize import ResizePolicy
    from fvlm_vision.video import Video, VideoReader


@dataclass
class Item:
    """One sample on its way into a batch.

    Args:
        rendered: its text and trained spans.
        images: its images at the size that was asked for, in the order of their placeholders.
        videos: its videos, the same way.
        row: its row in the dataset, where it carries one.
        place: its number in the batch.
        name: what messages call it, where it carries that.
    """

    rendered: Rendered
    images: list[Image.Image]
    videos: list[Video]
    row: int | None
    place: int
    name: str | None = None

    @property
    def where(self) -> str:
        """What messages call it."""
        if self.row is not None:
            return f"row {self.row}"
        return self.name or f"sample {self.place} of the batch"


class SampleReader:
    """Reads samples with one set of rules. Picklable.

    Args:
        processor: its chat template and placeholders are used.
        renderer: turns conversations into text.
        images: opens images.
        resize: gives them their size.
        videos: opens videos.
        formatting_func: turns a row into one of the accepted shapes.
        media_text: matches what no author's text may hold.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        renderer: Renderer,
        images: ImageReader,
        resize: ResizePolicy,
        videos: VideoReader,
        formatting_func: FormattingFunc | None,
        media_text: re.Pattern[str] | None,
    ) -> None:
        self.processor: Any = processor  # Any: what each family declares is not in the base class
        self.renderer = renderer
        self.images = images
        self.resize = resize
        self.videos = videos
        self.formatting_func = formatting_func
        self.media_text = media_text

    def read(self, sample: Any, place: int) -> Item:
        """Return the sample with its images opened.

        Args:
            sample: in one of the shapes that `fvlm_vision.samples` names.
            place: its number in the batch, for messages about a sample that carries no row.

        Raises:
            DataError: the sample or one of its images cannot be used.
        """
        row = sample.row if isinstance(sample, NumberedSample) else None
        name = sample.place if isinstance(sample, PlacedSample) else None
        try:
            conversation, rendered = self.text(sample)
            images = [self.resize.apply(self.images.read(source)) for source in conversation.images]
            videos = [self.videos.read(source) for source in conversation.videos]
        except DataError as error:
            raise placed(error, row, name or f"sample {place} of the batch") from error
        return Item(rendered, images, videos, row, place, name)

    def text(self, sample: Any) -> tuple[Conversation, Rendered]:
        """Return a sample's conversation and its text, without opening its media.

        Raises:
            DataError: the sample cannot be used, or nothing of it would be trained.
        """
        conversation = read_sample(sample, self.formatting_func)
        if self.media_text is not None:
            for text in conversation.texts():
                found = self.media_text.search(text)
                if found:
                    raise DataError(
                        f"a text holds {found.group()!r}, which stands for an image or a video; remove it, or put "
                        '{"type": "image"} where the image belongs.'
                    )
        rendered = self.renderer.render(conversation)
        self._check_placeholders(rendered.text, "image", len(conversation.images))
        if conversation.videos:
            self._check_placeholders(rendered.text, "video", len(conversation.videos))
        return conversation, rendered

    def _check_placeholders(self, text: str, kind: Kind, count: int) -> None:
        if kind == "video" and self.videos.processor is None:
            raise DataError("this model takes no videos; give the frames as images, or drop the sample.")
        token = self.processor.image_token if kind == "image" else self.processor.video_token
        if text.count(token) != count:
            raise DataError(
                f"the chat template writes {text.count(token)} {kind} placeholders for {count} {kind}s; give its "
                "messages the content that it reads."
            )

    def on_responses_only(self, marks: ResponseMarks | None) -> SampleReader:
        """Return a copy of this reader whose spans are what the assistant says."""
        other = copy.copy(self)
        other.renderer = Renderer(self.processor, True, marks, self.renderer.usual)
        return other


def placed(error: DataError, row: int | None, where: str) -> DataError:
    """Return the error with the row number, or with the place in the batch for a sample that carries none."""
    if error.row is not None:
        return error
    return error.at(row) if row is not None else DataError(f"{where}: {error.reason}")
