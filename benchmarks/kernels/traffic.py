"""Launches that move what an op moves, in the same shape of launch, and compute next to nothing: its floor."""

# mypy: allow-untyped-defs, disable-error-code="assignment, var-annotated"
# (for the kernels: Triton types its arguments and its growing tuples, and knows no starred ones)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fvlm_kernels._launch import cdiv, launch, next_power_of_two, steps_known_ahead
from fvlm_kernels._row_pieces import deal_chunks, load_chunks, row_chunks


@triton.jit
def _nothing_kernel(x_ptr):
    pass


def nothing(x: torch.Tensor, programs: int, warps: int = 4) -> None:
    """Launch programs that do nothing."""
    launch(_nothing_kernel, (programs,), x, num_warps=warps)


@triton.jit
def _rows_kernel(
    a_ptr,
    b_ptr,
    y_ptr,
    M,
    steps,
    N: tl.constexpr,
    TWO: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * steps * BLOCK_M
    for step in tl.range(0, STEPS if STEPS > 0 else steps, num_stages=STAGES):
        offs_m = first + step * BLOCK_M + tl.arange(0, BLOCK_M)
        pieces = load_chunks(a_ptr, N, offs_m, M, N, CHUNK, CHUNKS)
        others = load_chunks(b_ptr if TWO else a_ptr, N, offs_m, M, N, CHUNK, CHUNKS)
        for c in tl.static_range(CHUNKS):
            cols = c * CHUNK + tl.arange(0, CHUNK)
            mask = (offs_m < M)[:, None] & (cols < N)[None, :]
            y = pieces[c] + others[c] if TWO else pieces[c]
            tl.store(y_ptr + offs_m[:, None] * N + cols[None, :], y, mask=mask)


def norm_rows(x: torch.Tensor, dy: torch.Tensor | None = None, *, trained: bool = False) -> torch.Tensor:
    """Read and write what ``layer_norm`` does of contiguous rows: forward, or with ``dy`` its gradient."""
    (m, n), y = x.shape, torch.empty_like(x)
    if dy is None:
        block_m, chunk, chunks, warps = row_chunks(n)
        programs, steps, stages = cdiv(m, block_m), 1, 1
    else:
        deal = deal_chunks(x.device, m, n, trained, 2 * x.element_size())
        programs, steps, block_m, chunk, chunks, warps, stages = deal
    launch(
        _rows_kernel, (programs,), x, dy, y, m, steps, N=n, TWO=dy is not None, BLOCK_M=block_m, CHUNK=chunk,
        CHUNKS=chunks, STEPS=steps_known_ahead(steps, trained), STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return y


@triton.jit
def _tokens_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    Q: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    table = tl.load(cos_ptr + token * R + r, mask=r < R, other=0.0)
    table += tl.load(sin_ptr + token * R + r, mask=r < R, other=0.0)
    read = (tl.max(table, axis=0) > -1e30).to(tl.int32)  # always 1: what was read is needed
    offs = tl.arange(0, BLOCK)
    for start in tl.static_range(0, Q, BLOCK):
        x = tl.load(q_ptr + token * Q + start + offs, mask=start + offs < Q)
        tl.store(q_out_ptr + token * Q + start + offs, x, mask=start + offs < Q * read)
    for start in tl.static_range(0, K, BLOCK):
        x = tl.load(k_ptr + token * K + start + offs, mask=start + offs < K)
        tl.store(k_out_ptr + token * K + start + offs, x, mask=start + offs < K * read)


def tokens(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Read and write what ``rotary`` does of ``(B, S, H, D)`` laid out token by token: a program a token."""
    outs = torch.empty_like(q), torch.empty_like(k)
    channels_q, channels_k, table = q.shape[2] * q.shape[3], k.shape[2] * k.shape[3], cos.shape[-1]
    launch(
        _tokens_kernel, (q.shape[0] * q.shape[1],), q, k, cos, sin, *outs, Q=channels_q, K=channels_k, R=table,
        BLOCK=1024, BLOCK_R=next_power_of_two(table), num_warps=1 if q.shape[3] >= 256 else 4,
    )  # fmt: skip
    return outs


@triton.jit
def _words_kernel(words_ptr, absmax_ptr, y_ptr, n_words, WRITE: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(words_ptr + offs, mask=offs < n_words, other=0)
    words ^= tl.load(absmax_ptr + offs // 8, mask=offs < n_words, other=0).to(tl.int32)
    if WRITE:
        e = tl.arange(0, 8)
        values = (words[:, None] >> e[None, :]).to(tl.int16)
        tl.store(y_ptr + offs[:, None] * 8 + e[None, :], values, mask=(offs < n_words)[:, None])
    else:
        found = tl.max(words, axis=0)  # of any: what was read is needed
        tl.store(y_ptr + tl.program_id(0), found.to(tl.int16))


def words(packed: torch.Tensor, absmax: torch.Tensor, *, write: bool) -> torch.Tensor:
    """Read NF4 codes and their absmaxes; write 16 bits for each code, or no more than a number for each program."""
    codes, block = packed.view(torch.uint8).view(-1).view(torch.int32), 512
    programs = cdiv(codes.numel(), block)
    y = torch.empty(codes.numel() * 8 if write else programs, dtype=torch.int16, device=packed.device)
    launch(_words_kernel, (programs,), codes, absmax, y, codes.numel(), WRITE=write, BLOCK=block, num_warps=4)
    return y
