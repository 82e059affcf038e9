"""Frozen linear layers with LoRA adapters, one autograd function for those that share an input.

Maths, for each layer with frozen W and trained A, B (Hu et al., LoRA, 2021), rows of x being tokens::

    y = x Wᵀ + bias + s · (drop(x) Aᵀ) Bᵀ

Gradients, with z = s · dy B and all layers' contributions to dx added up::

    dx = dy W + drop(z A)        dA = zᵀ drop(x)        dB = s · dyᵀ (drop(x) Aᵀ)        dbias = Σ_rows dy

drop multiplies by a mask and 1/(1−p); its backward is the same multiplication. There is no dW, and none is formed.

What is saved: x where an A is trained, the ``(rows, Σr)`` products with A where a B is, one byte an element of x for
each layer with dropout. W is dequantized again in backward.

Numerics. The matrix products accumulate in fp32 in the matrix units. Without ``lora_dtype`` the adapter computes in
the dtype of A, to which x is cast, as PEFT's layers do. Where all dtypes are one the base's product is accumulated onto
the rounded output of the adapter and rounded once; else the adapter's product onto the rounded output of the base. PEFT
rounds both, and then their sum. Under autocast all products take autocast's dtype, as PEFT's do.
``compute_dtype`` is bitsandbytes' ``bnb_4bit_compute_dtype``. The gradients of A, B and bias have the dtypes of those.
Two runs on one device give the same bits where its matrix products do (cuBLAS does, on one stream).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import lora_gradients as gradients
from . import lora_steps as steps
from ._launch import KERNEL_DTYPES, Impl, check_floating, check_same_device, use_triton, without_autocast
from ._library import first_derivative_only
from .lora_gradients import Needs, Saved
from .lora_layer import TENSORS, Dtypes, LoRALinear, Settings, dtypes_for
from .lora_steps import BIAS, A, B


def group(settings: Sequence[Settings], tensors: Sequence[torch.Tensor | None]) -> steps.Layers:
    """Put the flat tensors of an autograd function back together with their layers' settings."""
    return [(s, tuple(tensors[i * TENSORS : (i + 1) * TENSORS])) for i, s in enumerate(settings)]


def needs_of(flags: Sequence[bool]) -> list[Needs]:
    """Read from ``ctx.needs_input_grad`` over the flat tensors which gradients each layer is asked for."""
    starts = range(0, len(flags), TENSORS)
    return [Needs(flags[i + BIAS], flags[i + A], flags[i + B]) for i in starts]


def flat(gradients: Sequence[gradients.Gradients]) -> list[torch.Tensor | None]:
    """Lay the layers' gradients out as their flat tensors were."""
    return [g for one in gradients for g in (*[None] * BIAS, one.bias, one.a, one.b)]


class _Projections(torch.autograd.Function):
    """Several adapted layers of one input. Arguments: x as rows, what is no tensor, then the layers' flat tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        settings: tuple[Settings, ...],
        dtypes: Dtypes,
        dropout: bool,
        triton: bool,
        *tensors: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        layers = group(settings, tensors)
        outputs, products, masks = steps.forward(x, layers, dtypes, dropout, triton)
        needs = needs_of(ctx.needs_input_grad[5:])
        kept_x = x if any(n.a for n in needs) else None
        kept_products = products if any(n.b for n in needs) else None
        ctx.save_for_backward(kept_x, kept_products, *masks, *tensors)
        ctx.rest = settings, dtypes, triton, x.dtype
        return tuple(outputs)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        settings, dtypes, triton, dtype = ctx.rest
        x, products, *others = ctx.saved_tensors
        masks, tensors = others[: len(settings)], others[len(settings) :]
        needs, need_dx = needs_of(ctx.needs_input_grad[5:]), ctx.needs_input_grad[0]
        with without_autocast(grads[0]):
            dx, made = gradients.backward(
                grads, Saved(x, products, masks), group(settings, tensors), dtypes, needs, need_dx, triton
            )
        return None if dx is None else dx.to(dtype), None, None, None, None, *flat(made)


def check_input(op: str, x: torch.Tensor, layers: Sequence[LoRALinear]) -> None:
    """Raise a one-sentence error unless ``x`` fits every layer."""
    check_floating(op, x=x)
    for i, layer in enumerate(layers):
        out_features, in_features = layer.base.shape
        if x.dim() == 0 or x.shape[-1] != in_features:
            raise ValueError(
                f"{op}: x has shape {tuple(x.shape)} but layer {i} has weight {(out_features, in_features)}; x's last "
                f"dimension must be {in_features}"
            )
        check_same_device(op, x=x, base=layer.slots[0])


def runs_triton(impl: Impl | None, x: torch.Tensor, dtypes: Dtypes) -> bool:
    """Decide whether quantized weights and activations go through kernels; see :func:`._launch.use_triton`."""
    if impl is None and dtypes.base not in KERNEL_DTYPES:
        return False
    return use_triton(impl, x if x.dtype == dtypes.base else x.new_empty(0, dtype=dtypes.base))


def lora_qkv(
    x: torch.Tensor,
    layers: Sequence[LoRALinear],
    *,
    training: bool = True,
    compute_dtype: torch.dtype | None = None,
    lora_dtype: torch.dtype | None = None,
    impl: Impl | None = None,
) -> tuple[torch.Tensor, ...]:
    """Apply several adapted layers to one input, such as the query, key and value projections of an attention block.

    Args:
        x: ``(..., in_features)``, floating; any strides.
        layers: one or more; each may have another base, rank, scaling and bias, or no adapter.
        training: whether the layers' dropout acts.
        compute_dtype: of the product with the base weights; ``None`` for autocast's dtype if it is on, else ``x``'s.
        lora_dtype: of the adapters' products; ``None`` for autocast's dtype if it is on, else the first A's.
        impl: how quantized weights are dequantized: ``"triton"``, ``"torch"``, or ``None`` for Triton on a GPU and
            PyTorch elsewhere. The products are PyTorch's either way.

    Returns:
        for each layer ``(..., out_features)`` in ``x``'s dtype, or in autocast's if it is on and the base is not
        quantized. Gradients go to ``x``, every A, B and bias, and only to those that ask for one.

    Raises:
        ValueError: no layer, ``x`` does not fit one, or Triton cannot run here.
        TypeError: ``x`` is not floating, or Triton was asked for in float64.

    Example:
        >>> q, k, v = lora_qkv(hidden, [LoRALinear(weight, a, b, 2.0, bias) for weight, a, b, bias in projections])
    """
    if not layers:
        raise ValueError("lora_qkv: layers is empty; give at least one")
    check_input("lora_qkv", x, layers)
    first = next((layer for layer in layers if layer.a is not None), layers[0])
    dtypes = dtypes_for(x, first, compute_dtype, lora_dtype)
    triton = runs_triton(impl, x, dtypes)
    dropout = training and any(layer.dropout > 0 and layer.a is not None for layer in layers)
    settings = tuple(layer.settings for layer in layers)
    tensors = [t for layer in layers for t in layer.slots]
    with without_autocast(x):
        rows = x.reshape(-1, x.shape[-1])
        outputs: tuple[torch.Tensor, ...] = _Projections.apply(rows, settings, dtypes, dropout, triton, *tensors)
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)


def lora_linear(
    x: torch.Tensor,
    layer: LoRALinear,
    *,
    training: bool = True,
    compute_dtype: torch.dtype | None = None,
    lora_dtype: torch.dtype | None = None,
    impl: Impl | None = None,
) -> torch.Tensor:
    """Apply one adapted layer; :func:`lora_qkv` with a single one, whose arguments, result and errors it shares.

    Example:
        >>> layer = LoRALinear(quantize_nf4(linear.weight), a, b, scaling=lora_alpha / r, bias=linear.bias)
        >>> y = lora_linear(x, layer)
    """
    keywords: dict[str, Any] = {"compute_dtype": compute_dtype, "lora_dtype": lora_dtype, "impl": impl}
    return lora_qkv(x, (layer,), training=training, **keywords)[0]
