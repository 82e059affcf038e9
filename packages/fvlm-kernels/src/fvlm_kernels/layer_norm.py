"""Layer norm over the last dimension, with an optional bias and an optional fused residual addition.

Maths, row by row over N columns, with h = x + residual where a residual is given and h = x otherwise::

    mean = Σ h / N
    rstd = 1 / sqrt(Σ (h − mean)² / N + eps)
    n    = (h − mean) · rstd
    y    = weight · n + bias

Gradients, with g = dy · weight and dh the gradient of the returned h::

    dx      = rstd · (g − mean(g) − n · mean(g · n))  (+ dh);     the same for the residual
    dweight = Σ_rows dy · n
    dbias   = Σ_rows dy

Source: Ba, Kiros and Hinton, Layer Normalization, 2016, with the gradients worked out from it.

Numerics. h is rounded to x's dtype first, as ``residual + x`` in eager mode is; everything after it is computed and
accumulated in fp32 and rounded once, which is how ``torch.nn.LayerNorm`` (the vision towers of Qwen2-VL, Qwen3-VL,
SigLIP, CLIP and Llama 3.2) rounds on a GPU. The variance is taken around the mean, never as a difference of two large
sums. mean and rstd are recomputed in backward instead of being saved. Weight gradients are summed in fp32 by a fixed
number of programs over fixed rows, then over programs: two runs on one card give the same bits.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment, var-annotated"
# ruff: noqa: RUF005
# (for the kernels: Triton types its arguments and its growing tuples, and knows no starred ones)

from __future__ import annotations

from typing import Any, overload

import torch

from ._launch import Impl, cdiv, launch, rows_of, steps_known_ahead, use_triton
from ._library import first_derivative_only, register
from ._norms import check_norm, check_width, sum_shares
from ._row_pieces import deal_chunks, load_chunks, row_chunks
from ._triton import tl, triton


def _ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(y, h)`` of the module's maths in plain PyTorch; float64 stays float64."""
    h = x if residual is None else x + residual
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    wide_bias = None if bias is None else bias.to(wide.dtype)
    y = torch.nn.functional.layer_norm(wide, h.shape[-1:], weight.to(wide.dtype), wide_bias, eps)
    return y.to(out_dtype), h


@triton.jit
def _mean_and_rstd(
    pieces,
    eps,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Return mean and 1 / sqrt(variance + eps) of rows in pieces, each added up over threads once."""
    total = pieces[0].to(tl.float32)
    for c in tl.static_range(1, CHUNKS):
        total += pieces[c].to(tl.float32)
    mean = (tl.sum(total, axis=1) / N)[:, None]
    squares = tl.zeros_like(total)
    for c in tl.static_range(CHUNKS):
        centred = pieces[c].to(tl.float32) - mean
        if (c + 1) * CHUNK > N:
            centred = tl.where((c * CHUNK + tl.arange(0, CHUNK) < N)[None, :], centred, 0.0)
        squares += centred * centred
    return mean, tl.rsqrt(tl.sum(squares, axis=1) / N + eps)[:, None]


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr,
    res_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    h_ptr,
    stride_x,
    stride_res,
    M,
    eps,
    N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, CHUNK)
    pieces = load_chunks(x_ptr, stride_x, offs_m, M, N, CHUNK, CHUNKS)
    if HAS_RES:
        residuals = load_chunks(res_ptr, stride_res, offs_m, M, N, CHUNK, CHUNKS)
        added = ()
        for c in tl.static_range(CHUNKS):
            cols = c * CHUNK + offs_n
            h = (pieces[c].to(tl.float32) + residuals[c].to(tl.float32)).to(pieces[c].dtype)
            mask = (offs_m < M)[:, None] & (cols < N)[None, :]
            tl.store(h_ptr + offs_m[:, None] * N + cols[None, :], h, mask=mask)
            added = added + (h,)
        pieces = added
    mean, rstd = _mean_and_rstd(pieces, eps, N, CHUNK, CHUNKS)
    weights = load_chunks(weight_ptr, 0, offs_m, M, N, CHUNK, CHUNKS)
    if HAS_BIAS:
        biases = load_chunks(bias_ptr, 0, offs_m, M, N, CHUNK, CHUNKS)
    for c in tl.static_range(CHUNKS):
        cols = c * CHUNK + offs_n
        y = (pieces[c].to(tl.float32) - mean) * rstd * weights[c].to(tl.float32)
        if HAS_BIAS:
            y += biases[c].to(tl.float32)
        mask = (offs_m < M)[:, None] & (cols < N)[None, :]
        tl.store(y_ptr + offs_m[:, None] * N + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr,
    dh_ptr,
    h_ptr,
    weight_ptr,
    dx_ptr,
    partial_weight_ptr,
    partial_bias_ptr,
    stride_dy,
    stride_dh,
    stride_h,
    M,
    eps,
    steps,
    N: tl.constexpr,
    HAS_DH: tl.constexpr,
    NEED_DWEIGHT: tl.constexpr,
    NEED_DBIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    SUMMING: tl.constexpr = NEED_DWEIGHT or NEED_DBIAS
    offs_n = tl.arange(0, CHUNK)
    dweight = ()  # of each row of a block: rows are added up once
    dbias = ()
    for _ in tl.static_range(CHUNKS):
        dweight = dweight + (tl.zeros((BLOCK_M, CHUNK), dtype=tl.float32),)
        dbias = dbias + (tl.zeros((BLOCK_M, CHUNK), dtype=tl.float32),)
    pid = tl.program_id(0).to(tl.int64)
    first = pid * steps * BLOCK_M  # row, of this program's share
    if SUMMING:
        kept_weights = load_chunks(weight_ptr, 0, first + tl.arange(0, BLOCK_M), M, N, CHUNK, CHUNKS)
    # A loop that Triton pipelines: copies of the next rows to shared memory are under way while these are computed.
    # Rows loaded ahead into registers were no help: ptxas moves such loads down to where their values are needed.
    for step in tl.range(0, STEPS if STEPS > 0 else steps, num_stages=STAGES):
        offs_m = first + step * BLOCK_M + tl.arange(0, BLOCK_M)
        pieces = load_chunks(h_ptr, stride_h, offs_m, M, N, CHUNK, CHUNKS)
        grads = load_chunks(dy_ptr, stride_dy, offs_m, M, N, CHUNK, CHUNKS)
        if HAS_DH:
            extras = load_chunks(dh_ptr, stride_dh, offs_m, M, N, CHUNK, CHUNKS)
        weights = kept_weights if SUMMING else load_chunks(weight_ptr, 0, offs_m, M, N, CHUNK, CHUNKS)
        mean, rstd = _mean_and_rstd(pieces, eps, N, CHUNK, CHUNKS)
        total = tl.zeros((BLOCK_M, CHUNK), dtype=tl.float32)
        along = tl.zeros((BLOCK_M, CHUNK), dtype=tl.float32)
        for c in tl.static_range(CHUNKS):  # a gradient is zero where there is no column
            g = grads[c].to(tl.float32) * weights[c].to(tl.float32)
            total += g
            along += g * (pieces[c].to(tl.float32) - mean)
        # dx = rstd (g - mean(g) - n mean(g n)) with n = rstd (h - mean), as two multiplications with sums an element
        less = (tl.sum(total, axis=1) / N)[:, None] * rstd
        slope = (tl.sum(along, axis=1) / N)[:, None] * rstd * rstd * rstd
        more_dweight = ()
        more_dbias = ()
        for c in tl.static_range(CHUNKS):
            cols = c * CHUNK + offs_n
            mask = (offs_m < M)[:, None] & (cols < N)[None, :]
            centred = pieces[c].to(tl.float32) - mean
            dy = grads[c].to(tl.float32)
            g = dy * weights[c].to(tl.float32)
            dx = g * rstd - (centred * slope + less)
            if HAS_DH:
                dx += extras[c].to(tl.float32)
            tl.store(dx_ptr + offs_m[:, None] * N + cols[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
            more_dweight = more_dweight + (dweight[c] + dy * (centred * rstd) if NEED_DWEIGHT else dweight[c],)
            more_dbias = more_dbias + (dbias[c] + dy if NEED_DBIAS else dbias[c],)
        dweight = more_dweight
        dbias = more_dbias
    for c in tl.static_range(CHUNKS):
        cols = c * CHUNK + offs_n
        if NEED_DWEIGHT:
            tl.store(partial_weight_ptr + pid * N + cols, tl.sum(dweight[c], axis=0), mask=cols < N)
        if NEED_DBIAS:
            tl.store(partial_bias_ptr + pid * N + cols, tl.sum(dbias[c], axis=0), mask=cols < N)


def _launch_fwd(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    rows, res = rows_of(x), None if residual is None else rows_of(residual)
    (m, n), y = rows.shape, x.new_empty(x.shape, dtype=out_dtype)
    h = None if residual is None else x.new_empty(x.shape)
    block_m, chunk, chunks, num_warps = row_chunks(n)
    launch(
        _layer_norm_fwd_kernel,
        (cdiv(m, block_m),),
        rows,
        res,
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        y,
        h,
        rows.stride(0),
        0 if res is None else res.stride(0),
        m,
        eps,
        N=n,
        HAS_BIAS=bias is not None,
        HAS_RES=res is not None,
        BLOCK_M=block_m,
        CHUNK=chunk,
        CHUNKS=chunks,
        num_warps=num_warps,
    )
    return y, h


def _layer_norm_fwd(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, out_dtype: torch.dtype
) -> torch.Tensor:
    return _launch_fwd(x, None, weight, bias, eps, out_dtype)[0]


def _add_layer_norm_fwd(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return _launch_fwd(x, residual, weight, bias, eps, out_dtype)


def _layer_norm_bwd(
    dy: torch.Tensor,
    dh: torch.Tensor | None,
    h: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    need_dweight: bool,
    need_dbias: bool,
    bias_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad, kept, extra = rows_of(dy), rows_of(h), None if dh is None else rows_of(dh)
    (m, n), dx = kept.shape, h.new_empty(h.shape)
    summing = need_dweight or need_dbias
    deal = deal_chunks(h.device, m, n, summing, sum(t.element_size() for t in (grad, kept, extra) if t is not None))
    programs = deal.programs
    partial_weight = h.new_empty((programs if need_dweight else 0, n), dtype=torch.float32)
    partial_bias = h.new_empty((programs if need_dbias else 0, n), dtype=torch.float32)
    launch(
        _layer_norm_bwd_kernel,
        (programs,),
        grad,
        extra,
        kept,
        weight.contiguous(),
        dx,
        partial_weight,
        partial_bias,
        grad.stride(0),
        0 if extra is None else extra.stride(0),
        kept.stride(0),
        m,
        eps,
        deal.steps,
        N=n,
        HAS_DH=extra is not None,
        NEED_DWEIGHT=need_dweight,
        NEED_DBIAS=need_dbias,
        BLOCK_M=deal.block_m,
        CHUNK=deal.chunk,
        CHUNKS=deal.chunks,
        STEPS=steps_known_ahead(deal.steps, summing),
        STAGES=deal.stages,
        num_warps=deal.num_warps,
    )
    parts = [(partial_weight, weight.dtype)] * need_dweight + [(partial_bias, bias_dtype)] * need_dbias
    made = iter(sum_shares(*parts) if parts else ())
    dweight = next(made) if need_dweight else weight.new_empty(0)
    dbias = next(made) if need_dbias else weight.new_empty(0, dtype=bias_dtype)
    return dx, dweight, dbias


_fwd_op = register(
    "layer_norm_fwd(Tensor x, Tensor weight, Tensor? bias, float eps, ScalarType out_dtype) -> Tensor",
    _layer_norm_fwd,
    lambda x, weight, bias, eps, out_dtype: x.new_empty(x.shape, dtype=out_dtype),
)
_add_fwd_op = register(
    "add_layer_norm_fwd(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps, ScalarType out_dtype)"
    " -> (Tensor y, Tensor h)",
    _add_layer_norm_fwd,
    lambda x, residual, weight, bias, eps, out_dtype: (x.new_empty(x.shape, dtype=out_dtype), x.new_empty(x.shape)),
)
_bwd_op = register(
    "layer_norm_bwd(Tensor dy, Tensor? dh, Tensor h, Tensor weight, float eps, bool need_dweight, bool need_dbias,"
    " ScalarType bias_dtype) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _layer_norm_bwd,
    lambda dy, dh, h, weight, eps, need_dweight, need_dbias, bias_dtype: (
        h.new_empty(h.shape),
        weight.new_empty(weight.shape if need_dweight else 0),
        weight.new_empty(weight.shape if need_dbias else 0, dtype=bias_dtype),
    ),
)


class _LayerNorm(torch.autograd.Function):
    """``layer_norm`` with or without a residual; returns ``(y, h)``, ``h`` being ``None`` without one."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        eps: float,
        out_dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.set_materialize_grads(False)  # an unused output costs neither a zero tensor nor its reading
        if residual is None:
            y, h = _fwd_op(x, weight, bias, eps, out_dtype), None
        else:
            y, h = _add_fwd_op(x, residual, weight, bias, eps, out_dtype)
        ctx.save_for_backward(x if h is None else h, weight)
        ctx.eps = eps
        ctx.bias_dtype = weight.dtype if bias is None else bias.dtype
        return y, h

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dy: torch.Tensor | None, dh: torch.Tensor | None) -> Any:
        if dy is None:  # the norm's own output was not used
            return dh, dh, None, None, None, None
        h, weight = ctx.saved_tensors
        _, need_residual, need_dweight, need_dbias, _, _ = ctx.needs_input_grad
        dx, dweight, dbias = _bwd_op(dy, dh, h, weight, ctx.eps, need_dweight, need_dbias, ctx.bias_dtype)
        return (
            dx,
            dx if need_residual else None,
            dweight if need_dweight else None,
            dbias if need_dbias else None,
            None,
            None,
        )


@overload
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = ...,
    eps: float = ...,
    *,
    residual: None = ...,
    out_dtype: torch.dtype | None = ...,
    impl: Impl | None = ...,
) -> torch.Tensor: ...
@overload
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = ...,
    eps: float = ...,
    *,
    residual: torch.Tensor,
    out_dtype: torch.dtype | None = ...,
    impl: Impl | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    impl: Impl | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Normalize the last dimension to mean 0 and variance 1, scale and shift it; see the module for the maths.

    Args:
        x: ``(..., N)``, floating; any strides.
        weight: ``(N,)``, floating; its dtype may differ from ``x``'s.
        bias: ``(N,)``, floating, or ``None``.
        eps: added to the variance.
        residual: same shape and dtype as ``x``; added to it before the norm.
        out_dtype: of ``y``; ``None`` for ``x``'s, or fp32 under CUDA autocast, as ``torch.nn.functional.layer_norm``
            gives there.
        impl: ``"triton"``, ``"torch"``, or ``None`` for Triton on a GPU and PyTorch elsewhere.

    Returns:
        ``y`` of ``x``'s shape and of ``out_dtype``.
        With a residual ``(y, h)``, where ``h = x + residual`` has ``x``'s dtype.

    Raises:
        ValueError: shapes or devices do not fit, or a row is wider than 16384 (Triton).
        TypeError: a dtype is not floating, or ``residual``'s differs from ``x``'s.

    Example:
        >>> y, hidden = layer_norm(attention_out, norm.weight, norm.bias, norm.eps, residual=hidden)
    """
    check_norm("layer_norm", x, weight, bias, residual)
    if out_dtype is None:
        out_dtype = torch.float32 if x.is_cuda and torch.is_autocast_enabled("cuda") else x.dtype
    if not use_triton(impl, x, weight, bias):
        y, h = _ref(x, weight, bias, eps, residual, out_dtype)
        return y if residual is None else (y, h)
    check_width("layer_norm", x.shape[-1])
    y, h = _LayerNorm.apply(x, residual, weight, bias, eps, out_dtype)
    return y if residual is None else (y, h)
