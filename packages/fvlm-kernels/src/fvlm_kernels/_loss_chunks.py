"""The chunks of :mod:`.linear_cross_entropy`: its reference, its launcher, and the operator.

The numerics, and why there are chunks at all, stand there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ._launch import cdiv
from ._library import register
from ._losses import launch_rows, losses_ref, scored, stats_ref

CHUNK_BYTES = 2**28
"""How large the buffer of logits may become; larger where W is trained, see :func:`chunk_rows`."""

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""A row's loss, whether its label was the most likely, and its entropy; the last two empty where not asked for."""


def chunk_rows(m: int, v: int, k: int, itemsize: int, trained: bool) -> int:
    """Return how many rows of logits are made at once.

    As many as fit ``CHUNK_BYTES``, in equal chunks of whole tiles. With a trained weight up to k rows, whose logits
    take as much memory as the weight itself: every chunk reads and writes the weight's gradient once.
    """
    most = max(1, CHUNK_BYTES // (v * itemsize), k if trained else 1)
    tile = 128 if most >= 128 else 1
    most = most // tile * tile
    return cdiv(cdiv(max(m, 1), cdiv(max(m, 1), most)), tile) * tile


def _chunk_ref(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    ignore_index: int,
    softcap: float | None,
    stats: bool,
) -> Rows:
    z = scored(torch.nn.functional.linear(hidden, weight, bias), 1.0, softcap)
    losses = losses_ref(z, labels, ignore_index)
    return losses, *(stats_ref(z, labels, ignore_index) if stats else (losses.new_empty(0), losses.new_empty(0)))


def rows_ref(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    ignore_index: int,
    softcap: float | None,
    stats: bool,
) -> Rows:
    """The rows' losses in plain PyTorch; float64 stays float64.

    Where there are several chunks, backward makes the logits of each again.
    """
    settings = ignore_index, softcap, stats
    (m, k), v = hidden.shape, weight.shape[0]
    step = chunk_rows(m, v, k, max(4, hidden.itemsize), trained=False)
    if step >= m:
        return _chunk_ref(hidden, weight, bias, labels, *settings)
    again: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    pieces: list[Rows] = [
        checkpoint(_chunk_ref, h, weight, bias, y, *settings, **again)
        for h, y in zip(hidden.split(step), labels.split(step), strict=True)
    ]
    losses, correct, entropy = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return losses, correct, entropy


@lru_cache
def _adds_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether this PyTorch can add a product of ``dtype`` into an fp32 tensor (newer ones can, on a GPU)."""
    a, out = torch.zeros(16, 16, device=device, dtype=dtype), torch.zeros(16, 16, device=device)
    try:
        torch.addmm(out, a, a, out_dtype=torch.float32, out=out)
    except (RuntimeError, TypeError):
        return False
    return True


def _product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, first: bool) -> None:
    """Write ``a b`` to the fp32 tensor ``out``, or add it where this is not the first; no operand is cast on a GPU."""
    wide: dict[str, Any] = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    if wide and not a.is_cuda:  # for the interpreter: PyTorch's CPU products have no wider result
        a, b, wide = a.to(out.dtype), b.to(out.dtype), {}
    if first:
        torch.mm(a, b, out=out, **wide)
    elif not wide or _adds_in_fp32(a.device, a.dtype):
        torch.addmm(out, a, b, out=out, **wide)
    else:
        out += torch.mm(a, b, **wide)


def _rows(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    weights: torch.Tensor | None,
    ignore_index: int,
    softcap: float | None,
    need_dhidden: bool,
    need_dweight: bool,
    need_dbias: bool,
    stats: bool,
) -> tuple[torch.Tensor, ...]:
    losses, correct, entropy, dhidden, dweight, dbias = _outputs(
        hidden, weight, bias, labels, weights, ignore_index, softcap, need_dhidden, need_dweight, need_dbias, stats
    )
    (m, k), v = hidden.shape, weight.shape[0]
    if m == 0:
        return losses, correct, entropy, dhidden, dweight.zero_(), dbias.zero_()
    overwrite, labels = need_dhidden or need_dweight or need_dbias, labels.contiguous()
    step = chunk_rows(m, v, k, hidden.itemsize, need_dweight)
    buffer = hidden.new_empty((min(step, m), v))
    for start in range(0, m, step):
        part = slice(start, min(start + step, m))
        logits = buffer[: part.stop - start]
        if bias is None:
            torch.mm(hidden[part], weight.t(), out=logits)
        else:
            torch.addmm(bias, hidden[part], weight.t(), out=logits)
        launch_rows(
            logits,
            labels[part],
            losses[part],
            ignore_index,
            softcap=softcap,
            stats=(correct[part], entropy[part]) if stats else None,
            overwrite=overwrite,
            weights=None if weights is None else weights[part],
        )
        if need_dhidden:
            _product(dhidden[part], logits, weight, first=True)
        if need_dweight:
            _product(dweight, logits.t(), hidden[part], first=start == 0)
        if need_dbias:
            sums = logits.sum(0, dtype=torch.float32)
            dbias.copy_(sums) if start == 0 else dbias.add_(sums)
    return losses, correct, entropy, dhidden, dweight, dbias


def _outputs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    weights: torch.Tensor | None,
    ignore_index: int,
    softcap: float | None,
    need_dhidden: bool,
    need_dweight: bool,
    need_dbias: bool,
    stats: bool,
) -> tuple[torch.Tensor, ...]:
    """Allocate what the operator returns, all of it fp32; it serves as the fake, too."""
    m = hidden.shape[0]
    shapes = (
        (m,),
        *([(m,)] * 2 if stats else [(0,)] * 2),
        hidden.shape if need_dhidden else (0,),
        weight.shape if need_dweight else (0,),
        (weight.shape[0],) if need_dbias else (0,),
    )
    return tuple(hidden.new_empty(shape, dtype=torch.float32) for shape in shapes)


loss_of_rows: Callable[..., tuple[torch.Tensor, ...]] = register(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? weights, int ignore_index,"
    " float? softcap, bool need_dhidden, bool need_dweight, bool need_dbias, bool stats)"
    " -> (Tensor losses, Tensor correct, Tensor entropy, Tensor dhidden, Tensor dweight, Tensor dbias)",
    _rows,
    _outputs,
)
