"""The loss on evaluation rows, per token that training would learn."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fvlm_cli.data.row import Row
from fvlm_core.errors import DataError

if TYPE_CHECKING:
    from fvlm_vision import FastVisionDataCollator


def mean_loss(model: Any, collator: FastVisionDataCollator, rows: Iterable[Row]) -> float | None:
    """Return the mean negative log-likelihood of the learned tokens of all rows, in nats; None where there are none.

    Rows are taken one by one, as the collator gives them, cut and left out as in training.

    Raises:
        DataError: a row cannot be used; it names the place.
    """
    import torch

    collator = collator.keeping_empty_batches()
    total, count = 0.0, 0
    for row in rows:
        try:
            batch = collator([row.sample])
        except DataError as error:
            raise row.refuse(error.reason.removeprefix("sample 0 of the batch: ")) from None
        learned = int((batch["labels"][:, 1:] != collator.ignore_index).sum())
        if not learned:
            continue
        moved = {name: _moved(value, model) for name, value in batch.items()}
        with torch.inference_mode():
            total += float(model(**moved, use_cache=False).loss) * learned
        count += learned
    return total / count if count else None


def _moved(value: Any, model: Any) -> Any:
    import torch

    if not isinstance(value, torch.Tensor):
        return value
    value = value.to(model.device)
    return value.to(model.dtype) if value.is_floating_point() else value
