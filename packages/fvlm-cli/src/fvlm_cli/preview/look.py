"""A config → what each of its rows becomes, row by row through the collator that training uses."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from fvlm_cli.bars import track
from fvlm_cli.config.schema import TrainConfig
from fvlm_cli.data.read import read_data
from fvlm_cli.data.row import Row
from fvlm_cli.output import Output
from fvlm_cli.preview.duplicates import duplicates, shared_images
from fvlm_cli.preview.tokens import Piece, pieces
from fvlm_core.errors import DataError

if TYPE_CHECKING:
    from fvlm_cli.inspection.opened import Opened
    from fvlm_cli.preview.pictures import Seen
    from fvlm_vision import FastVisionDataCollator

Fate = Literal["whole", "truncated", "skipped", "refused"]


@dataclass(frozen=True)
class Shown:
    """One row, in full.

    Attributes:
        place: where it stands in its file.
        fate: what becomes of it.
        reason: why it is not whole, or "".
        pieces: its tokens.
        images: as the model gets them.
    """

    place: str
    fate: Fate
    reason: str
    pieces: list[Piece]
    images: list[Seen]

    def count(self, kind: str) -> int:
        """Return how many tokens are of a kind."""
        return sum(len(piece.ids) for piece in self.pieces if piece.kind == kind)


@dataclass
class Preview:
    """What a run would see.

    Attributes:
        rows, eval_rows: how many can be used; of a stream, of those that were looked at.
        streamed: whether there may be more rows to train on, which nobody has counted.
        checked: how many of the training rows went through the collator.
        limit: `model.max_seq_length`.
        lengths: tokens of each checked row before any cut.
        learned: trained tokens of each checked row that is not left out.
        fates: how many checked rows are whole, truncated, skipped and refused.
        changed: (place, fate, reason) of those that are not whole, in order.
        refused: the errors of rows that cannot be used at all.
        duplicates: (place, place of the first one).
        leaked: (place in the evaluation rows, place in the training rows) of equal images.
        shown: the first rows in full.
    """

    rows: int
    eval_rows: int
    limit: int
    streamed: bool = False
    checked: int = 0
    lengths: list[int] = field(default_factory=list)
    learned: list[int] = field(default_factory=list)
    fates: dict[Fate, int] = field(default_factory=lambda: {"whole": 0, "truncated": 0, "skipped": 0, "refused": 0})
    changed: list[tuple[str, Fate, str]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    leaked: list[tuple[str, str]] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)


def look(config: TrainConfig, out: Output, *, show: int, check: int) -> Preview:
    """Put a config's rows through its collator.

    Args:
        config: the checked config; the model's weights are not read.
        out: told what is going on.
        show: how many of the first rows to keep in full.
        check: how many training rows go through the collator; 0: all of them.

    Raises:
        FvlmError: the config, a data file or the model's processor cannot be used.
    """
    refused: list[DataError] = []
    train, evaluate = read_data(
        config.data,
        config.train.seed,
        lambda rows, total: track(out, rows, total, "checking rows"),
        refused,
        streamed=None if check == 0 else max(check, show),
    )
    from fvlm_cli.inspection.opened import open_model

    model = config.model
    opened = open_model(model.name, model.trust_remote_code, model.revision, model.token)
    vars(opened.skeleton)["max_seq_length"] = model.max_seq_length
    looker = _Looker(config, opened)
    chosen = train if check == 0 else train[: max(check, show)]
    preview = Preview(len(train), len(evaluate), model.max_seq_length, config.data.streaming)
    preview.refused = [str(error) for error in refused]
    if not out.debug:
        logging.getLogger("fvlm_vision").setLevel(logging.ERROR)  # what is cut or left out is said here, row by row
    for number, row in enumerate(track(out, chosen, len(chosen), "reading rows")):
        looker.look_at(row, number, preview, keep=number < show)
    preview.checked = len(chosen)
    preview.duplicates = duplicates(train, evaluate)
    preview.leaked = shared_images(train, evaluate)
    return preview


class _Looker:
    """Looks at rows through one collator."""

    def __init__(self, config: TrainConfig, opened: Opened) -> None:
        from fvlm_cli.training.collate import build_collator
        from fvlm_core.arch import media_token_ids

        self.processor: Any = opened.processor()
        collator = build_collator(config.data, opened.skeleton, self.processor)
        self.collator: FastVisionDataCollator = collator.keeping_empty_batches()
        self.limit = config.model.max_seq_length
        self.data = config.data
        self.whole = copy.copy(self.collator)
        self.whole.max_seq_length = None
        self.image_ids = media_token_ids(opened.facts, opened.skeleton.config, self.processor).image

    def look_at(self, row: Row, number: int, preview: Preview, *, keep: bool) -> None:
        """Add a row to the preview."""
        try:
            batch = self.whole([row.sample])
            length = int(batch["attention_mask"][0].sum())
            fate, reason, kept, labels = self._fate(row, batch, length)
        except DataError as error:
            sentence = f"{row.place}: {error.reason.removeprefix('sample 0 of the batch: ')}"
            preview.fates["refused"] += 1
            preview.refused.append(sentence)
            return
        learned = (labels != self.collator.ignore_index).tolist()
        learned[0] = False  # the first token is predicted from nothing
        preview.lengths.append(length)
        preview.fates[fate] += 1
        if fate != "skipped":
            preview.learned.append(sum(learned[:kept]))
        if fate != "whole":
            preview.changed.append((row.place, fate, reason))
        if keep:
            ids = batch["input_ids"][0, :length].tolist()
            text = pieces(self.processor.tokenizer, ids, learned, self.collator.media_ids, kept)
            preview.shown.append(Shown(row.place, fate, reason, text, self._images(row, batch)))

    def _fate(self, row: Row, batch: dict[str, Any], length: int) -> tuple[Fate, str, int, Any]:
        """Return what becomes of a row, why, how many of its tokens are kept, and its labels before the cut."""
        import torch

        labels = batch["labels"][0, :length]
        if length <= self.limit:
            return "whole", "", length, labels
        before = self.collator.overflow_counts.skipped
        cut = self.collator([row.sample])
        if self.collator.overflow_counts.skipped == before:
            kept = int(cut["attention_mask"][0].sum())
            return "truncated", f"it has {length} tokens, and model.max_seq_length is {self.limit}", kept, labels
        media = torch.isin(batch["input_ids"][0, :length], torch.tensor(sorted(self.collator.media_ids)))
        end = int(media.nonzero()[-1]) + 1 if bool(media.any()) else 0
        if self.data.overflow == "skip":
            reason = f"it has {length} tokens, model.max_seq_length is {self.limit}, and data.overflow is skip"
        elif end > self.limit:
            reason = f"its images end at token {end}, beyond model.max_seq_length={self.limit}, and are never cut"
        else:
            reason = f"of its {length} tokens, the first {self.limit} hold nothing that is trained"
        return "skipped", reason, length, labels

    def _images(self, row: Row, batch: dict[str, Any]) -> list[Seen]:
        """Return a row's images as the model gets them, each through the collator on its own."""
        from fvlm_cli.preview.pictures import Seen, pictures
        from fvlm_vision.media import MAX_IMAGE_PIXELS, ImageReader
        from fvlm_vision.samples import read_sample

        sources: Sequence[Any] = read_sample(row.sample).images
        reader = ImageReader(self.data.max_image_pixels or MAX_IMAGE_PIXELS, self.data.allow_urls)
        found = []
        for source in sources:
            alone = batch
            if len(sources) > 1:
                alone = self.whole([{"prompt": "?", "completion": ".", "images": [source]}])
            seen = pictures(alone, self.processor.image_processor)
            if seen is None:
                continue
            (width, height), tiles, picture = seen
            tokens = sum(token in self.image_ids for token in alone["input_ids"][0].tolist())
            found.append(Seen(width, height, tiles, tokens, reader.read(source).size, picture))
        return found
