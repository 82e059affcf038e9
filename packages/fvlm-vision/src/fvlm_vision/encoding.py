"""Calls the family's own processor on a batch and says which token came from which piece of text."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fvlm_core.errors import ConfigError, DataError
from fvlm_vision.expansion import adds_special_tokens, can_expand, encode_expanded
from fvlm_vision.paligemma import taking_text_alone
from fvlm_vision.pixels import FRAMES, SCALE, byte_processor, keeps_bytes, with_scale
from fvlm_vision.reading import Item, placed
from fvlm_vision.refusals import has_one_place_for_pixels, refuse_both_kinds
from fvlm_vision.spans import Span, insertion, move, tokens_in

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image
    from transformers import ProcessorMixin

    from fvlm_vision.render import Rendered
    from fvlm_vision.video import Video

    Images = Sequence[Sequence[Image.Image]]
    Videos = Sequence[Sequence[Video]]

# What processors raise for pixels or text they cannot take; Llama 3.2's of transformers 5.18 and newer an IndexError
# where the first sample has no image.
_REFUSALS = (ValueError, RuntimeError, ZeroDivisionError, IndexError)
_NOT_FOR_THE_MODEL = ("offset_mapping", "text_replacement_offsets", "labels")


@dataclass
class Encoded:
    """A batch as the processor gave it.

    Args:
        batch: its tensors; text is padded on the right.
        trained: shape (batch, tokens), bool: which tokens lie in the trained spans; None for all of them.
        per_token: the names of the tensors whose first two dimensions are (batch, tokens).
    """

    batch: dict[str, torch.Tensor]
    trained: torch.Tensor | None
    per_token: tuple[str, ...]


class Encoder:
    """Calls a processor once per batch, with what a user would pass to it.

    Args:
        processor: the family's processor.
        pad_to_multiple_of: as in the tokenizer's call.
        videos_kwargs: of the video processor's call.
    """

    def __init__(
        self, processor: ProcessorMixin, pad_to_multiple_of: int | None, videos_kwargs: dict[str, Any]
    ) -> None:
        self.processor = taking_text_alone(processor)
        self.pad_to_multiple_of = pad_to_multiple_of
        self.videos_kwargs = videos_kwargs
        self.as_bytes = False
        self._can_expand = can_expand(processor)
        self._has_one_place = has_one_place_for_pixels(processor)
        self._media_names = {
            name
            for part in ("image_processor", "video_processor")
            if part in processor.get_attributes()
            for name in getattr(processor, part).model_input_names
        }

    def keeping_bytes(self) -> Encoder:
        """Return a copy that leaves pixels bytes (`fvlm_vision.pixels`), where the family's processor allows it."""
        if not keeps_bytes(self.processor):
            return self
        other = copy.copy(self)
        other.processor, other.as_bytes = byte_processor(self.processor), True
        return other

    def encode(self, items: Sequence[Item]) -> Encoded:
        """Return the batch.

        Args:
            items: the samples.

        Raises:
            DataError: the processor refuses a sample; it names the row.
            ConfigError: spans are needed and the processor or tokenizer does not tell where its tokens come from.
        """
        if self._has_one_place:
            refuse_both_kinds(items)
        try:
            return self._encoded(items)
        except DataError as error:
            for item in items:  # which of them was it?
                try:
                    self._encoded([item])
                except DataError as own:
                    raise placed(own, item.row, item.where) from own.__cause__
            raise error

    def _encoded(self, items: Sequence[Item]) -> Encoded:
        texts = [item.rendered for item in items]
        images, videos = [item.images for item in items], [item.videos for item in items]
        with_spans = any(videos) or any(text.trained is not None for text in texts)
        if with_spans and not self.processor.tokenizer.is_fast:
            raise ConfigError(
                f"{type(self.processor.tokenizer).__name__} does not tell where tokens come from, so part of a sample "
                "cannot be trained alone; use the fast tokenizer."
            )
        if self._can_expand and not any(videos):
            return self._expanded(texts, images, with_spans)
        output = self._process([text.text for text in texts], images, videos, with_spans)
        batch = {name: _tensor(value) for name, value in output.items() if name not in _NOT_FOR_THE_MODEL}
        if self.as_bytes:
            batch = with_scale(batch, self.processor)
        trained = None
        if with_spans:
            offsets = _tensor(output["offset_mapping"])
            pieces = output.get("text_replacement_offsets") or [[] for _ in texts]
            laid_out = self._laid_out([text.text for text in texts], images)
            rows = zip(texts, laid_out, offsets, pieces, strict=True)
            trained = torch.stack([_trained_tokens(*row) for row in rows])
        return Encoded(batch, trained, self._per_token(batch))

    def _per_token(self, batch: dict[str, Any]) -> tuple[str, ...]:
        shape = batch["input_ids"].shape
        media = self._media_names | {SCALE, FRAMES}
        return tuple(n for n, t in batch.items() if n not in media and t.shape[:2] == shape)

    def _expanded(self, texts: list[Rendered], images: Images, with_spans: bool) -> Encoded:
        """Return what the processor would, without a call of the whole of it (`fvlm_vision.expansion`)."""
        flat = [image for row in images for image in row]
        pixels: dict[str, Any] = {"image_grid_thw": torch.zeros(0, 3, dtype=torch.int64)}
        try:
            if flat:
                pixels = dict(self.processor.image_processor(flat, return_tensors="pt"))
        except _REFUSALS as error:
            raise _refused(error) from error
        counts, multiple = [len(row) for row in images], self.pad_to_multiple_of or 1
        batch, trained = encode_expanded(self.processor, texts, counts, pixels["image_grid_thw"], multiple, with_spans)
        if flat:
            batch |= pixels
        if self.as_bytes:
            batch = with_scale(batch, self.processor)
        return Encoded(batch, trained, self._per_token(batch))

    def _laid_out(self, texts: list[str], images: Images) -> list[str]:
        """Return the texts with what the family's processor inserts (PaliGemma a token after the images, for one)."""
        sources: Any = [list(row) for row in images] if any(images) else None
        laid_out = self.processor.prepare_inputs_layout(images=sources, text=list(texts))[1]
        return texts if laid_out is None else list(laid_out)

    def _process(self, texts: list[str], images: Images, videos: Videos, with_spans: bool) -> dict[str, Any]:
        try:
            return self._call(self.processor, texts, images, videos, with_spans)
        except _REFUSALS as error:
            # Some families' checks refuse text-only samples beside others; none of them takes videos.
            if any(images) and not all(images) and not any(videos):
                mixed = self._process_mixed(texts, images, with_spans)
                if mixed is not None:
                    return mixed
            raise _refused(error) from error

    def _process_mixed(self, texts: list[str], images: Images, with_spans: bool) -> dict[str, Any] | None:
        """Process a mixed batch without the family's own check of it, samples with images first; None where that fails.

        What the check is for, one image for each placeholder, the collator has checked already.
        """
        processor = copy.copy(self.processor)  # the check is switched off on this copy alone
        vars(processor)["validate_inputs"] = lambda *_, **__: None
        order = sorted(range(len(texts)), key=lambda row: not images[row])
        try:
            output = self._call(processor, [texts[i] for i in order], [images[i] for i in order], [], with_spans)
        except _REFUSALS:
            return None
        rows, with_images = len(texts), sum(map(bool, images))
        back = [order.index(row) for row in range(rows)]
        restored: dict[str, Any] = {}
        for name, value in output.items():
            if isinstance(value, list):
                restored[name] = [value[place] for place in back]
                continue
            tensor = _tensor(value)
            if len(tensor) == with_images:  # nothing was made for the samples without images, which come last
                tensor = torch.cat([tensor, tensor.new_zeros(rows - with_images, *tensor.shape[1:])])
            if len(tensor) != rows:
                return None  # not one row for each sample: the order could not be restored
            restored[name] = tensor[back]
        return restored

    def _call(
        self, processor: ProcessorMixin, texts: list[str], images: Images, videos: Videos, with_spans: bool
    ) -> dict[str, Any]:
        text_kwargs: dict[str, Any] = {"padding": True, "padding_side": "right"}
        if self.pad_to_multiple_of is not None:
            text_kwargs["pad_to_multiple_of"] = self.pad_to_multiple_of
        if not adds_special_tokens(processor, texts):  # as `apply_chat_template` also asks
            text_kwargs["add_special_tokens"] = False
        if with_spans:
            text_kwargs |= {"return_offsets_mapping": True, "return_text_replacement_offsets": True}
        # Text comes as lists: not every processor can make tensors while it also returns the replacements.
        arguments: dict[str, Any] = {"text": list(texts), "text_kwargs": text_kwargs}
        if any(images):
            arguments |= {"images": [list(row) for row in images], "images_kwargs": {"return_tensors": "pt"}}
        flat = [video for row in videos for video in row]
        if flat:
            metadata = [video.metadata for video in flat]
            arguments["videos"] = [video.frames for video in flat]
            arguments["videos_kwargs"] = {**self.videos_kwargs, "video_metadata": metadata, "return_tensors": "pt"}
        return dict(processor(**arguments))


def _refused(error: Exception) -> DataError:
    return DataError(f"the processor refuses a sample ({' '.join(str(error).split())}).")


def _tensor(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    array = np.asarray(value)
    return torch.from_numpy(
        array.astype(np.float32) if array.dtype == np.float64 else array
    )  # as `return_tensors` does


def _trained_tokens(
    text: Rendered, laid_out: str, offsets: torch.Tensor, replacements: list[dict[str, Any]]
) -> torch.Tensor:
    """Return which tokens lie in the text's trained spans, after insertions and then replacements moved them.

    What stands for a video is not among them, the times that a processor writes between its frames included.
    """
    in_videos = tokens_in([tuple(piece["new_span"]) for piece in replacements if piece["type"] == "video"], offsets)
    if text.trained is None:
        return ~in_videos
    pieces: list[tuple[Span, Span]] = [(tuple(piece["span"]), tuple(piece["new_span"])) for piece in replacements]
    ((length, _),) = move([(len(laid_out), len(laid_out))], pieces)
    inserted = insertion(text.text, laid_out)
    if inserted is None or int(offsets.max()) > length:
        raise ConfigError(
            "this processor does not tell where it put its media, so part of a sample cannot be trained alone; train "
            "on whole conversations."
        )
    return tokens_in(move(move(text.trained, [inserted]), pieces), offsets) & ~in_videos
