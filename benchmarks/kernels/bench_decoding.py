"""Cases of ``decode_attention``: one token a sequence over a cache of which a part is filled."""

from __future__ import annotations

from functools import partial

import torch
from benchmarks.kernels.case import Case, Inputs, normal, size

from fvlm_kernels import decode_attention

HEADS = {  # of queries, of keys, their width
    "Qwen2-VL-2B text": (12, 2, 128),
    "Llama-3.2-11B-Vision text": (32, 8, 128),
    "Gemma 3 4B text": (8, 4, 256),
}
FILLED = {500: 1024, 7000: 8192}
"""Columns that are filled → the cache's capacity."""


def _make(device: torch.device, rows: int, heads: tuple[int, int, int], filled: int, capacity: int) -> Inputs:
    queries, keys, width = heads
    return {
        "q": normal(device, rows, queries, width),
        "keys": normal(device, rows, keys, capacity, width, seed=1),
        "values": normal(device, rows, keys, capacity, width, seed=2),
        "length": torch.tensor([filled], device=device),
        "visible": torch.ones(rows, capacity, dtype=torch.bool, device=device),
    }


def _stock(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, length: torch.Tensor, visible: torch.Tensor
) -> torch.Tensor:
    """What transformers runs over a static cache: heads repeated, a mask over all of it, SDPA."""
    groups = q.shape[1] // keys.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
    mask = visible & (torch.arange(keys.shape[2], device=q.device) < length)
    return torch.nn.functional.scaled_dot_product_attention(
        q.unsqueeze(2), k, v, attn_mask=mask[:, None, None]
    ).squeeze(2)


def attention_cases(tiny: bool) -> list[Case]:
    """Return the cases of ``decode_attention``: one row and eight, short and long."""
    cases = []
    for model, (queries, keys, width) in ({"tiny": (4, 2, 16)} if tiny else HEADS).items():
        for rows in (1, 8):
            for filled, capacity in ({20: 64} if tiny else FILLED).items():
                make = partial(_make, rows=rows, heads=(queries, keys, width), filled=filled, capacity=capacity)
                moved = 2 * size(rows, keys, filled, width) + 2 * size(rows, queries, width)
                shape = {"rows": rows, "heads": queries, "key_heads": keys, "width": width, "filled": filled}
                cases.append(
                    Case(
                        "decode_attention", f"{model}, {rows} rows, {filled} of {capacity}", make,
                        {"torch": _stock, "fvlm": decode_attention}, partial(decode_attention, impl="torch"),
                        forward_bytes=moved, shape=shape,
                    )
                )  # fmt: skip
    return cases
