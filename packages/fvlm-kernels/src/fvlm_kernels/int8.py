"""Int8 weights, scaled row by row, back to floating point: the storage of LLM.int8.

Maths, for row i (Dettmers et al., LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale, 2022)::

    w[i, j] = codes[i, j] · (scale[i] · (1/127)),      scale[i] = max_j |w[i, j]|

``codes`` and ``scale`` are bitsandbytes' ``state.CB`` and ``state.SCB``. A quantized weight is frozen: no gradient.

Numerics. Both products are fp32, and the second is rounded once to the dtype asked for: bit for bit the weight with
which bitsandbytes' 8-bit linear layers compute their input gradient on every device, and their output on a CPU. (On a
GPU their output comes from activations rounded to int8 instead.) Two runs give the same bits.
"""

# mypy: allow-untyped-defs
# (for the kernel, whose arguments Triton types)

from __future__ import annotations

from dataclasses import dataclass

import torch

from ._launch import Impl, cdiv, check_floating, check_same_device, check_shape, launch, next_power_of_two, use_triton
from ._library import register
from ._triton import tl, triton

RECIPROCAL = 1.0 / 127.0


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """A weight in int8, as plain tensors.

    Attributes:
        codes: ``(out_features, in_features)`` int8.
        scale: ``(out_features,)`` floating: the largest magnitude of each row.
        dtype: that the weight had, and is given back in unless another is asked for.

    Raises:
        ValueError: a shape or a device does not fit.
        TypeError: a dtype is not the format's.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.int8:
            raise TypeError(f"int8: codes has dtype {self.codes.dtype}; it must be torch.int8")
        if self.codes.dim() != 2:
            raise ValueError(f"int8: codes has shape {tuple(self.codes.shape)}; it must have two dimensions")
        if not self.dtype.is_floating_point:
            raise TypeError(f"int8: dtype is {self.dtype}; it must be a floating dtype")
        check_floating("int8", scale=self.scale)
        check_shape("int8", "scale", self.scale, self.codes.shape[:1])
        check_same_device("int8", codes=self.codes, scale=self.scale)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(out_features, in_features)``."""
        return tuple(self.codes.shape)


def _ref(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The module's maths in plain PyTorch."""
    return (codes.float() * (scale.float() * RECIPROCAL).unsqueeze(1)).to(dtype)


@triton.jit
def _int8_dequantize_kernel(codes_ptr, scale_ptr, out_ptr, N, reciprocal, BLOCK_N: tl.constexpr):
    blocks = tl.cdiv(N, BLOCK_N)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    offs_n = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    codes = tl.load(codes_ptr + row * N + offs_n, mask=offs_n < N, other=0).to(tl.float32)
    scale = tl.load(scale_ptr + row).to(tl.float32) * reciprocal
    tl.store(out_ptr + row * N + offs_n, (codes * scale).to(out_ptr.dtype.element_ty), mask=offs_n < N)


def _dequantize_into(codes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    m, n = codes.shape
    block = min(4096, next_power_of_two(n))
    args = codes.contiguous(), scale.contiguous(), out, n, RECIPROCAL
    launch(_int8_dequantize_kernel, (m * cdiv(n, block),), *args, BLOCK_N=block, num_warps=4)


def _dequantize(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = codes.new_empty(codes.shape, dtype=dtype)
    _dequantize_into(codes, scale, out)
    return out


_op = register(
    "int8_dequantize(Tensor codes, Tensor scale, ScalarType dtype) -> Tensor",
    _dequantize,
    lambda codes, scale, dtype: codes.new_empty(codes.shape, dtype=dtype),
)
_op_into = register(
    "int8_dequantize_into(Tensor codes, Tensor scale, Tensor(a!) out) -> ()",
    _dequantize_into,
    lambda codes, scale, out: None,
)


def dequantize_rows(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, *, triton: bool) -> torch.Tensor:
    """Dequantize the tensors of an :class:`Int8Weight`, checked when it was made; nothing is checked here."""
    made: torch.Tensor = (_op if triton else _ref)(codes, scale, dtype)
    return made


def dequantize_int8(
    codes: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
    *,
    out: torch.Tensor | None = None,
    impl: Impl | None = None,
) -> torch.Tensor:
    """Turn int8 codes back into numbers; see the module for maths and numerics.

    Args:
        codes: ``(out_features, in_features)`` int8 (bitsandbytes' ``state.CB``).
        scale: ``(out_features,)`` floating: the largest magnitude of each row (``state.SCB``).
        dtype: of the result: fp32, fp16, bf16 (float64 with PyTorch, which then holds fp32 numbers).
        out: a contiguous tensor of ``codes``'s shape and of ``dtype`` to write into.
        impl: ``"triton"``, ``"torch"``, or ``None`` for Triton on a GPU and PyTorch elsewhere.

    Returns:
        ``out``, or a new tensor. It has no gradient.

    Raises:
        ValueError: sizes or devices do not fit, or ``out`` is not contiguous.
        TypeError: a dtype is not the format's, or ``out``'s is not ``dtype``.

    Example:
        >>> w = dequantize_int8(layer.state.CB, layer.state.SCB, torch.bfloat16)
    """
    Int8Weight(codes, scale, dtype)  # checks its parts
    if out is not None:
        check_shape("dequantize_int8", "out", out, codes.shape)
        check_same_device("dequantize_int8", out=out, codes=codes)
        if out.dtype != dtype:
            raise TypeError(f"dequantize_int8: out has dtype {out.dtype}; {dtype} was asked for")
        if not out.is_contiguous():
            raise ValueError(f"dequantize_int8: out has strides {out.stride()}; it must be contiguous")
    if not use_triton(impl, codes.new_empty(0, dtype=dtype) if out is None else out):
        result = dequantize_rows(codes, scale, dtype, triton=False)
        return result if out is None else out.copy_(result)
    if out is not None:
        _op_into(codes, scale, out)
        return out
    return dequantize_rows(codes, scale, dtype, triton=True)
