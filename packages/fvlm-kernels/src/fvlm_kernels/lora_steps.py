"""Forward pass of several adapted linear layers that share their input, without autograd.

The autograd functions of :mod:`.lora` and :mod:`.lora_mlp` are made of this step and those of :mod:`.lora_gradients`.
Here ``x`` is ``(rows, in)``, every layer is given as its settings and its flat tensors (:mod:`.lora_layer`), and
nothing is checked.

The base weights are dequantized one at a time and let go after their product, so that one of them is in memory at any
moment; the allocator hands the same bytes to the next. Without dropout the A matrices of all layers are stacked, and
one product serves them all, in forward and in each part of backward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .int8 import dequantize_rows
from .lora_layer import Dtypes, Settings, Slots
from .nf4 import dequantize_parts

BIAS, A, B = 5, 6, 7
"""Where a layer's slots hold what is not the base."""

Layers = Sequence[tuple[Settings, Slots]]


def given(tensor: torch.Tensor | None) -> torch.Tensor:
    """Narrow a slot that is known to be filled."""
    if tensor is None:
        raise TypeError("lora: a slot that must hold a tensor is empty")
    return tensor


def base_weight(settings: Settings, slots: Slots, dtype: torch.dtype, triton: bool) -> torch.Tensor:
    """Return W of a layer in ``dtype``: the weight itself where it has that dtype already."""
    first = given(slots[0])
    if settings.kind == "plain":
        return first.to(dtype)
    second = given(slots[1])
    if settings.kind == "int8":
        return dequantize_rows(first, second, dtype, triton=triton)
    parts = first, second, slots[2], slots[3], slots[4]
    return dequantize_parts(parts, settings.blocksize, settings.shape, dtype, triton=triton)


def ranks_of(layers: Layers) -> list[slice]:
    """Return where each layer's rows lie in the stacked A matrices; an empty slice for a layer without an adapter."""
    slices, start = [], 0
    for _, slots in layers:
        a = slots[A]
        stop = start + (0 if a is None else a.shape[0])
        slices.append(slice(start, stop))
        start = stop
    return slices


def stacked(layers: Layers, dtype: torch.dtype) -> torch.Tensor:
    """Return all A matrices one above the other, in ``dtype``."""
    matrices = [slots[A] for _, slots in layers]
    cast = [a.to(dtype) for a in matrices if a is not None]
    return cast[0] if len(cast) == 1 else torch.cat(cast)


def _keep_scale(p: float) -> float:
    return 0.0 if p == 1.0 else 1.0 / (1.0 - p)


def dropped_by(x: torch.Tensor, mask: torch.Tensor, p: float) -> torch.Tensor:
    """Return dropout(x) of a saved mask; applied to a gradient it is dropout's backward."""
    return torch.ops.aten.native_dropout_backward.default(x, mask, _keep_scale(p))  # type: ignore[no-any-return]


def adapted(layers: Layers) -> bool:
    """Whether any of the layers has an adapter."""
    return any(slots[A] is not None for _, slots in layers)


def _product_added(y: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Return y + scale · left right, in y's own memory where nobody traces."""
    if torch.compiler.is_compiling():  # Dynamo loses the gradient of an output that its Function changed in place
        return torch.addmm(y, left, right, alpha=scale)
    return y.addmm_(left, right, alpha=scale)


def _adapter_output(part: torch.Tensor, b: torch.Tensor, scale: float, bias: torch.Tensor | None) -> torch.Tensor:
    """Return bias + scale · part Bᵀ.

    Where it is exact, B takes the scale: the product is then a plain linear layer, which has the bias in it.
    """
    if bias is None:
        return part.new_empty(part.shape[0], b.shape[0]).addmm_(part, b.t(), beta=0, alpha=scale)
    if abs(math.frexp(scale)[0]) == 0.5:
        return torch.nn.functional.linear(part, b if scale == 1.0 else b * scale, bias)
    return torch.addmm(bias, part, b.t(), alpha=scale)


def forward(
    x: torch.Tensor, layers: Layers, dtypes: Dtypes, dropout: bool, triton: bool
) -> tuple[list[torch.Tensor], torch.Tensor | None, list[torch.Tensor | None]]:
    """Apply every layer to ``x``.

    Args:
        x: ``(rows, in_features)``.
        layers: the layers, all of ``in_features`` columns.
        dtypes: what to compute in.
        dropout: whether to drop inputs of the adapters; then each adapter has a mask of its own, as in PEFT.
        triton: whether quantized weights are dequantized by kernels.

    Returns:
        the outputs ``(rows, out_features)``; the products of x with the stacked A, ``(rows, Σr)`` (``None`` without any
        adapter); and for each layer the mask of what dropout kept.
    """
    masks: list[torch.Tensor | None] = [None] * len(layers)
    products: torch.Tensor | None = None
    if adapted(layers):
        narrow = x.to(dtypes.lora)
        if dropout:
            products, masks = _dropout_products(narrow, layers)
        else:
            products = narrow @ stacked(layers, dtypes.lora).t()
    wide, outputs = x.to(dtypes.base), []
    for (settings, slots), rank in zip(layers, ranks_of(layers), strict=True):
        weight = base_weight(settings, slots, dtypes.base, triton)
        part = None if products is None or slots[B] is None else products[:, rank]
        outputs.append(_output(wide, weight, part, settings, slots, dtypes))
    return outputs, products, masks


def _output(
    x: torch.Tensor,
    weight: torch.Tensor,
    part: torch.Tensor | None,
    settings: Settings,
    slots: Slots,
    dtypes: Dtypes,
) -> torch.Tensor:
    """Return what one layer gives.

    Where all dtypes are one, the base's product is accumulated onto the adapter's, in fp32 and with one rounding. In
    that order the large result is written twice and read once, beside the arithmetic of the large product; the adapter
    added afterwards would be a pass of its own that reads and writes it.
    """
    bias = slots[BIAS]
    bias = None if bias is None else bias.to(dtypes.base)
    if part is not None and dtypes.base == dtypes.lora == dtypes.out:
        y = _adapter_output(part, given(slots[B]).to(dtypes.lora), settings.scaling, bias)
        return _product_added(y, x, weight.t())
    y = torch.nn.functional.linear(x, weight, bias).to(dtypes.out)
    if part is None:
        return y
    b = given(slots[B]).to(dtypes.lora)
    if dtypes.out == dtypes.lora:
        return _product_added(y, part, b.t(), settings.scaling)
    return (y + (part @ b.t()) * settings.scaling).to(dtypes.out)


def _dropout_products(x: torch.Tensor, layers: Layers) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Return the products with A of differently dropped inputs, side by side, and the masks."""
    products: list[torch.Tensor] = []
    masks: list[torch.Tensor | None] = []
    for settings, slots in layers:
        a, mask, kept = slots[A], None, x
        if a is not None:
            if settings.dropout:
                kept, mask = torch.native_dropout(x, settings.dropout, True)
            products.append(kept @ a.to(x.dtype).t())
        masks.append(mask)
    return torch.cat(products, dim=1), masks


def input_products(x: torch.Tensor, layers: Layers, dtypes: Dtypes) -> torch.Tensor | None:
    """Return the products of ``x`` with the stacked A, ``(rows, Σr)``: those of :func:`forward` without dropout."""
    return x.to(dtypes.lora) @ stacked(layers, dtypes.lora).t() if adapted(layers) else None
