"""What the cross entropies refuse, each in one sentence."""

from __future__ import annotations

import math

import torch

from ._launch import check_floating, check_same_device, check_shape


def check_options(
    op: str, reduction: str, num_items: float | torch.Tensor | None, softcap: float | None, device: torch.device
) -> None:
    """Raise a one-sentence error unless the options of a loss fit each other."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'{op}: reduction is {reduction!r}; it must be "mean", "sum" or "none"')
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"{op}: softcap is {softcap}; it must be a positive number, or None for no cap")
    if num_items is None:
        return
    if reduction != "mean":
        raise ValueError(f'{op}: num_items is given with reduction={reduction!r}; it divides the "mean" alone')
    if not isinstance(num_items, torch.Tensor):
        if not num_items >= 0:
            raise ValueError(f"{op}: num_items is {num_items}; it must not be negative")
    elif num_items.dim() != 0 or num_items.device not in (device, torch.device("cpu")):
        raise ValueError(
            f"{op}: num_items has shape {tuple(num_items.shape)} on {num_items.device}; it must be a number or a 0-d "
            f"tensor on {device} or the CPU"
        )


def check_labels(
    op: str, labels: torch.Tensor, shape: torch.Size, classes: int, ignore_index: int, device: torch.device
) -> None:
    """Raise a one-sentence error unless the labels fit logits of ``(*shape, classes)``.

    Values are looked at where that costs no synchronization: on the CPU, and not while a graph is traced.
    """
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: labels have dtype {labels.dtype}; they must be int64 or int32")
    check_shape(op, "labels", labels, shape)
    if labels.device.type != "cpu":
        if labels.device != device:
            raise ValueError(f"{op}: labels are on {labels.device}; they must be on {device} or the CPU")
    elif not torch.compiler.is_compiling():
        wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= classes))]
        if wrong.numel():
            allowed = f"they must lie in [0, {classes}) or be ignore_index, {ignore_index}"
            raise ValueError(f"{op}: labels hold {wrong[0].item()}; {allowed}")


def check_scored(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise a one-sentence error unless tensors are floating, on one device, and have a last dimension."""
    check_floating(op, **tensors)
    check_same_device(op, **tensors)
    for name, tensor in tensors.items():
        if tensor is not None and (tensor.dim() == 0 or tensor.shape[-1] == 0):
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; its last dimension must not be empty")
