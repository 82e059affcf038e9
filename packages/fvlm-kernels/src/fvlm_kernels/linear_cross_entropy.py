"""The output head and its cross entropy in one op, which never holds the logits of more than a few rows.

Maths, with rows h of hidden, weight W, and the loss of a row of logits and its gradient g = dloss/dx of
:mod:`._losses`::

    x = h Wᵀ + bias        dh = g W        dW = gᵀ h        dbias = Σ_rows g

Rows that are not scored are left out before any product. The others go through in chunks: one product for the logits
of a chunk, into a buffer that all chunks share; one kernel that reads them, writes each row's loss and overwrites the
row by its gradient; one product for dh, and one for dW where W is trained. Nothing of size rows × V is allocated. The
gradient is made in the forward pass, while the logits are there, and only for what asks for one; backward multiplies
it by the incoming scalar. With ``reduction="none"`` that factor is a row's own and not yet known: then forward makes
no gradient, and backward goes through the chunks again.

Numerics. The logits are rounded to the dtype of hidden, as a linear layer rounds them, and so is g, whose elements lie
between −1 and 1 whatever the number of rows: it is not divided by that number before it is rounded, since elements
would fall below fp16's range. dh, dW and dbias are products accumulated in fp32 and kept in fp32, over all chunks,
until they have been multiplied in backward; they are rounded once. A sum of dW in 16 bit would round once a chunk and,
in fp16, overflow. fp32 inputs are multiplied as ``torch.backends.cuda.matmul`` says. Two runs on one device give the
same bits where its matrix products do (cuBLAS does, on one stream).

The idea of filtering and of making the gradient with the loss is common to Apple's cut cross entropy (Wijmans et al.,
2024) and Liger Kernel (Hsu et al., 2024).
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch

from ._launch import Impl, check_same_dtype, check_shape, use_triton
from ._library import first_derivative_only
from ._loss_checks import check_labels, check_options, check_scored
from ._loss_chunks import Rows, loss_of_rows, rows_ref
from ._losses import LossStats, Reduction, mean_of


def _scaled(gradient: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return an fp32 gradient times a scalar in ``dtype``, rounded once: of a head's it is the largest tensor there is.

    One pass, where a product and a cast would be two and hold another fp32 gradient between them.
    """
    if torch.compiler.is_compiling():  # which makes one pass of the two, and has no outputs of another dtype
        return (gradient * factor).to(dtype)
    return torch.mul(gradient, factor, out=gradient.new_empty(gradient.shape, dtype=dtype))


class _Total(torch.autograd.Function):
    """The sum of the losses; its gradient is made with it, and backward multiplies it by a scalar."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        ignore_index: int,
        softcap: float | None,
        stats: bool,
    ) -> Rows:
        needs = ctx.needs_input_grad[:3]
        losses, correct, entropy, *made = loss_of_rows(
            hidden, weight, bias, labels, None, ignore_index, softcap, *needs, stats
        )
        ctx.save_for_backward(*(g if need else None for g, need in zip(made, needs, strict=True)))
        ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(correct, entropy)
        return losses.sum(), correct, entropy

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dtotal: torch.Tensor, *_: torch.Tensor | None) -> Any:
        grads = (None if g is None else _scaled(g, dtotal, ctx.dtype) for g in ctx.saved_tensors)
        return *grads, None, None, None, None


class _Rows(torch.autograd.Function):
    """The rows' losses; backward makes the logits again, each row's gradient having a factor of its own."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        ignore_index: int,
        softcap: float | None,
        stats: bool,
    ) -> Rows:
        nothing = (False, False, False)
        losses, correct, entropy, *_ = loss_of_rows(
            hidden, weight, bias, labels, None, ignore_index, softcap, *nothing, stats
        )
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.settings = ignore_index, softcap
        ctx.mark_non_differentiable(correct, entropy)
        return losses, correct, entropy

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dlosses: torch.Tensor, *_: torch.Tensor | None) -> Any:
        hidden, weight, bias, labels = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        made = loss_of_rows(hidden, weight, bias, labels, dlosses.contiguous(), *ctx.settings, *needs, False)[3:]
        grads = (g.to(hidden.dtype) if need else None for g, need in zip(made, needs, strict=True))
        return *grads, None, None, None, None


def _select(
    hidden: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor | None, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Leave out the rows that are not scored; return those left, their labels, and which they are (None for all)."""
    flat, targets, device = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1), hidden.device
    if rows is None and not torch.compiler.is_compiling():  # no graph can hold a number of rows that depends on data
        rows = (targets != ignore_index).nonzero().squeeze(1)
        if rows.numel() == targets.numel():
            rows = None
    targets = targets.to(device, non_blocking=True)
    if rows is None:
        return flat, targets, None
    rows = rows.to(device, non_blocking=True)
    return flat.index_select(0, rows), targets.index_select(0, rows), rows


def _check_rows(op: str, rows: torch.Tensor, total: int, device: torch.device) -> None:
    if rows.dtype != torch.int64 or rows.dim() != 1:
        raise TypeError(f"{op}: rows has {rows.dtype} and shape {tuple(rows.shape)}; it must be int64 and 1-D")
    if rows.device.type != "cpu":
        if rows.device != device:
            raise ValueError(f"{op}: rows is on {rows.device}; it must be on {device} or the CPU")
    elif not torch.compiler.is_compiling():
        wrong = rows[(rows < 0) | (rows >= total)]
        if wrong.numel():
            raise ValueError(f"{op}: rows hold {wrong[0].item()}; hidden has {total} rows, counted from 0")


def _check(
    op: str, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, bias: torch.Tensor | None, ignored: int
) -> None:
    check_scored(op, hidden=hidden, weight=weight, bias=bias)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{op}: hidden has shape {tuple(hidden.shape)} and weight {tuple(weight.shape)}; they must be (..., K) and "
            "(V, K)"
        )
    check_shape(op, "bias", bias, weight.shape[:1])
    check_labels(op, labels, hidden.shape[:-1], weight.shape[0], ignored, hidden.device)


def _under_autocast(t: torch.Tensor) -> torch.Tensor:
    """Cast to autocast's dtype if it is on, as it does for a linear layer; without a graph where none is recorded."""
    kind = t.device.type
    if torch.is_autocast_enabled(kind) and t.dtype != torch.float64:
        t = t.to(torch.get_autocast_dtype(kind))
    return t if torch.is_grad_enabled() else t.detach()  # a Function is told of requires_grad, not of no_grad


def _spread(values: torch.Tensor, rows: torch.Tensor | None, labels: torch.Tensor) -> torch.Tensor:
    """Put what was computed for some rows back into the labels' shape, zero elsewhere."""
    if rows is not None:
        values = values.new_zeros(labels.numel()).index_add(0, rows, values)
    return values.view(labels.shape)


@overload
def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = ...,
    ignore_index: int = ...,
    softcap: float | None = ...,
    reduction: Reduction = ...,
    num_items: float | torch.Tensor | None = ...,
    *,
    rows: torch.Tensor | None = ...,
    return_stats: Literal[False] = ...,
    impl: Impl | None = ...,
) -> torch.Tensor: ...
@overload
def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = ...,
    ignore_index: int = ...,
    softcap: float | None = ...,
    reduction: Reduction = ...,
    num_items: float | torch.Tensor | None = ...,
    *,
    rows: torch.Tensor | None = ...,
    return_stats: Literal[True],
    impl: Impl | None = ...,
) -> tuple[torch.Tensor, LossStats]: ...
def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    num_items: float | torch.Tensor | None = None,
    *,
    rows: torch.Tensor | None = None,
    return_stats: bool = False,
    impl: Impl | None = None,
) -> torch.Tensor | tuple[torch.Tensor, LossStats]:
    """Return the cross entropy of ``hidden @ weight.T + bias`` and labels, without making those logits at once.

    The labels are those of hidden's own positions: for next-token prediction shift them, see the example.

    Without ``rows`` the scored rows are looked for, which waits for the GPU once unless the labels lie on the CPU.
    Nothing waits if ``rows`` is given. Under ``torch.compile`` and ``torch.export``, whose graphs cannot hold a number
    of rows that depends on data, all rows go through the products unless ``rows`` is given; the result is the same.

    Args:
        hidden: ``(..., K)``, floating; any strides.
        weight: ``(V, K)``, of hidden's dtype; under autocast both are cast.
        labels: ``(...)``, int64 or int32, in [0, V) or ``ignore_index``; on hidden's device or the CPU.
        bias: ``(V,)``, of hidden's dtype.
        ignore_index: the label of rows that are not scored.
        softcap: c of c · tanh(x / c) on the logits (Gemma 2); ``None`` for no cap.
        reduction: ``"mean"`` over the scored rows (NaN where there is none), ``"sum"``, or ``"none"``, whose backward
            makes the logits a second time.
        num_items: divides the mean in place of the number of scored rows, such as the count over all micro-batches of
            a step: a number, or a 0-d tensor, which is not brought to the host.
        rows: ``(R,)`` int64, on hidden's device or the CPU: the rows of hidden, flattened, that are to be scored, each
            at most once. It may hold ignored rows, which count for nothing, to keep R constant; a row that it lacks is
            not scored, whatever its label.
        return_stats: whether to return token accuracy and entropy as well, taken in the same pass.
        impl: ``"triton"``, ``"torch"``, or ``None`` for Triton on a GPU and PyTorch elsewhere. The products are
            PyTorch's either way.

    Returns:
        a scalar, or with ``"none"`` a tensor of the labels' shape, zero where not scored; fp32 (float64 for float64).
        With ``return_stats`` also :class:`.LossStats`.

    Raises:
        ValueError: shapes, devices or options do not fit; labels or rows on the CPU are out of range. Out of range on
            a GPU, a label makes its loss and its row's gradient NaN.
        TypeError: a dtype does not fit.

    Example:
        >>> targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        >>> loss = linear_cross_entropy(hidden, lm_head.weight, targets, num_items=num_items_in_batch)
    """
    op = "linear_cross_entropy"
    _check(op, hidden, weight, labels, bias, ignore_index)
    check_options(op, reduction, num_items, softcap, hidden.device)
    if rows is not None:
        _check_rows(op, rows, labels.numel(), hidden.device)
    picked, targets, rows = _select(hidden, labels, rows, ignore_index)
    x, w, b = _under_autocast(picked), _under_autocast(weight), None if bias is None else _under_autocast(bias)
    check_same_dtype(op, hidden=x, weight=w, bias=b)
    run: Any = rows_ref
    if use_triton(impl, x, w, b):
        run = _Rows.apply if reduction == "none" else _Total.apply
    losses, correct, entropy = run(x, w, b, targets, ignore_index, softcap, return_stats)
    kept = targets != ignore_index
    if reduction == "none":
        loss = _spread(losses, rows, labels)
        if return_stats:
            items = _spread(kept.int(), rows, labels) > 0
            return loss, LossStats(_spread(correct, rows, labels), _spread(entropy, rows, labels), items)
        return loss
    loss = losses.sum() if losses.dim() else losses
    if reduction == "mean":
        loss = mean_of(loss, kept, num_items)
    return (loss, LossStats(correct.sum(), entropy.sum(), kept.sum())) if return_stats else loss
