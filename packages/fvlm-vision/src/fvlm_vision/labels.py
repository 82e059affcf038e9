"""Which tokens are learned: the labels of a batch, and training on responses only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch

from fvlm_core.errors import ConfigError, DataError
from fvlm_vision.render import ResponseMarks

if TYPE_CHECKING:
    from collections.abc import Collection

    from transformers import Trainer

    TrainerT = TypeVar("TrainerT", bound=Trainer)

_PROBED_ROWS = 8


def make_labels(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    media_ids: Collection[int],
    trained: torch.Tensor | None,
    ignore_index: int,
) -> torch.Tensor:
    """Return the labels of a batch.

    Args:
        input_ids: shape (batch, tokens), int64.
        attention_mask: the same shape, 0 at padding. Padding is told by it and not by its id, which may also end a
            turn.
        media_ids: ids that stand for media; never learned.
        trained: the same shape, bool; None for every token.
        ignore_index: what stands where nothing is learned.

    Returns:
        The same shape, int64, not shifted: position `t` holds the token at `t`, which the model learns to say at `t -
        1`.
    """
    learned = attention_mask.bool()
    if media_ids:
        learned &= ~torch.isin(input_ids, torch.tensor(sorted(media_ids), dtype=input_ids.dtype))
    if trained is not None:
        learned &= trained
    return torch.where(learned, input_ids, ignore_index)


def label_rows(labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """Return which hidden states a loss needs: those whose next token is learned.

    A loss over these rows alone makes no logits for the rest (prompts, media, padding). Finding them on the device
    would hold the host up, since their number is the size of what comes after; here they are found before the batch
    goes there.

    Args:
        labels: shape (batch, tokens), int64, not shifted, as `make_labels` returns them.
        ignore_index: what stands where nothing is learned.

    Returns:
        Shape (kept,), int64, ascending: indices into the batch × tokens rows of the flattened hidden states. Row `i`
        predicts `labels.flatten()[i + 1]`.
    """
    learned = torch.zeros_like(labels, dtype=torch.bool)
    learned[:, :-1] = labels[:, 1:] != ignore_index
    return learned.flatten().nonzero()[:, 0]


def response_marks(instruction_part: str | None, response_part: str | None) -> ResponseMarks | None:
    """Return the marks that the two arguments name, or None when neither is given.

    Raises:
        ConfigError: only one is given, or one is empty or no string.
    """
    if instruction_part is None and response_part is None:
        return None
    for name, part in (("instruction_part", instruction_part), ("response_part", response_part)):
        if not isinstance(part, str) or not part:
            raise ConfigError(
                f"{name}={part!r} does not mark anything; give both instruction_part and response_part, the text "
                "that opens "
                "a user and an assistant turn."
            )
    return ResponseMarks(str(instruction_part), str(response_part))


def train_on_responses_only(
    trainer: TrainerT, instruction_part: str | None = None, response_part: str | None = None
) -> TrainerT:
    """Make a trainer learn only what the assistant says.

    Args:
        trainer: a trainer whose collator is a `FastVisionDataCollator`.
        instruction_part: the text that opens a user turn, e.g. ``"<|im_start|>user\\n"``. With neither part given,
            the chat template's ``{% generation %}`` marks are used, or those that are usual in the model's family.
        response_part: the text that opens an assistant turn, e.g. ``"<|im_start|>assistant\\n"``.

    Returns:
        The same trainer; its collator is replaced, and the one that was passed to it is left as it was.

    Raises:
        ConfigError: it is no trainer, its collator is another, the parts are incomplete, or neither parts nor template
            marks exist.
        DataError: nothing would be trained in the first rows of the training data.
    """
    from transformers import Trainer

    from fvlm_vision.collator import FastVisionDataCollator

    if not isinstance(trainer, Trainer):
        raise ConfigError(f"trainer is a {type(trainer).__name__}: pass a FastVisionTrainer, or another Trainer.")
    collator = trainer.data_collator
    if not isinstance(collator, FastVisionDataCollator):
        raise ConfigError(
            f"train_on_responses_only needs a trainer with a FastVisionDataCollator, and this one has "
            f"{type(collator).__name__}; pass data_collator=FastVisionDataCollator(model, processor)."
        )
    replaced = collator.on_responses_only(response_marks(instruction_part, response_part))
    _probe(replaced, trainer.train_dataset)
    trainer.data_collator = replaced
    return trainer


def _probe(collator: Any, dataset: Any) -> None:
    """Raise when none of the first rows has anything to train, without opening an image."""
    if dataset is None or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        return  # a stream is read once: what is wrong in it is told when the row comes
    refused: DataError | None = None
    for number in range(min(_PROBED_ROWS, len(dataset))):
        try:
            collator.render(dataset[number])
        except DataError as error:
            refused = refused or error
        else:
            return
    if refused is not None:
        raise refused
