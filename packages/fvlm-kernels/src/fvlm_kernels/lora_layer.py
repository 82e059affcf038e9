"""What the LoRA ops are given: a frozen linear layer with its low-rank adapter, and the dtypes they compute in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ._launch import check_floating, check_same_device, check_shape
from .int8 import Int8Weight
from .nf4_format import NF4Weight

TENSORS = 8
"""Tensors of one layer in the flat argument list of an autograd function: five of the base, then bias, A and B."""

Slots = tuple[torch.Tensor | None, ...]
"""The :data:`TENSORS` tensors of one layer."""


class Settings(NamedTuple):
    """What is not a tensor in a layer; plain values, so that ``torch.compile`` can hold them constant."""

    kind: str
    shape: tuple[int, ...]
    blocksize: int
    scaling: float
    dropout: float


@dataclass(frozen=True, eq=False)
class LoRALinear:
    """A frozen linear layer and the adapter beside it: ``y = x Wᵀ + bias + scaling · (dropout(x) Aᵀ) Bᵀ``.

    It is checked once, when it is made, so make it once and keep it; parameters may change in place.

    Attributes:
        base: W, ``(out_features, in_features)``: a floating tensor, an :class:`.NF4Weight` or an :class:`.Int8Weight`.
            It gets no gradient.
        a: A, ``(r, in_features)`` floating; ``None`` (and ``b`` too) for a layer without an adapter.
        b: B, ``(out_features, r)``, of A's dtype.
        scaling: what the adapter's output is multiplied by (``lora_alpha / r``, or ``/ √r`` with rsLoRA).
        bias: ``(out_features,)`` floating; it may be trained.
        dropout: the share of the adapter's input that is zeroed in training.

    Raises:
        ValueError: shapes or devices do not fit, the base asks for a gradient, or dropout is no probability.
        TypeError: a dtype does not fit, or the base is of another kind.
    """

    base: torch.Tensor | NF4Weight | Int8Weight
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    scaling: float = 1.0
    bias: torch.Tensor | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        first = self._check_base()
        out_features, in_features = self.base.shape
        check_floating("lora", a=self.a, b=self.b, bias=self.bias)
        check_shape("lora", "bias", self.bias, (out_features,))
        if (self.a is None) != (self.b is None):
            raise ValueError(f"lora: {'a' if self.a is None else 'b'} is missing; A and B go together or not at all")
        check_same_device("lora", base=first, a=self.a, b=self.b, bias=self.bias)
        if not 0.0 <= self.dropout <= 1.0:
            raise ValueError(f"lora: dropout is {self.dropout}; it must lie between 0 and 1")
        if self.a is None or self.b is None:
            return
        if self.a.dim() != 2:
            raise ValueError(f"lora: a has shape {tuple(self.a.shape)}; it must have shape (r, {in_features})")
        check_shape("lora", "a", self.a, (self.a.shape[0], in_features))
        check_shape("lora", "b", self.b, (out_features, self.a.shape[0]))
        if self.a.dtype != self.b.dtype:
            raise TypeError(f"lora: b has {self.b.dtype} but a has {self.a.dtype}; cast one of them")

    def _check_base(self) -> torch.Tensor:
        """Check the base alone and return a tensor of it, for its device."""
        if not isinstance(self.base, (torch.Tensor, NF4Weight, Int8Weight)):  # a tuple, which every Dynamo can trace
            raise TypeError(f"lora: base is a {type(self.base).__name__}; give a tensor, an NF4Weight or an Int8Weight")
        if len(self.base.shape) != 2:
            raise ValueError(f"lora: base has shape {tuple(self.base.shape)}; it must be (out_features, in_features)")
        if isinstance(self.base, NF4Weight):
            return self.base.packed
        if isinstance(self.base, Int8Weight):
            return self.base.codes
        check_floating("lora", base=self.base)
        if self.base.requires_grad:
            raise ValueError("lora: base requires a gradient; these ops compute none for it, so freeze it")
        return self.base

    @property
    def settings(self) -> Settings:
        """What is not a tensor."""
        kind = {NF4Weight: "nf4", Int8Weight: "int8"}.get(type(self.base), "plain")
        blocksize = self.base.blocksize if isinstance(self.base, NF4Weight) else 0
        return Settings(kind, tuple(self.base.shape), blocksize, float(self.scaling), float(self.dropout))

    @property
    def slots(self) -> Slots:
        """The :data:`TENSORS` tensors: five of the base (``None`` where it has fewer), bias, A, B."""
        own = self.bias, self.a, self.b
        if isinstance(self.base, NF4Weight):
            return *self.base.parts, *own
        if isinstance(self.base, Int8Weight):
            return self.base.codes, self.base.scale, None, None, None, *own
        return self.base, None, None, None, None, *own


class Dtypes(NamedTuple):
    """The dtypes of one call."""

    base: torch.dtype
    """of the product with the base weight"""
    lora: torch.dtype
    """of the products with A and B"""
    out: torch.dtype
    """of the result"""


def dtypes_for(
    x: torch.Tensor, layer: LoRALinear, compute_dtype: torch.dtype | None, lora_dtype: torch.dtype | None
) -> Dtypes:
    """Choose the dtypes in which PEFT around the same layer would compute.

    Outside autocast the base product takes ``x``'s dtype and the adapter's products take A's, to which ``x`` is cast.
    Under autocast both take autocast's dtype. The result has ``x``'s dtype, except around a 16- or 32-bit base under
    autocast, where it has autocast's, as ``torch.nn.functional.linear`` has.
    """
    device = x.device.type
    auto = None
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        auto = torch.get_autocast_dtype(device)
    base = compute_dtype or auto or x.dtype
    lora = lora_dtype or auto or (x.dtype if layer.a is None else layer.a.dtype)
    out = base if auto is not None and isinstance(layer.base, torch.Tensor) else x.dtype
    return Dtypes(base, lora, out)
