"""What every op does around its kernels: choose a backend, shape the launch, start it on the right device."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, Literal

import torch

from ._triton import HAS_TRITON, INTERPRETED

Impl = Literal["torch", "triton"]
"""How an op is computed; ``None`` stands for Triton on a GPU and the PyTorch reference elsewhere."""

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""The floating dtypes that the kernels read and write; all of them accumulate in fp32."""


def use_triton(impl: Impl | None, x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Decide whether an op runs its Triton kernels or its PyTorch reference.

    Args:
        impl: the caller's choice. ``None`` takes Triton where ``x`` lies on a GPU and the kernels take all dtypes, and
            the reference everywhere else (on the CPU, in float64).
        x: the op's main input; its device decides.
        others: further floating inputs, whose dtypes matter too; ``None`` passes.

    Raises:
        ValueError: ``impl`` is not one of the three, or Triton was asked for where it cannot run.
        TypeError: Triton was asked for with a dtype that the kernels do not take.
    """
    if impl == "torch":
        return False
    foreign = next((t.dtype for t in (x, *others) if t is not None and t.dtype not in KERNEL_DTYPES), None)
    if impl is None:
        return HAS_TRITON and x.is_cuda and foreign is None
    if impl != "triton":
        raise ValueError(f'impl is {impl!r}; it must be None, "torch" or "triton"')
    if not HAS_TRITON:
        raise ValueError('impl is "triton" but Triton is not installed; use impl="torch"')
    if foreign is not None:
        raise TypeError(
            f'impl is "triton" with {foreign}; the kernels take float32, float16 and bfloat16, use impl="torch"'
        )
    if not (x.is_cuda or (INTERPRETED and x.device.type == "cpu")):
        raise ValueError(
            f'impl is "triton" with a tensor on {x.device}; Triton needs a GPU, or TRITON_INTERPRET=1 set before it is '
            'imported, otherwise use impl="torch"'
        )
    return True


def next_power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least ``n`` (1 for ``n`` ≤ 1)."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """Return ``a / b`` rounded up, for positive ``b``."""
    return -(-a // b)


def row_blocks(n: int, tile: int = 4096, per_thread: int = 32, min_warps: int = 4) -> tuple[int, int, int]:
    """Shape the launch of a kernel in which one program holds whole rows in registers.

    Narrow rows (the 1024 to 1280 columns of vision towers, the 64 to 256 of head norms) share a program, so that every
    program moves about ``tile`` elements and reduces once for all of its rows. The answer depends on the width alone,
    never on the number of rows: a row's result is then the same in every batch, and few variants are compiled.

    Args:
        n: columns of a row.
        tile: elements that one program should hold.
        per_thread: elements that one thread should hold; fewer where a kernel keeps several tiles in registers.
        min_warps: warps of a program at least.

    Returns:
        ``(BLOCK_M, BLOCK_N, num_warps)``: rows and columns of a program's tile, both powers of two, and its warps.
    """
    block_n = next_power_of_two(n)
    block_m = max(1, tile // block_n)
    num_warps = min(16, max(min_warps, block_m * block_n // (32 * per_thread)))
    return block_m, block_n, num_warps


@lru_cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def persistent_programs(device: torch.device, blocks: int, per_processor: int = 2) -> int:
    """Return how many programs share ``blocks`` blocks of work when each keeps a partial sum of its own.

    Deterministic on a given card. The interpreter gets three, so that tests see programs with several blocks and ragged
    shares.
    """
    limit = _processors(device.index) * per_processor if device.type == "cuda" else 3
    return max(1, min(blocks, limit))


@lru_cache
def _shared_memory(index: int) -> int:
    return torch.cuda.get_device_properties(index).shared_memory_per_multiprocessor


def stages_for(device: torch.device, nbytes: int, per_processor: int) -> int:
    """Return the ``num_stages`` of a loop of persistent programs, ``per_processor`` of which share a multiprocessor.

    Two steps' loads of ``nbytes`` each are on their way while one is computed, or fewer where shared memory is short.
    """
    if device.type != "cuda":
        return 1
    room = _shared_memory(device.index) // per_processor - 2048  # for sums over warps, and what CUDA keeps itself
    return max(1, min(3, 1 + room // nbytes))


def steps_known_ahead(steps: int, summing: bool) -> int:
    """Return a loop's steps as a constant of the kernel, 0 where it may take them at run time.

    They are constant where there is one, and in the interpreter, whose ``range`` rejects others under NumPy 2.4.
    """
    return steps if INTERPRETED or not summing else 0


def without_autocast(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Return a context in which products keep the dtypes they are given, whatever autocast is on."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def on_device(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Return a context in which Triton launches on ``x``'s device (left alone, it launches on the current one)."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


def launch(kernel: Any, grid: tuple[int, ...], x: torch.Tensor, *args: Any, **meta: Any) -> None:
    """Start ``kernel`` over ``grid`` on the device of its first argument ``x``; an empty grid starts nothing.

    Products are contracted with sums unless ``meta`` says ``enable_fp_fusion=False``: it is said either way, because
    Triton 3.10 turns its default round.
    """
    if 0 in grid:
        return
    with on_device(x):
        kernel[grid](x, *args, **{"enable_fp_fusion": True, **meta})


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """View ``x`` of shape ``(..., N)``, N ≥ 1, as ``(M, N)`` with stride 1 along N, copying where no view can do it."""
    rows = x.reshape(x.numel() // x.shape[-1], x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def check_floating(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise a ``TypeError`` unless every tensor given has a floating dtype; ``None`` passes."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype}; it must be a floating dtype")


def check_same_device(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise a ``ValueError`` unless all tensors given lie on one device; ``None`` passes."""
    first: tuple[str, torch.device] | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first = name, tensor.device
        elif tensor.device != first[1]:
            raise ValueError(
                f"{op}: {name} is on {tensor.device} but {first[0]} on {first[1]}; move them to one device"
            )


def check_same_dtype(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise a ``TypeError`` unless all tensors given have one dtype; ``None`` passes."""
    first: tuple[str, torch.dtype] | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first = name, tensor.dtype
        elif tensor.dtype != first[1]:
            raise TypeError(f"{op}: {name} has {tensor.dtype} but {first[0]} has {first[1]}; cast one of them")


def check_shape(op: str, name: str, tensor: torch.Tensor | None, shape: Sequence[int]) -> None:
    """Raise a ``ValueError`` unless ``tensor`` (``None`` passes) has exactly the shape ``shape``."""
    if tensor is not None and tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; it must have shape {tuple(shape)}")
