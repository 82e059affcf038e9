"""`FastVisionDataCollator`: samples → the batch that a vision-language model is trained on."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from fvlm_core.arch import facts_for, media_token_ids, task_model
from fvlm_core.arch.packing import packing_of
from fvlm_core.errors import ConfigError, DataError
from fvlm_core.fused import CAUSAL_LAYER, has_fused, has_fused_loss
from fvlm_core.fused.media import MEDIA_ROWS, MEDIA_SIZES, PLACING
from fvlm_core.fused.segments import ROW_MULTIPLE, attends_by_segments
from fvlm_vision.arguments import check_collator, check_processor, positive
from fvlm_vision.encoding import Encoder
from fvlm_vision.labels import label_rows, make_labels, response_marks
from fvlm_vision.lengths import TokenCounter
from fvlm_vision.media import MAX_IMAGE_PIXELS, ImageReader
from fvlm_vision.media_tokens import media_text_pattern
from fvlm_vision.overflow import OverflowCounts
from fvlm_vision.packing import only_trailing_padding, packed, with_segments
from fvlm_vision.reading import Item, SampleReader, placed
from fvlm_vision.refusals import refuse_few_image_tokens
from fvlm_vision.render import Rendered, Renderer, ResponseMarks
from fvlm_vision.resize import resize_policy
from fvlm_vision.samples import FormattingFunc
from fvlm_vision.truncation import Overflow, cut_rows, kept_length
from fvlm_vision.video import VideoReader

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from transformers import PreTrainedModel, ProcessorMixin

    from fvlm_vision.fetch import FetchLimits
    from fvlm_vision.resize import Resize
    from fvlm_vision.video import VideoOptions


class FastVisionDataCollator:
    """Makes batches of image conversations with the family's own processor and chat template.

    Pixels and token ids are those of a direct call of the processor. The collator keeps no reference to the model and
    can be pickled, so dataloader workers can hold it.

    Args:
        model: the model that is trained; its config and `max_seq_length` are read.
        processor: its processor (image processor, tokenizer, chat template).
        max_seq_length: the most tokens a sample may have, media included; None takes the model's `max_seq_length`,
            and means no limit where it has none.
        train_on_responses_only: learn only what the assistant says.
        instruction_part, response_part: the text that opens a user and an assistant turn, e.g.
            ``"<|im_start|>user\\n"`` and ``"<|im_start|>assistant\\n"``; None uses the chat template's ``{%
            generation %}`` marks, else those of the family's templates on the Hub if this one writes them too.
        formatting_func: turns a row of the dataset into one of the accepted sample shapes.
        resize: None or "max" leaves every resolution as it is; an int bounds the longer side; (width, height) is
            exact; "min" bounds the longer side by the model's own image size. In pixels.
        ignore_index: the label of what is not learned.
        pad_to_multiple_of: pad the batch to a multiple of this many tokens.
        packing: put the batch into one row without padding; no sample sees another.
        plan_loss: add `label_rows`, which only a model whose loss takes it can be given; None: where the model has it.
        overflow: what happens to a sample over `max_seq_length`: "truncate" cuts trailing text and leaves the sample
            out when its media do not fit, "skip" leaves it out, "error" raises.
        min_pixels, max_pixels: bounds on an image's width × height; None leaves it.
        max_image_pixels: images with more pixels are refused undecoded.
        allow_urls: whether HTTP(S) images are fetched.
        url_limits: size and time limits of a fetch.
        video_options: which frames of videos are taken, and how large; None takes what the processor takes.

    Raises:
        ConfigError: an argument cannot be used.

    Example:
        >>> collator = FastVisionDataCollator(model, processor)  # doctest: +SKIP
        >>> question = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Read it."}]
        >>> turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "42"}]
        >>> batch = collator([{"messages": turns}])  # doctest: +SKIP
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        max_seq_length: int | None = None,
        train_on_responses_only: bool = False,
        instruction_part: str | None = None,
        response_part: str | None = None,
        formatting_func: FormattingFunc | None = None,
        resize: Resize | None = None,
        ignore_index: int = -100,
        pad_to_multiple_of: int | None = None,
        packing: bool = False,
        plan_loss: bool | None = None,
        overflow: Overflow = "truncate",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        allow_urls: bool = False,
        url_limits: FetchLimits | None = None,
        video_options: VideoOptions | None = None,
    ) -> None:
        check_processor(processor)
        flags = {"train_on_responses_only": train_on_responses_only, "packing": packing, "allow_urls": allow_urls}
        check_collator(flags, overflow, formatting_func, ignore_index, plan_loss, url_limits, video_options)
        marks = response_marks(instruction_part, response_part)
        if marks is not None and not train_on_responses_only:
            raise ConfigError("instruction_part and response_part do nothing without train_on_responses_only=True.")
        self.processor: Any = processor  # Any: what each family declares is not in the base class
        self.max_seq_length = positive("max_seq_length", max_seq_length) or getattr(model, "max_seq_length", None)
        self.ignore_index = ignore_index
        self.pad_to_multiple_of = positive("pad_to_multiple_of", pad_to_multiple_of)
        self.overflow = overflow
        self.overflow_counts = OverflowCounts()
        facts = facts_for(model)
        media = media_token_ids(facts, model.config, processor)
        self.media_ids = media.all
        self.keeps_empty_batches = False  # set by FastVisionTrainer, which can go on after a batch of skipped samples
        images = ImageReader(positive("max_image_pixels", max_image_pixels) or MAX_IMAGE_PIXELS, allow_urls, url_limits)
        videos = VideoReader(processor, images, video_options)
        vision = model.config.to_dict().get("vision_config") or {}
        policy = resize_policy(
            resize,
            min_pixels,
            max_pixels,
            processor=processor,
            image_size=vision.get("image_size") if isinstance(vision.get("image_size"), int) else None,
        )
        self.plan_loss = has_fused_loss(model) if plan_loss is None else plan_loss
        self._plan_media = any(has_fused(model, kind) for kind in PLACING)
        takes_any = self.plan_loss and self._plan_media
        self._least_image_tokens = 1 if takes_any else facts.least_image_tokens
        self._image_ids = torch.tensor(sorted(media.image))
        self._is_causal = has_fused(model, CAUSAL_LAYER)
        self._packing = packing_of(task_model(model)) if packing else None
        self._by_segments = packing and attends_by_segments(model)
        self._plan = None if facts.planner is None else facts.planner(task_model(model))
        self._tells_overflow = True
        self._reader = SampleReader(
            processor,
            Renderer(processor, train_on_responses_only, marks, response_marks(*(facts.turns or (None, None)))),
            images,
            policy,
            videos,
            formatting_func,
            media_text_pattern(processor, self.media_ids),
        )
        self._encoder = Encoder(processor, self.pad_to_multiple_of, videos.settings())
        # A processor that returns labels of its own tells by token types which tokens see what follows them
        # (PaliGemma's prefix): what is learned must not.
        self._has_prefix = {"token_type_ids", "labels"} <= set(processor.model_input_names)

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        """Return the batch: the processor's tensors and `labels`.

        Args:
            samples: in the shapes that `fvlm_vision.samples` names.

        Returns:
            `input_ids`, `attention_mask` and `labels`, shape (batch, tokens), int64, padded on the right; with images
            also the family's pixel tensors, and what its model would otherwise derive from them sample by sample on
            the device (`fvlm_core.batch_plan`). Samples that `overflow` leaves out are missing, so the batch may be
            smaller. With `packing`, shape (1, tokens), and `position_ids` for the mask (`fvlm_vision.packing`).
            With `plan_loss` also `label_rows` (`fvlm_vision.labels.label_rows`).

        Raises:
            DataError: a sample cannot be used; it names the row where the sample carries it (`NumberedSample`).
        """
        if not samples:
            raise DataError("a batch holds no samples; hand the collator at least one.")
        items = [self._reader.read(sample, place) for place, sample in enumerate(samples)]
        return self._batch(items)

    def render(self, sample: Any) -> Rendered:
        """Return the text of a sample and the character spans that are trained, without opening its images.

        Raises:
            DataError: the sample cannot be used, or nothing of it would be trained.
        """
        return self._reader.text(sample)[1]

    def token_counter(self) -> TokenCounter:
        """Return what counts the tokens of samples as this collator will make them, without decoding images."""
        return TokenCounter(self.processor, self._reader, self.max_seq_length)

    def on_responses_only(self, marks: ResponseMarks | None) -> FastVisionDataCollator:
        """Return a copy of this collator that learns only what the assistant says."""
        other = copy.copy(self)
        other._reader = self._reader.on_responses_only(marks)
        return other

    def keeping_empty_batches(self) -> FastVisionDataCollator:
        """Return a copy that gives a batch with nothing to learn, and no error, when every sample is left out."""
        other = copy.copy(self)
        other.keeps_empty_batches = True
        return other

    def for_trainer(self) -> FastVisionDataCollator:
        """Return such a copy for a trainer that tells once an epoch what was over the limit: it counts in silence."""
        other = self.keeping_empty_batches()
        other._tells_overflow = False
        return other

    def keeping_bytes(self) -> FastVisionDataCollator:
        """Return a copy that leaves pixels bytes, of which `fvlm_vision.pixels` makes values on the device.

        For families whose processor does not allow it, the copy does as this one.
        """
        other = copy.copy(self)
        other._encoder = self._encoder.keeping_bytes()
        return other

    def _batch(self, items: list[Item]) -> dict[str, Any]:
        encoded = self._encoder.encode(items)
        ids, mask = encoded.batch["input_ids"], encoded.batch["attention_mask"]
        labels = make_labels(ids, mask, self.media_ids, encoded.trained, self.ignore_index)
        kept = self._lengths(items, ids, mask, labels)
        if None in kept:
            items = [item for item, length in zip(items, kept, strict=True) if length is not None]
            return self._batch(items) if items else self._empty_batch()
        if self._least_image_tokens > 1:
            refuse_few_image_tokens(items, torch.isin(ids, self._image_ids), self._least_image_tokens)
        batch = {**encoded.batch, "labels": labels}
        lengths = [length for length in kept if length is not None]
        if lengths != mask.sum(dim=1).tolist():
            columns = (*encoded.per_token, "labels")
            cut_rows(batch, lengths, self._fill(), columns, self.pad_to_multiple_of or 1)
            for item, length, before in zip(items, lengths, mask.sum(dim=1).tolist(), strict=True):
                if length < before:
                    self._note(item, skipped=False)
        if self._has_prefix:
            learned = batch["labels"] != self.ignore_index
            batch["token_type_ids"] = (learned.cumsum(dim=1) > 0).to(batch["token_type_ids"].dtype)
        return self._finish(batch, encoded.per_token)

    def _finish(self, batch: dict[str, Any], per_token: Collection[str]) -> dict[str, Any]:
        """Return the batch with what is worked out ahead for the device, and packed where that is asked for."""
        if self._plan is not None:
            batch = {**batch, **self._plan(batch)}
        if self._packing is not None:
            multiple = self.pad_to_multiple_of or (ROW_MULTIPLE if self._by_segments else 1)
            batch = packed(batch, self._packing, per_token, self._fill(), self.ignore_index, multiple)
            batch = with_segments(batch) if self._by_segments else batch
        if self.plan_loss:
            batch["label_rows"] = label_rows(batch["labels"], self.ignore_index)
            if self._plan_media and "pixel_values" in batch:
                batch[MEDIA_ROWS] = torch.isin(batch["input_ids"], self._image_ids).flatten().nonzero()[:, 0]
                if "image_sizes" in batch:
                    batch[MEDIA_SIZES] = batch["image_sizes"].tolist()
            if self._is_causal and only_trailing_padding(batch):
                del batch["attention_mask"]
        return batch

    def _fill(self) -> dict[str, int]:
        """Return what stands in the columns where padding is."""
        token = self.processor.tokenizer.pad_token_id
        return {"input_ids": token, "attention_mask": 0, "labels": self.ignore_index}

    def _lengths(
        self, items: list[Item], ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor
    ) -> list[int | None]:
        media = torch.isin(ids, torch.tensor(sorted(self.media_ids), dtype=ids.dtype))
        lengths: list[int | None] = []
        for number, item in enumerate(items):
            # The first token is predicted from nothing: a sample that learns it alone learns nothing.
            learned = labels[number] != self.ignore_index
            learned[0] = False
            length = int(mask[number].sum())
            try:
                if not bool(learned.any()):
                    raise DataError("a sample holds no token to learn; give its assistant turns text, or drop it.")
                kept = kept_length(length, media[number], learned, self.max_seq_length, self.overflow)
            except DataError as error:
                raise placed(error, item.row, item.where) from error
            if kept is None:
                self._note(item, skipped=True)
            lengths.append(kept)
        return lengths

    def _note(self, item: Item, *, skipped: bool) -> None:
        self.overflow_counts.note(skipped, item.row, item.place, self.max_seq_length, log=self._tells_overflow)

    def _empty_batch(self) -> dict[str, Any]:
        if not self.keeps_empty_batches:
            raise DataError(
                f"every sample of a batch is over max_seq_length={self.max_seq_length} and left out; raise "
                "max_seq_length, or shrink the images with resize or max_pixels."
            )
        token = self.processor.tokenizer.pad_token_id
        ids = torch.full((1, 2), token, dtype=torch.int64)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        types = {"token_type_ids", "mm_token_type_ids"} & set(self.processor.model_input_names)
        batch |= {name: torch.zeros_like(ids) for name in types}
        return self._finish({**batch, "labels": torch.full_like(ids, self.ignore_index)}, tuple(batch))
