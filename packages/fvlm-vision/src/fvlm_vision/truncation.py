"""What happens to samples that are longer than `max_seq_length`: their trailing text is cut, never a medium."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from fvlm_core.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

Overflow = Literal["truncate", "skip", "error"]
OVERFLOWS: tuple[Overflow, ...] = ("truncate", "skip", "error")


def kept_length(
    length: int, media: torch.Tensor, trained: torch.Tensor, limit: int | None, overflow: Overflow
) -> int | None:
    """Return how many leading tokens of a sample are kept, or None when it is left out.

    Args:
        length: the sample's tokens, padding not counted.
        media: shape (tokens,), bool: which tokens stand for media.
        trained: shape (tokens,), bool: which tokens are learned.
        limit: the most tokens a sample may have; None for no limit.
        overflow: what happens beyond it.

    Raises:
        DataError: the sample is over the limit and `overflow` is "error".
    """
    if limit is None or length <= limit:
        return length
    positions = media[:length].nonzero()
    media_end = int(positions[-1]) + 1 if len(positions) else 0
    if overflow == "error":
        where = f", {media_end} of them up to the end of its last image" if media_end else ""
        raise DataError(
            f"a sample has {length} tokens{where}, over max_seq_length={limit}; raise max_seq_length, shrink its "
            "images "
            "with resize or max_pixels, or pass overflow='truncate' or 'skip'."
        )
    # Cutting before the last image's end would leave pixels without places; cutting all that is learned, nothing to do.
    if overflow == "skip" or media_end > limit or not bool(trained[:limit].any()):
        return None
    return limit


def cut_rows(
    batch: dict[str, torch.Tensor],
    lengths: list[int],
    fill: Mapping[str, int],
    per_token: Collection[str],
    multiple: int,
) -> None:
    """Cut each row of a right-padded batch to its length, in place, and drop the columns that only padding is left in.

    Args:
        batch: tensors; those named in `per_token` have the shape (batch, tokens, …).
        lengths: how many leading tokens each row keeps.
        fill: what stands where tokens were cut, for each tensor that tells.
        per_token: the names of the tensors whose second dimension is tokens.
        multiple: the number of columns stays a multiple of this.
    """
    kept = torch.arange(batch["input_ids"].shape[1]) < torch.tensor(lengths)[:, None]
    columns = -(-max(lengths) // multiple) * multiple
    for name in per_token:
        tensor = batch[name].masked_fill(~kept, fill[name]) if name in fill else batch[name]
        batch[name] = tensor[:, :columns]
