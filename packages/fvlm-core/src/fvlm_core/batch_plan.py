"""What a model would otherwise compute from a batch on the device, sample by sample, computed once on the CPU.

The Qwen-VL models derive rotary positions, segment boundaries and window orders from the image grids inside `forward`,
with a Python loop over the samples and a host synchronization in each turn (about 100 ms for a batch of 128 small
images, against 15 ms for the rest of the forward pass: docs/performance.md). Transformers 5 takes all of them
precomputed, as keyword arguments. A planner is a small picklable object that the collator holds; it adds those keyword
arguments to a batch, with exactly the values that the model would have computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fvlm_core.versions import counts_parts_of_seconds

TEXT, IMAGE, VIDEO = 0, 1, 2  # the values of a processor's mm_token_type_ids

Piece = tuple[int, int, int, float]
"""A medium, or a video's frame that stands alone: frames, height and width in patches, temporal positions a frame."""


@dataclass(frozen=True)
class QwenPlanner:
    """Precomputes positions and vision boundaries for `qwen2_vl`, `qwen2_5_vl` and `qwen3_vl`.

    Args:
        merge_size: patches a side that become one token.
        patch_size: side of a patch in pixels.
        tokens_per_second: temporal positions a second of video takes (Qwen2.5-VL), else `None`: one a frame.
        frames_apart: whether a video's frames stand apart in the text, each behind its time (Qwen3-VL).
        window_size: side of an attention window in pixels (Qwen2.5-VL), else `None`.
        grid_per_side: side of the learned position table (Qwen3-VL), else `None`.
        interpolation: how that table is resampled (`mode`, `align_corners`), else `None`.
    """

    merge_size: int
    patch_size: int
    tokens_per_second: int | None = None
    frames_apart: bool = False
    window_size: int | None = None
    grid_per_side: int | None = None
    interpolation: tuple[str, bool] | None = None

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments to add to `batch`.

        Args:
            batch: CPU tensors of a processor: `input_ids` and `mm_token_type_ids` `(rows, tokens)`, optionally
                `attention_mask` of the same shape, `image_grid_thw` and `video_grid_thw` `(count, 3)`, and
                `second_per_grid_ts` `(videos,)`.

        Returns:
            `position_ids` `(3, rows, tokens)` int64, and for each medium present
            `{image,video}_cu_seqlens`, `_max_seqlen`, `_position_ids` and the family's own.
        """
        extra: dict[str, Any] = {}
        for medium in ("image", "video"):
            grid = batch.get(f"{medium}_grid_thw")
            if grid is not None:
                extra |= {f"{medium}_{name}": value for name, value in self._vision(grid).items()}
        if not extra:
            return {}
        extra["position_ids"] = multimodal_positions(
            batch["mm_token_type_ids"],
            batch.get("attention_mask"),
            {IMAGE: _pieces(batch.get("image_grid_thw")), VIDEO: self._video_pieces(batch)},
            self.merge_size,
        )
        return extra

    def _video_pieces(self, batch: Mapping[str, Any]) -> list[Piece]:
        """Return what each run of video tokens stands for."""
        grid = batch.get("video_grid_thw")
        if grid is None:
            return []
        if self.frames_apart:
            return [(1, *sides, 1) for frames, *sides in grid.tolist() for _ in range(frames)]
        seconds = batch.get("second_per_grid_ts")
        if self.tokens_per_second is None or seconds is None:
            return _pieces(grid)
        counted = float if counts_parts_of_seconds() else int
        steps = [self.tokens_per_second * counted(value) for value in seconds]
        return [(*sizes, step) for sizes, step in zip(grid.tolist(), steps, strict=True)]

    def _vision(self, grid: Tensor) -> dict[str, Any]:
        """Return the vision tower's own arguments for `grid` `(count, 3)`, by transformers' own functions."""
        from transformers import vision_utils

        boundaries = vision_utils.get_vision_cu_seqlens(grid)
        found: dict[str, Any] = {
            "position_ids": vision_utils.get_vision_position_ids(grid, self.merge_size),
            "cu_seqlens": boundaries,
            "max_seqlen": int(boundaries.diff().max()),
        }
        if self.window_size is not None:
            order, windows = vision_utils.get_vision_window_index(
                grid, spatial_merge_size=self.merge_size, window_size=self.window_size, patch_size=self.patch_size
            )
            found |= {
                "window_index": order,
                "cu_window_seqlens": windows,
                "max_window_seqlen": int(windows.diff().max()),
            }
        if self.grid_per_side is not None and self.interpolation is not None:
            mode, align_corners = self.interpolation
            indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
                grid,
                num_grid_per_side=self.grid_per_side,
                mode=mode,
                align_corners=align_corners,
                spatial_merge_size=self.merge_size,
            )
            found |= {"interp_indices": indices, "interp_weights": weights}
        return found


def multimodal_positions(
    token_types: Tensor, attention_mask: Tensor | None, pieces: Mapping[int, Sequence[Piece]], merge_size: int
) -> Tensor:
    """Return the three-axis rotary positions of text mixed with media.

    Text advances all three axes together; a medium of `t × h × w` merged tokens holds the temporal axis at its frame
    and spreads the other two over its rows and columns, and the text after it goes on at the largest position + 1.
    Matches `Qwen2VLModel.get_rope_index`; padding gets position 0.

    Args:
        token_types: `(rows, tokens)`: 0 text, 1 image placeholder, 2 video placeholder.
        attention_mask: `(rows, tokens)`, 0 where padded, or `None`.
        pieces: for image (1) and video (2), what each medium is, in order of appearance.
        merge_size: patches a side that become one token.

    Returns:
        `(3, rows, tokens)` int64.
    """
    rows, tokens = token_types.shape
    positions = torch.zeros(3, rows, tokens, dtype=torch.int64)
    pending = {kind: iter(of_kind) for kind, of_kind in pieces.items()}
    for row in range(rows):
        keep = slice(None) if attention_mask is None else attention_mask[row].bool()
        runs = list(_row_positions(token_types[row][keep], pending, merge_size))
        if runs:
            positions[:, row, keep] = torch.cat(runs, dim=1)
    return positions


def _pieces(grid: Tensor | None) -> list[Piece]:
    """Return the media of `(count, 3)` patch grids, a temporal position a frame."""
    return [] if grid is None else [(frames, height, width, 1) for frames, height, width in grid.tolist()]


@lru_cache(maxsize=1024)  # images of a data set come in few sizes
def _medium_positions(frames: int, height: int, width: int, step: float) -> Tensor:
    """Return the `(3, frames * height * width)` positions of a medium that starts at 0; not to be changed."""
    times = (torch.arange(frames) * step).long()
    return torch.cartesian_prod(times, torch.arange(height), torch.arange(width)).T


def _row_positions(types: Tensor, pending: Mapping[int, Iterator[Piece]], merge_size: int) -> Iterator[Tensor]:
    """Yield the `(3, length)` positions of each run of text and each medium of one unpadded row."""
    kinds, counts = torch.unique_consecutive(types, return_counts=True)
    start = 0
    for kind, count in zip(kinds.tolist(), counts.tolist(), strict=True):
        if kind == TEXT:
            yield torch.arange(start, start + count).expand(3, -1)
            start += count
            continue
        left = count
        while left > 0:  # media with no text between them form one run
            frames, height, width, step = next(pending[kind])
            height, width = height // merge_size, width // merge_size
            yield _medium_positions(frames, height, width, step) + start
            start += max(height, width)
            left -= frames * height * width
