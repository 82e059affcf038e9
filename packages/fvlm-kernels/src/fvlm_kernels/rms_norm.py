"""Root-mean-square norm, with the rounding of the class it replaces and an optional fused residual addition.

Maths, row by row over N columns, with h = x + residual where a residual is given and h = x otherwise::

    rstd = 1 / sqrt(mean(h²) + eps)
    n    = h · rstd
    y    = (offset + weight) · n

Gradients, with g = dy · (offset + weight) and dh the gradient of the returned h::

    dx      = rstd · g − h · rstd³ · mean(g · h)  (+ dh);     the same for the residual
    dweight = Σ_rows dy · n

Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, with the gradient worked out from it.

Numerics. h is rounded to x's dtype before anything else, as ``residual + x`` in eager mode is. Everything after it is
read once, and computed and accumulated in fp32. ``rounding`` says where the result is rounded:

* ``"llama"``: n is rounded to x's dtype, then multiplied by the weight, and the product rounded to the promoted dtype
  of the two (``LlamaRMSNorm``, ``Qwen2VLRMSNorm``, ``Qwen2_5_VLRMSNorm``, ``Qwen3VLTextRMSNorm``,
  ``MllamaTextRMSNorm``, ``PixtralRMSNorm``);
* ``"gemma"``: n stays in fp32, is multiplied by (offset + weight) in fp32, and the product is rounded to x's dtype
  (``Gemma3RMSNorm``, which has ``offset=1``).

rstd is recomputed in backward, where h is read anyway, instead of being saved. dweight is summed in fp32 by a fixed
number of programs over fixed rows, then over programs: two runs on one card give the same bits. Triton
pipelines their loop over rows, since nothing else would keep the memory busy.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch

from ._launch import Impl, cdiv, launch, row_blocks, rows_of, steps_known_ahead, use_triton
from ._library import first_derivative_only, register
from ._norms import check_norm, check_width, deal_rows, sum_shares
from ._triton import tl, triton

Rounding = Literal["llama", "gemma"]


def _ref(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, residual: torch.Tensor | None, rounding: Rounding
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(y, h)`` of the module's maths in plain PyTorch; float64 stays float64."""
    h = x if residual is None else x + residual
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    n = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if rounding == "gemma":
        return ((offset + weight.to(n.dtype)) * n).to(h.dtype), h
    scale = weight if offset == 0.0 else (offset + weight.to(n.dtype)).to(weight.dtype)
    return scale * n.to(h.dtype), h


@triton.jit
def _rms_norm_fwd_kernel(
    x_ptr,
    res_ptr,
    weight_ptr,
    y_ptr,
    h_ptr,
    stride_x,
    stride_res,
    M,
    eps,
    offset,
    N: tl.constexpr,
    HAS_RES: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    x = tl.load(x_ptr + offs_m[:, None] * stride_x + offs_n[None, :], mask=mask, other=0.0)
    h = x.to(tl.float32)
    if HAS_RES:
        res = tl.load(res_ptr + offs_m[:, None] * stride_res + offs_n[None, :], mask=mask, other=0.0)
        rounded = (h + res.to(tl.float32)).to(x.dtype)
        tl.store(h_ptr + offs_m[:, None] * N + offs_n[None, :], rounded, mask=mask)
        h = rounded.to(tl.float32)
    weight = tl.load(weight_ptr + offs_n, mask=offs_n < N, other=0.0)
    rstd = tl.rsqrt(tl.sum(h * h, axis=1) / N + eps)
    n = h * rstd[:, None]
    scale = weight.to(tl.float32) + offset
    if CAST_FIRST:
        n = n.to(x.dtype).to(tl.float32)
        scale = scale.to(weight.dtype).to(tl.float32)
    y = n * scale[None, :]
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rms_norm_bwd_kernel(
    dy_ptr,
    dh_ptr,
    h_ptr,
    weight_ptr,
    dx_ptr,
    partial_ptr,
    stride_dy,
    stride_dh,
    stride_h,
    M,
    eps,
    offset,
    steps,
    N: tl.constexpr,
    HAS_DH: tl.constexpr,
    NEED_DWEIGHT: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    first = pid * steps * BLOCK_M  # row, of this program's share
    offs_n = tl.arange(0, BLOCK_N)
    in_row = offs_n < N
    weight = tl.load(weight_ptr + offs_n, mask=in_row, other=0.0)
    scale = weight.to(tl.float32) + offset
    if CAST_FIRST:
        scale = scale.to(weight.dtype).to(tl.float32)
    dweight = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)  # of each row of a block: rows are added up once
    for step in tl.range(0, STEPS if STEPS > 0 else steps, num_stages=STAGES):  # pipelined, as in `layer_norm`
        offs_m = first + step * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (offs_m < M)[:, None] & in_row[None, :]
        h = tl.load(h_ptr + offs_m[:, None] * stride_h + offs_n[None, :], mask=mask, other=0.0)
        dy = tl.load(dy_ptr + offs_m[:, None] * stride_dy + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        wide = h.to(tl.float32)
        g = dy * scale[None, :]
        rstd = tl.rsqrt(tl.sum(wide * wide, axis=1) / N + eps)
        n = wide * rstd[:, None]
        dx = (g - n * (tl.sum(g * n, axis=1) / N)[:, None]) * rstd[:, None]
        if HAS_DH:
            dx += tl.load(dh_ptr + offs_m[:, None] * stride_dh + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offs_m[:, None] * N + offs_n[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if NEED_DWEIGHT:
            if CAST_FIRST:
                n = n.to(h.dtype).to(tl.float32)
            dweight += dy * n
    if NEED_DWEIGHT:
        tl.store(partial_ptr + pid * N + offs_n, tl.sum(dweight, axis=0), mask=in_row)


def _out_dtype(x: torch.Tensor, weight: torch.Tensor, cast_first: bool) -> torch.dtype:
    return torch.promote_types(x.dtype, weight.dtype) if cast_first else x.dtype


def _launch_fwd(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, offset: float, cast_first: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    rows, res = rows_of(x), None if residual is None else rows_of(residual)
    (m, n), y = rows.shape, x.new_empty(x.shape, dtype=_out_dtype(x, weight, cast_first))
    h = None if residual is None else x.new_empty(x.shape)
    block_m, block_n, num_warps = row_blocks(n)
    launch(
        _rms_norm_fwd_kernel,
        (cdiv(m, block_m),),
        rows,
        res,
        weight.contiguous(),
        y,
        h,
        rows.stride(0),
        0 if res is None else res.stride(0),
        m,
        eps,
        offset,
        N=n,
        HAS_RES=res is not None,
        CAST_FIRST=cast_first,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=num_warps,
    )
    return y, h


def _rms_norm_fwd(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, cast_first: bool) -> torch.Tensor:
    return _launch_fwd(x, None, weight, eps, offset, cast_first)[0]


def _add_rms_norm_fwd(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, cast_first: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return _launch_fwd(x, residual, weight, eps, offset, cast_first)


def _rms_norm_bwd(
    dy: torch.Tensor,
    dh: torch.Tensor | None,
    h: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float,
    cast_first: bool,
    need_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    grad, kept, extra = rows_of(dy), rows_of(h), None if dh is None else rows_of(dh)
    (m, n), dx = kept.shape, h.new_empty(h.shape)
    itemsize = sum(t.element_size() for t in (grad, kept, extra) if t is not None)
    programs, share, block_m, block_n, num_warps, stages = deal_rows(h.device, m, n, need_dweight, itemsize)
    partial = h.new_empty((programs, n), dtype=torch.float32) if need_dweight else None
    launch(
        _rms_norm_bwd_kernel,
        (programs,),
        grad,
        extra,
        kept,
        weight.contiguous(),
        dx,
        partial,
        grad.stride(0),
        0 if extra is None else extra.stride(0),
        kept.stride(0),
        m,
        eps,
        offset,
        share,
        N=n,
        HAS_DH=extra is not None,
        NEED_DWEIGHT=need_dweight,
        CAST_FIRST=cast_first,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        STEPS=steps_known_ahead(share, need_dweight),
        STAGES=stages,
        num_warps=num_warps,
    )
    return dx, weight.new_empty(0) if partial is None else sum_shares((partial, weight.dtype))[0]


_fwd_op = register(
    "rms_norm_fwd(Tensor x, Tensor weight, float eps, float offset, bool cast_first) -> Tensor",
    _rms_norm_fwd,
    lambda x, weight, eps, offset, cast_first: x.new_empty(x.shape, dtype=_out_dtype(x, weight, cast_first)),
)
_add_fwd_op = register(
    "add_rms_norm_fwd(Tensor x, Tensor residual, Tensor weight, float eps, float offset, bool cast_first)"
    " -> (Tensor y, Tensor h)",
    _add_rms_norm_fwd,
    lambda x, residual, weight, eps, offset, cast_first: (
        x.new_empty(x.shape, dtype=_out_dtype(x, weight, cast_first)),
        x.new_empty(x.shape),
    ),
)
_bwd_op = register(
    "rms_norm_bwd(Tensor dy, Tensor? dh, Tensor h, Tensor weight, float eps, float offset, bool cast_first,"
    " bool need_dweight) -> (Tensor dx, Tensor dweight)",
    _rms_norm_bwd,
    lambda dy, dh, h, weight, eps, offset, cast_first, need_dweight: (
        h.new_empty(h.shape),
        weight.new_empty(weight.shape if need_dweight else 0),
    ),
)


class _RMSNorm(torch.autograd.Function):
    """``rms_norm`` without a residual."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, cast_first: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings = eps, offset, cast_first
        y: torch.Tensor = _fwd_op(x, weight, eps, offset, cast_first)
        return y

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        need_dweight = ctx.needs_input_grad[1]
        dx, dweight = _bwd_op(dy, None, x, weight, *ctx.settings, need_dweight)
        return dx, dweight if need_dweight else None, None, None, None


class _AddRMSNorm(torch.autograd.Function):
    """``rms_norm`` with a residual: also returns the sum, and takes its gradient into the same kernel."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        offset: float,
        cast_first: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)  # an unused output costs neither a zero tensor nor its reading
        y, h = _add_fwd_op(x, residual, weight, eps, offset, cast_first)
        ctx.save_for_backward(h, weight)
        ctx.settings = eps, offset, cast_first
        return y, h

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dy: torch.Tensor | None, dh: torch.Tensor | None) -> Any:
        if dy is None:  # the norm's own output was not used
            return dh, dh, None, None, None, None
        h, weight = ctx.saved_tensors
        need_dweight = ctx.needs_input_grad[2]
        dx, dweight = _bwd_op(dy, dh, h, weight, *ctx.settings, need_dweight)
        return dx, dx, dweight if need_dweight else None, None, None, None


@overload
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = ...,
    *,
    offset: float = ...,
    residual: None = ...,
    rounding: Rounding = ...,
    impl: Impl | None = ...,
) -> torch.Tensor: ...
@overload
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = ...,
    *,
    offset: float = ...,
    residual: torch.Tensor,
    rounding: Rounding = ...,
    impl: Impl | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    residual: torch.Tensor | None = None,
    rounding: Rounding = "llama",
    impl: Impl | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Normalize the last dimension by its root mean square and scale it; see the module for maths and numerics.

    Args:
        x: ``(..., N)``, floating; any strides.
        weight: ``(N,)``, floating; its dtype may differ from ``x``'s.
        eps: added to the mean square.
        offset: added to the weight (1 for Gemma, whose weights are stored around zero).
        residual: same shape and dtype as ``x``; added to it before the norm.
        rounding: ``"llama"`` rounds before the weight is applied, ``"gemma"`` after.
        impl: ``"triton"``, ``"torch"``, or ``None`` for Triton on a GPU and PyTorch elsewhere.

    Returns:
        ``y`` of ``x``'s shape; its dtype is that of ``weight * x`` with ``"llama"`` and that of ``x`` with ``"gemma"``.
        With a residual ``(y, h)``, where ``h = x + residual`` has ``x``'s dtype.

    Raises:
        ValueError: shapes or devices do not fit, a row is wider than 16384 (Triton), or a choice does not exist.
        TypeError: a dtype is not floating, or ``residual``'s differs from ``x``'s.

    Example:
        >>> y, hidden = rms_norm(attention_out, norm.weight, norm.variance_epsilon, residual=hidden)
    """
    if rounding not in ("llama", "gemma"):
        raise ValueError(f'rms_norm: rounding is {rounding!r}; it must be "llama" or "gemma"')
    check_norm("rms_norm", x, weight, None, residual)
    if not use_triton(impl, x, weight):
        y, h = _ref(x, weight, eps, offset, residual, rounding)
        return y if residual is None else (y, h)
    check_width("rms_norm", x.shape[-1])
    cast_first = rounding == "llama"
    if residual is None:
        single: torch.Tensor = _RMSNorm.apply(x, weight, eps, offset, cast_first)
        return single
    both: tuple[torch.Tensor, torch.Tensor] = _AddRMSNorm.apply(x, residual, weight, eps, offset, cast_first)
    return both
