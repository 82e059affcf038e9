"""A padded batch as one row: no padding, positions that start again with each sample, no loss across samples.

There is no attention mask in a packed batch. Transformers makes one from the positions, and only when it is given
neither a mask nor a cache: so the batch also says `use_cache=False`. The cumulative lengths of flash attention are left
out on purpose: a model hands its keyword arguments to its vision tower as well, where they would cut images where
samples end; every flash implementation derives them from the positions.

A model whose fused layers attend by segments (`fvlm_core.fused.segments`) is told under names of their own where
samples start, and needs no mask of tokens by tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fvlm_core.fused.segments import PACKED_LONGEST, PACKED_STARTS

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from fvlm_core.arch.packing import Packing

_LONGEST_MULTIPLE = 256  # of the number that all samples stay below: few numbers, so that recordings serve again


def with_segments(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a packed row with what a model needs that attends by segments.

    Args:
        row: from `packed`.

    Returns:
        The row, with `packed_starts` and `packed_longest`. In the place of its mask stands one of a single NaN, which
        keeps transformers from making one of the positions; those layers do not read it, and any other would spoil
        its result, instead of letting samples see each other without a word.
    """
    positions = row["position_ids"].flatten(0, -2)[0]  # of several axes the first one counts tokens
    starts = (positions == 0).nonzero()[:, 0]
    total = len(positions)
    starts = torch.cat([starts, starts.new_tensor([total])]).to(torch.int32)
    longest = -(-int(starts.diff().max()) // _LONGEST_MULTIPLE) * _LONGEST_MULTIPLE
    mask = torch.full((1, 1, 1, 1), torch.nan)
    return {**row, "attention_mask": mask, PACKED_STARTS: starts, PACKED_LONGEST: min(longest, total)}


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


def only_trailing_padding(batch: Mapping[str, Any]) -> bool:
    """Return whether a mask hides nothing from any token but what comes after it, which a causal model never sees.

    Without it attention needs no mask in memory, and nobody has to ask the device whether it masks anything.
    """
    mask = batch.get("attention_mask")
    return mask is not None and mask.dim() == 2 and bool((mask.diff(dim=1) <= 0).all())
