"""A padded batch as one row: no padding, positions that start again with each sample, no loss across samples.

There is no attention mask in a packed batch. Transformers makes one from the positions, and only when it is given
neither a mask nor a cache: so the batch also says `use_cache=False`. The cumulative lengths of flash attention are left
out on purpose: a model hands its keyword arguments to its vision tower as well, where they would cut images where
samples end; every flash implementation derives them from the positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from fvlm_core.arch.packing import Packing


def packed(
    batch: Mapping[str, Any],
    packing: Packing,
    per_token: Collection[str],
    fill: Mapping[str, int],
    ignore_index: int,
    multiple: int,
) -> dict[str, Any]:
    """Return the batch as one row.

    Args:
        batch: CPU tensors, right-padded, with `attention_mask` and `labels`; `position_ids` (axes, batch, tokens)
            where the family has more than one axis and the batch has media.
        packing: how the family is packed.
        per_token: the names of the tensors of shape (batch, tokens).
        fill: what those that tell have at padding; 0 for others.
        ignore_index: the label of what is not learned.
        multiple: the row is padded to a multiple of this, as if by one more sample that learns nothing.

    Returns:
        The tensors of `per_token` with shape (1, tokens), `position_ids` int64 of shape (1, tokens) or
        (1 + axes, 1, tokens), `use_cache`, and the rest as it was; no `attention_mask`.
    """
    kept = batch["attention_mask"].bool()
    rows, columns = kept.shape
    within = torch.arange(columns).expand(rows, -1)
    labels = batch["labels"].clone()
    labels[:, 0] = ignore_index  # else the last token of the sample before it would learn it
    result = dict(batch) | {"labels": labels}
    extra = -int(kept.sum()) % multiple
    for name in (*per_token, "labels"):
        tail = result[name].new_full((extra,), fill.get(name, 0))
        result[name] = torch.cat([result[name][kept], tail])[None]
    filler = torch.arange(extra)
    positions = torch.cat([within[kept], filler])[None]
    if packing.axes > 1:
        axes = batch.get("position_ids", within.expand(packing.axes, -1, -1))
        axes = torch.cat([axes[:, kept], filler.expand(packing.axes, -1)], dim=1)
        positions = torch.cat([positions, axes])[:, None]
    for name in packing.images_by_row:
        if name in result:
            result[name] = result[name].flatten(0, 1)[None]
    del result["attention_mask"]
    return result | {"position_ids": positions, "use_cache": False}
