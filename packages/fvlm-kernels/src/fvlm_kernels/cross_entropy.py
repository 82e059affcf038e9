"""Cross entropy over a large vocabulary, with scale, softcap and z-loss; backward recomputes from the logits.

Maths, gradients and numerics: see :mod:`._losses`, whose kernels this op launches. One program takes a whole row, so
that the logits are read once in forward and once in backward, in their own dtype; what is saved beside them is two fp32
numbers a row. ``torch.nn.functional.cross_entropy`` on logits in 16 bit rounds its result to 16 bit, and
``ForCausalLMLoss`` of transformers first makes an fp32 copy of them; here the loss is fp32 without the copy. The
gradient is rounded once, to the dtype of the logits. Gemma 2 and 3 round scaled and capped logits to their dtype one
after another; here they stay in fp32. Two runs give the same bits.

Where the logits come from a head's matrix product, :mod:`.linear_cross_entropy` never makes them.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ._launch import Impl, rows_of, use_triton
from ._library import first_derivative_only, register
from ._loss_checks import check_labels, check_options, check_scored
from ._losses import (
    Reduction,
    launch_gradient,
    launch_rows,
    losses_ref,
    mean_of,
    scored,
)


def _ref(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int, scale: float, softcap: float | None, z_loss: float
) -> torch.Tensor:
    """Return the rows' losses in plain PyTorch; float64 stays float64."""
    return losses_ref(scored(logits, scale, softcap), labels, ignore_index, z_loss)


def _fwd(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int, scale: float, softcap: float | None, z_loss: float
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = rows_of(logits)
    losses = logits.new_empty(rows.shape[0], dtype=torch.float32)
    norms = logits.new_empty((rows.shape[0], 2), dtype=torch.float32)
    launch_rows(rows, labels.contiguous(), losses, ignore_index, scale, softcap, z_loss, norms=norms)
    return losses, norms


def _bwd(
    dlosses: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    norms: torch.Tensor,
    ignore_index: int,
    scale: float,
    softcap: float | None,
    z_loss: float,
) -> torch.Tensor:
    rows, dlogits = rows_of(logits), logits.new_empty(logits.shape)
    launch_gradient(dlosses, rows, labels.contiguous(), norms, dlogits, ignore_index, scale, softcap, z_loss)
    return dlogits


_fwd_op = register(
    "cross_entropy_fwd(Tensor logits, Tensor labels, int ignore_index, float scale, float? softcap, float z_loss)"
    " -> (Tensor losses, Tensor norms)",
    _fwd,
    lambda logits, labels, ignore_index, scale, softcap, z_loss: (
        logits.new_empty(logits.shape[0], dtype=torch.float32),
        logits.new_empty((logits.shape[0], 2), dtype=torch.float32),
    ),
)
_bwd_op = register(
    "cross_entropy_bwd(Tensor dlosses, Tensor logits, Tensor labels, Tensor norms, int ignore_index, float scale,"
    " float? softcap, float z_loss) -> Tensor",
    _bwd,
    lambda dlosses, logits, labels, norms, ignore_index, scale, softcap, z_loss: logits.new_empty(logits.shape),
)


class _CrossEntropy(torch.autograd.Function):
    """The rows' losses, saving the logits as they are and two numbers a row."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        ignore_index: int,
        scale: float,
        softcap: float | None,
        z_loss: float,
    ) -> torch.Tensor:
        losses, norms = _fwd_op(logits, labels, ignore_index, scale, softcap, z_loss)
        ctx.save_for_backward(logits, labels, norms)
        ctx.settings = ignore_index, scale, softcap, z_loss
        kept: torch.Tensor = losses
        return kept

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dlosses: torch.Tensor) -> Any:
        return _bwd_op(dlosses, *ctx.saved_tensors, *ctx.settings), None, None, None, None, None


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    num_items: float | torch.Tensor | None = None,
    impl: Impl | None = None,
) -> torch.Tensor:
    """Return the cross entropy of logits and labels; see :mod:`._losses` for the maths.

    The labels are those of the logits' own positions. For next-token prediction shift the labels, which are small, and
    not the logits, which would be copied: ``torch.nn.functional.pad(labels[:, 1:], (0, 1), value=ignore_index)``.

    Args:
        logits: ``(..., V)``, floating; any strides.
        labels: ``(...)``, int64 or int32, in [0, V) or ``ignore_index``.
        ignore_index: the label of rows that are not scored.
        scale: multiplies the logits.
        softcap: c of c · tanh(z / c), applied after the scale; ``None`` for no cap.
        z_loss: weight ζ of lse², which keeps the logits from drifting.
        reduction: ``"mean"`` over the scored rows (NaN where there is none), ``"sum"``, or ``"none"``.
        num_items: divides the mean in place of the number of scored rows, such as the count over all micro-batches of
            a step: a number, or a 0-d tensor, which is not brought to the host.
        impl: ``"triton"``, ``"torch"``, or ``None`` for Triton on a GPU and PyTorch elsewhere.

    Returns:
        a scalar, or with ``"none"`` a tensor of the labels' shape, zero where ignored. float64 for logits in float64,
        else fp32.

    Raises:
        ValueError: shapes, devices or options do not fit; labels on the CPU are out of range. Out of range on a GPU,
            a label makes its loss and its row's gradient NaN.
        TypeError: a dtype does not fit.

    Example:
        >>> targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        >>> loss = cross_entropy(model(input_ids).logits, targets, num_items=num_items_in_batch)
    """
    check_scored("cross_entropy", logits=logits)
    check_labels("cross_entropy", labels, logits.shape[:-1], logits.shape[-1], ignore_index, logits.device)
    check_options("cross_entropy", reduction, num_items, softcap, logits.device)
    if not (z_loss >= 0 and math.isfinite(z_loss)):
        raise ValueError(f"cross_entropy: z_loss is {z_loss}; it must be a number from 0 on")
    if not math.isfinite(scale):
        raise ValueError(f"cross_entropy: scale is {scale}; it must be a finite number")
    rows, targets = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1).to(logits.device, non_blocking=True)
    run = _CrossEntropy.apply if use_triton(impl, logits) else _ref
    losses: torch.Tensor = run(rows, targets, ignore_index, scale, softcap, z_loss)
    if reduction == "none":
        return losses.view(labels.shape)
    total = losses.sum()
    return total if reduction == "sum" else mean_of(total, targets != ignore_index, num_items)
