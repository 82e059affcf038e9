"""An `Answerer` for the verbs that are given no config."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fvlm_cli.config.schema import DataSection
from fvlm_cli.generate.answer import Answerer, Decoding

if TYPE_CHECKING:
    from transformers import ProcessorMixin


def answerer(model: Any, processor: ProcessorMixin, decoding: Decoding, resize: int | None) -> Answerer:
    """Return what puts questions to a model.

    Args:
        model: in inference mode.
        processor: its processor.
        decoding: how answers are chosen.
        resize: the longer side of images is brought down to this many pixels; None: the processor alone sizes them.
    """
    from fvlm_cli.training.collate import build_answerer

    return build_answerer(DataSection(train="-", resize=resize), model, processor, decoding)
