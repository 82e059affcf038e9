"""The NF4 format: its sixteen values, what belongs to a quantized weight, and the checks of it.

A weight is read row by row as one flat run of elements. Each block of ``blocksize`` consecutive elements is divided by
its largest magnitude (its *absmax*), and every quotient is replaced by the nearest of sixteen values between −1 and 1,
the quantiles of a normal distribution (Dettmers et al., QLoRA, 2023, appendix E). Two 4-bit codes share a byte, the
first in the high half.

The absmaxes themselves may be quantized, "nested": their mean (``offset``) is taken off, every 256 of them are divided
by their largest magnitude (``nested_absmax``), and each quotient is replaced by the index of the nearest of 256 values
(``code``), the dynamic tree of Dettmers, 8-Bit Approximations for Parallelism in Deep Learning, 2016. So::

    absmax[b]  = code[q[b]] · nested_absmax[b // 256] + offset
    w[i]       = NF4_VALUES[nibble(i)] · absmax[i // blocksize]

This is bitsandbytes' layout, tensor for tensor: ``QuantState.absmax``, ``.offset``, ``.state2.absmax`` and
``.state2.code`` pass as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from ._launch import cdiv, check_floating, check_same_device, check_shape

NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""What the codes 0 to 15 stand for; fp32 numbers, the table of the QLoRA paper."""

NESTED_BLOCKSIZE = 256
"""Absmaxes that share one ``nested_absmax``; bitsandbytes writes no other number."""

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""The block sizes that bitsandbytes writes."""


Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
"""The five tensors of a quantized weight: packed, absmax, nested_absmax, code, offset."""


@dataclass(frozen=True, eq=False)
class NF4Weight:
    """A weight in NF4, as plain tensors; they may come straight from a bitsandbytes ``QuantState``.

    Attributes:
        packed: two codes a byte, in any layout and any dtype (bitsandbytes' ``quant_storage``); it is read as bytes.
        absmax: ``(blocks,)``; fp32, or uint8 where nested.
        shape: of the weight, ``(out_features, in_features)`` for a linear layer.
        dtype: that the weight had, and is given back in unless another is asked for.
        blocksize: elements that share an absmax.
        nested_absmax: ``(blocks / 256 rounded up,)`` fp32 where nested, else ``None``.
        code: ``(256,)`` fp32 where nested, else ``None``.
        offset: one fp32 number where nested, else ``None``.

    Raises:
        ValueError: a size, a device, the block size, or the presence of the nested parts does not fit.
        TypeError: a dtype is not the format's.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    blocksize: int = 64
    nested_absmax: torch.Tensor | None = None
    code: torch.Tensor | None = None
    offset: torch.Tensor | None = None

    def __post_init__(self) -> None:
        _check_parts(self)

    @property
    def nested(self) -> bool:
        """Whether the absmaxes are quantized too."""
        return self.nested_absmax is not None

    @property
    def parts(self) -> Parts:
        """The five tensors, in the order of the operators' arguments."""
        return self.packed, self.absmax, self.nested_absmax, self.code, self.offset

    def to(self, device: torch.device | str) -> NF4Weight:
        """Return the same weight on ``device``."""
        moved = [None if t is None else t.to(device) for t in (self.nested_absmax, self.code, self.offset)]
        return NF4Weight(self.packed.to(device), self.absmax.to(device), self.shape, self.dtype, self.blocksize, *moved)


def nf4_table(device: torch.device) -> torch.Tensor:
    """Return :data:`NF4_VALUES` as ``(16,)`` fp32 on ``device``."""
    return torch.tensor(NF4_VALUES, dtype=torch.float32, device=device)


def _dynamic_values() -> tuple[float, ...]:
    """Return the 256 sorted values of the signed dynamic tree, rounded to fp32 as they are formed.

    For each exponent i from 0 to 6 there are 2^i magnitudes, the midpoints of 2^i equal parts of [0.1, 1], times
    10^(i−6), with both signs; then 0 and 1.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        magnitudes = (edges[:-1] + edges[1:]) / 2 * 10 ** (i - 6)
        values += magnitudes.tolist() + (-magnitudes).tolist()
    return tuple(sorted(values))


DYNAMIC_VALUES = _dynamic_values()
"""What the codes of nested absmaxes stand for: numbers, since a graph cannot hold how they are formed."""


def dynamic_code(device: torch.device | str = "cpu") -> torch.Tensor:
    """Return :data:`DYNAMIC_VALUES` as ``(256,)`` fp32 on ``device``."""
    return torch.tensor(DYNAMIC_VALUES, dtype=torch.float32, device=device)


def as_bytes(packed: torch.Tensor) -> torch.Tensor:
    """View packed codes of any dtype and shape as a flat uint8 tensor; copies only where they are not contiguous."""
    return packed.contiguous().reshape(-1).view(torch.uint8)


def check_blocksize(op: str, blocksize: int) -> None:
    """Raise a ``ValueError`` unless ``blocksize`` is one that the format knows."""
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"{op}: blocksize is {blocksize}; it must be one of {', '.join(map(str, BLOCKSIZES))}")


def _check_parts(weight: NF4Weight) -> None:
    """Raise unless a weight's tensors fit its shape and each other; see :class:`NF4Weight`."""
    op = "nf4"
    check_blocksize(op, weight.blocksize)
    if not weight.dtype.is_floating_point:
        raise TypeError(f"{op}: dtype is {weight.dtype}; it must be a floating dtype")
    if weight.packed.dtype == torch.bool:  # of a byte it keeps one bit
        raise TypeError(f"{op}: packed has dtype torch.bool, which holds no codes; give the tensor that was quantized")
    numel, width = prod(weight.shape), weight.packed.element_size()
    stored, needed = weight.packed.numel() * width, (numel + 1) // 2
    if not needed <= stored < needed + width:  # a storage dtype wider than a byte may round the bytes up
        raise ValueError(f"{op}: packed holds {stored} bytes; a weight of shape {tuple(weight.shape)} takes {needed}")
    blocks = cdiv(numel, weight.blocksize)
    check_shape(op, "absmax", weight.absmax, (blocks,))
    parts = {"nested_absmax": weight.nested_absmax, "code": weight.code, "offset": weight.offset}
    missing = [name for name, part in parts.items() if part is None]
    if len(missing) in (1, 2):
        raise ValueError(f"{op}: {' and '.join(missing)} missing; nested_absmax, code and offset go together")
    check_same_device(op, packed=weight.packed, absmax=weight.absmax, **parts)
    if missing:
        check_floating(op, absmax=weight.absmax)
        return
    if weight.absmax.dtype != torch.uint8:
        raise TypeError(f"{op}: absmax has dtype {weight.absmax.dtype}; beside nested_absmax it must be torch.uint8")
    check_floating(op, **parts)
    check_shape(op, "nested_absmax", weight.nested_absmax, (cdiv(blocks, NESTED_BLOCKSIZE),))
    check_shape(op, "code", weight.code, (256,))
    if weight.offset is not None and weight.offset.numel() != 1:
        raise ValueError(f"{op}: offset has shape {tuple(weight.offset.shape)}; it must hold one number")
