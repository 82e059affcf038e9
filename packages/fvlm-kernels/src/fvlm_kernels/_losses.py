"""What the cross entropies share: their maths, in PyTorch and inside a kernel, and the launch over rows.

A row of logits x over V columns, its label y, with scale s, cap c and z-loss weight ζ::

    z = c · tanh(s x / c)   (without a cap z = s x)          dz/dx = s · (1 − tanh²(s x / c))
    p = exp(z − lse),       lse = log Σ_j exp(z_j)
    loss = lse − z_y + ζ · lse²
    dloss/dz_j = p_j · (1 + 2 ζ lse) − [j = y]
    entropy = lse − Σ_j p_j z_j,      correct = [y is the first column with the largest z]

A row whose label is ``ignore_index`` is not read: its loss, entropy and gradient are zero. The z-loss is that of
Chowdhery et al., PaLM, 2022, section 5.

Numerics. Logits are read in their dtype, and everything is computed in fp32. Every lane keeps the running maximum and
sum of its own columns, at one exponential an element, and the lanes are put together once at the end of the row: as
many partial sums as lanes, in an order that depends on V alone. The largest z and the logarithm of the sum are kept
apart, since their sum would lose the digits of a row that is nearly certain; gradients are exp((z − max) − log sum).
"""

# mypy: allow-untyped-defs
# (for the kernels, whose arguments Triton types)

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch

from ._launch import cdiv, launch, next_power_of_two
from ._triton import tl, triton

Reduction = Literal["mean", "sum", "none"]
BLOCK_V = 4096
"""Columns that a program holds at once: 8 for each of its 512 threads, of which three programs fit a multiprocessor."""


class LossStats(NamedTuple):
    """What a pass over the logits says of a model beside its loss; detached.

    Sums over the scored rows where the loss is a scalar, in the labels' shape where it is not.

    Attributes:
        correct: 1 where the label is the most likely token (the first of equals), fp32.
        entropy: of the predicted distribution, in nats, fp32.
        items: how many rows were scored (int64), or which (bool).
    """

    correct: torch.Tensor
    entropy: torch.Tensor
    items: torch.Tensor


def scored(x: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    """Return z of the module's maths in plain PyTorch; float64 stays float64."""
    z = x.to(torch.promote_types(x.dtype, torch.float32))
    z = z if scale == 1.0 else z * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def losses_ref(z: torch.Tensor, labels: torch.Tensor, ignore_index: int, z_loss: float = 0.0) -> torch.Tensor:
    """Return the rows' losses in plain PyTorch: ``z`` is ``(M, V)``, ``labels`` and the result ``(M,)``."""
    losses = torch.nn.functional.cross_entropy(z, labels.long(), ignore_index=ignore_index, reduction="none")
    if z_loss == 0.0:
        return losses
    return losses + (z_loss * z.logsumexp(-1).square()).masked_fill(labels == ignore_index, 0.0)


def stats_ref(z: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows' ``(correct, entropy)`` in plain PyTorch."""
    ignored, logs = labels == ignore_index, z.detach().log_softmax(-1)
    entropy = -(logs.exp() * logs.clamp(min=torch.finfo(logs.dtype).min)).sum(
        -1
    )  # −∞ weighs nothing, and must not be NaN
    correct = (z.argmax(-1) == labels).to(entropy.dtype)
    return correct.masked_fill(ignored, 0.0), entropy.masked_fill(ignored, 0.0)


@triton.jit
def _tanh(u):
    # (1 − e)/(1 + e) loses digits where e is near 1; there a continued fraction is exact to fp32.
    a = tl.abs(u)
    e = tl.exp(-2.0 * a)
    far = (1.0 - e) / (1.0 + e)
    q = u * u
    near = a * (135135.0 + q * (17325.0 + q * (378.0 + q))) / (135135.0 + q * (62370.0 + q * (3150.0 + q * 28.0)))
    t = tl.where(a < 1.0, near, far)
    return tl.where(u < 0, -t, t)


@triton.jit
def _score(x, cap, SCALE: tl.constexpr, HAS_CAP: tl.constexpr):
    """Return ``(z, dz/dx)`` of the module's maths."""
    z = x
    slope = SCALE
    if SCALE != 1.0:
        z = x * SCALE
    if HAS_CAP:
        t = _tanh(z / cap)
        z = cap * t
        slope = SCALE * (1.0 - t) * (1.0 + t)
    return z, slope


@triton.jit
def _slope_of_loss(z, offs_v, label, peak, log_sum, z_loss):
    """Return dloss/dz at some columns of a row."""
    p = tl.exp((z - peak) - log_sum) * (1.0 + 2.0 * z_loss * (peak + log_sum))
    return tl.where(offs_v == label, p - 1.0, p)


@triton.jit
def _loss_rows_kernel(
    logits_ptr,
    labels_ptr,
    weight_ptr,
    loss_ptr,
    norms_ptr,
    correct_ptr,
    entropy_ptr,
    stride_logits,
    ignore_index,
    cap,
    z_loss,
    V: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    WEIGHTED: tl.constexpr,
    STATS: tl.constexpr,
    NORMS: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits
    offs = tl.arange(0, BLOCK_V)
    label = tl.load(labels_ptr + row).to(tl.int64)
    if label == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        if STATS:
            tl.store(correct_ptr + row, 0.0)
            tl.store(entropy_ptr + row, 0.0)
        if NORMS:
            tl.store(norms_ptr + row * 2, 0.0)
            tl.store(norms_ptr + row * 2 + 1, 0.0)
        if GRADIENT:
            for start in range(0, V, BLOCK_V):
                nothing = tl.zeros((BLOCK_V,), dtype=logits_ptr.dtype.element_ty)
                tl.store(row_ptr + start + offs, nothing, mask=start + offs < V)
        return
    valid = (label >= 0) & (label < V)
    own = tl.load(row_ptr + label, mask=valid, other=float("nan")).to(tl.float32)
    peaks = tl.full((BLOCK_V,), -3.4e38, dtype=tl.float32)  # finite, for its difference to −∞ is −∞ and not NaN
    sums = tl.zeros((BLOCK_V,), dtype=tl.float32)
    if STATS:
        inner = tl.zeros((BLOCK_V,), dtype=tl.float32)  # Σ exp(z − peak) · (z − peak)
        best = tl.zeros((BLOCK_V,), dtype=tl.int32)
    for start in range(0, V, BLOCK_V):
        offs_v = start + offs
        mask = offs_v < V
        x = tl.load(row_ptr + offs_v, mask=mask, other=0.0).to(tl.float32)
        z, _ = _score(x, cap, SCALE, HAS_CAP)
        z = tl.where(mask, z, float("-inf"))
        d = z - peaks
        e = tl.exp(-tl.abs(d))
        larger = d > 0
        if STATS:
            inner = tl.where(larger, (inner - sums * d) * e, inner + tl.where(e > 0, e * d, 0.0))
            best = tl.where(larger, offs_v, best)
        sums = tl.where(larger, sums * e + 1.0, sums + e)
        peaks = tl.where(larger, z, peaks)
    peak = tl.max(peaks, axis=0)
    share = tl.exp(peaks - peak)
    total = tl.sum(sums * share, axis=0)
    log_sum = tl.log(total)
    own_z, _ = _score(own, cap, SCALE, HAS_CAP)
    lse = peak + log_sum
    tl.store(loss_ptr + row, log_sum - (own_z - peak) + z_loss * lse * lse)
    if STATS:
        first = tl.min(tl.where(peaks == peak, best, V), axis=0)
        tl.store(correct_ptr + row, tl.where(first == label, 1.0, 0.0))
        weighted = tl.sum(share * (inner + sums * (peaks - peak)), axis=0)
        tl.store(entropy_ptr + row, log_sum - weighted / total)
    if NORMS:
        tl.store(norms_ptr + row * 2, peak)
        tl.store(norms_ptr + row * 2 + 1, log_sum)
    if GRADIENT:
        weight = tl.where(valid, 1.0, float("nan"))
        if WEIGHTED:
            weight *= tl.load(weight_ptr + row)
        for back in range(0, V, BLOCK_V):  # from the end: what was read last is still in the L2 cache
            offs_v = (V - 1) // BLOCK_V * BLOCK_V - back + offs
            mask = offs_v < V
            x = tl.load(row_ptr + offs_v, mask=mask, other=0.0)
            z, slope = _score(x.to(tl.float32), cap, SCALE, HAS_CAP)
            dx = _slope_of_loss(z, offs_v, label, peak, log_sum, z_loss) * slope * weight
            tl.store(row_ptr + offs_v, dx.to(x.dtype), mask=mask)


@triton.jit
def _loss_bwd_kernel(
    dloss_ptr,
    logits_ptr,
    labels_ptr,
    norms_ptr,
    dlogits_ptr,
    stride_dloss,
    stride_logits,
    ignore_index,
    cap,
    z_loss,
    V: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    blocks: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    row = (tl.program_id(0) // blocks).to(tl.int64)
    offs_v = (tl.program_id(0) % blocks) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = offs_v < V
    label = tl.load(labels_ptr + row).to(tl.int64)
    kept = label != ignore_index
    read = offs_v < tl.where(kept, V, 0)  # not "mask & kept": the interpreter of Triton 3.9 cannot widen a scalar bool
    x = tl.load(logits_ptr + row * stride_logits + offs_v, mask=read, other=0.0)
    z, slope = _score(x.to(tl.float32), cap, SCALE, HAS_CAP)
    peak = tl.load(norms_ptr + row * 2)
    log_sum = tl.load(norms_ptr + row * 2 + 1)
    weight = tl.load(dloss_ptr + row * stride_dloss)
    weight = tl.where((label >= 0) & (label < V), weight, float("nan"))
    dx = _slope_of_loss(z, offs_v, label, peak, log_sum, z_loss) * slope * weight
    dx = tl.where(kept, dx, 0.0)
    tl.store(dlogits_ptr + row * V + offs_v, dx.to(x.dtype), mask=mask)


def _shape(v: int) -> tuple[int, int]:
    """Return ``(BLOCK_V, num_warps)``: a lane never holds a column twice, so that a row may be overwritten in place."""
    block = min(BLOCK_V, max(next_power_of_two(v), 128))
    return block, max(4, block // 256)


def launch_rows(
    logits: torch.Tensor,
    labels: torch.Tensor,
    losses: torch.Tensor,
    ignore_index: int,
    scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    *,
    norms: torch.Tensor | None = None,
    stats: tuple[torch.Tensor, torch.Tensor] | None = None,
    overwrite: bool = False,
    weights: torch.Tensor | None = None,
) -> None:
    """Score rows of logits with the kernel.

    Args:
        logits: ``(M, V)``, stride 1 along V.
        labels: ``(M,)``, contiguous.
        losses: ``(M,)`` fp32, written.
        ignore_index, scale, softcap, z_loss: as in the module's maths.
        norms: ``(M, 2)`` fp32 for the largest z and the logarithm of the sum, written.
        stats: ``(correct, entropy)``, each ``(M,)`` fp32, written.
        overwrite: whether the logits are overwritten by their gradient.
        weights: ``(M,)`` fp32, by which the gradients of the rows are multiplied.
    """
    (m, v), (block, num_warps) = logits.shape, _shape(logits.shape[1])
    launch(
        _loss_rows_kernel,
        (m,),
        logits,
        labels,
        weights,
        losses,
        norms,
        *(stats or (None, None)),
        logits.stride(0),
        ignore_index,
        1.0 if softcap is None else softcap,
        z_loss,
        V=v,
        SCALE=scale,
        HAS_CAP=softcap is not None,
        WEIGHTED=weights is not None,
        STATS=stats is not None,
        NORMS=norms is not None,
        GRADIENT=overwrite,
        BLOCK_V=block,
        num_warps=num_warps,
    )


def launch_gradient(
    dlosses: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    norms: torch.Tensor,
    dlogits: torch.Tensor,
    ignore_index: int,
    scale: float,
    softcap: float | None,
    z_loss: float,
) -> None:
    """Write the gradient of rows of logits to the contiguous ``dlogits``, from the ``norms`` of :func:`launch_rows`."""
    (m, v), (block, num_warps) = logits.shape, _shape(logits.shape[1])
    launch(
        _loss_bwd_kernel,
        (m * cdiv(v, block),),
        dlosses,
        logits,
        labels,
        norms,
        dlogits,
        dlosses.stride(0),
        logits.stride(0),
        ignore_index,
        1.0 if softcap is None else softcap,
        z_loss,
        V=v,
        SCALE=scale,
        HAS_CAP=softcap is not None,
        BLOCK_V=block,
        num_warps=num_warps,
    )


def mean_of(total: torch.Tensor, kept: torch.Tensor, num_items: float | torch.Tensor | None) -> torch.Tensor:
    """Divide a sum of losses by ``num_items`` or, without it, by how many are kept (NaN where none is)."""
    if num_items is not None:
        return (total / num_items).to(total.dtype)
    count = kept.sum()
    # Divided by 0 the zero gradients would become NaN, where torch.nn.functional.cross_entropy gives zeros.
    return torch.where(count > 0, total / count.clamp(min=1), math.nan)
