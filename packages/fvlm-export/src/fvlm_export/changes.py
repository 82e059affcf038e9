"""What an adapter does to one parameter, as arithmetic on the whole tensor.

A parameter's changes are applied in the order of the adapters, each to the result of those before it, in fp32 (fp64
when the result is being verified); the caller rounds once, at the end.

* LoRA (https://arxiv.org/abs/2106.09685): ``W + s·B·A`` with ``s = alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA
  (https://arxiv.org/abs/2312.03732).
* DoRA (https://arxiv.org/abs/2402.09353): ``m / ||W₀ + s·B·A|| · (W + s·B·A)``, one norm per output, with W₀ the
  parameter before any change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Protocol

import torch

# Elements of a block for each thread: fp32 temporaries that stay in a cache, and so few calls that threads which share
# an interpreter seldom wait for each other; on a GPU, enough to keep it busy
_CPU_BLOCK, _GPU_BLOCK = 1 << 21, 1 << 25


class Change(Protocol):
    """Something that an adapter does to one parameter."""

    def apply(self, value: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """Return the changed ``value``, in its dtype and on its device; ``base`` is the parameter before any change."""

    def rows(self, part: slice) -> Change | None:
        """Return what the change does to these rows (along the first axis); None: rows cannot be changed one by one."""


class Form(Enum):
    """How the product of the low-rank factors lies in the parameter.

    With A of shape (r, in) and B of shape (out, r) unless said otherwise.
    """

    LINEAR = auto()  # (out, in): torch.nn.Linear
    TRANSPOSED = auto()  # (in, out): transformers' Conv1D
    EMBEDDING = auto()  # (rows, dim): A (r, rows), B (dim, r)
    CONV = auto()  # (out, in, *kernel): A (r, in, *kernel), B (out, r, 1, …)
    EXPERTS_IN_OUT = auto()  # (experts, in, out): A (experts·r, in), B (out, r·experts)
    EXPERTS_OUT_IN = auto()  # (experts, out, in): the same factors


@dataclass(frozen=True)
class LowRank:
    """Adds ``scaling·B·A`` and, for DoRA, rescales every output to its trained magnitude.

    Attributes:
        a: the factor next to the input; shape as :class:`Form` says, any floating dtype and device.
        b: the factor next to the output.
        scaling: what multiplies their product.
        form: where the product goes.
        magnitude: DoRA's norms, one per output (per column of an embedding); None: plain LoRA.
        experts: how many experts the factors hold, for the two forms that have any.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    form: Form
    magnitude: torch.Tensor | None = None
    experts: int | None = None

    def delta(self, like: torch.Tensor) -> torch.Tensor:
        """Return ``scaling·B·A`` in the parameter's shape, dtype and device."""
        a, b = self.a.detach().to(like), self.b.detach().to(like)
        if self.form is Form.LINEAR:
            product = b @ a
        elif self.form is Form.TRANSPOSED or self.form is Form.EMBEDDING:
            product = (b @ a).T
        elif self.form is Form.CONV:
            product = b.flatten(1) @ a.flatten(1)
        else:
            count = like.shape[0]
            a = a.reshape(count, -1, a.shape[-1])
            b = b.reshape(b.shape[0], -1, count)
            order = "ore,eri->eio" if self.form is Form.EXPERTS_IN_OUT else "ore,eri->eoi"
            product = torch.einsum(order, b, a)
        scaled: torch.Tensor = product.reshape(like.shape) * self.scaling
        return scaled

    @property
    def is_plain(self) -> bool:
        """Whether it is LoRA on a linear layer, which needs one pass instead of three."""
        return self.form is Form.LINEAR and self.magnitude is None

    def add_to(self, value: torch.Tensor) -> torch.Tensor:
        """Change a value in place, if the change is plain."""
        return value.addmm_(self.b.detach().to(value), self.a.detach().to(value), alpha=self.scaling)

    def apply(self, value: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """Return the changed value."""
        if self.is_plain:
            return torch.addmm(value, self.b.detach().to(value), self.a.detach().to(value), alpha=self.scaling)
        delta = self.delta(base)
        if self.magnitude is None:
            return value + delta
        by_column = self.form is Form.TRANSPOSED or self.form is Form.EMBEDDING
        outputs = 1 if by_column else 0
        others = [dim for dim in range(base.ndim) if dim != outputs]
        norm = torch.linalg.vector_norm(base + delta, dim=others, keepdim=True)
        magnitude = self.magnitude.detach().to(value).reshape(norm.shape)
        rescaled: torch.Tensor = magnitude / norm * (value + delta)
        return rescaled

    def rows(self, part: slice) -> LowRank | None:
        """See :class:`Change`."""
        if self.form is Form.LINEAR or self.form is Form.CONV:
            magnitude = None if self.magnitude is None else self.magnitude.reshape(-1)[part]
            return replace(self, b=self.b[part], magnitude=magnitude)
        if self.magnitude is not None:
            return None  # a norm over all rows
        if self.form is Form.EMBEDDING:
            return replace(self, a=self.a[:, part])
        if self.form is Form.TRANSPOSED:
            return replace(self, a=self.a[:, part])
        return None if part.stop is None else self._experts(part)

    def _experts(self, part: slice) -> LowRank | None:
        if self.experts is None:
            return None
        a = self.a.reshape(self.experts, -1, self.a.shape[-1])[part]
        b = self.b.reshape(self.b.shape[0], -1, self.experts)[:, :, part]
        return replace(self, a=a.flatten(0, 1), b=b.flatten(1), experts=a.shape[0])


@dataclass(frozen=True)
class Replacement:
    """Puts a trained value in the parameter's place, whatever its shape (``modules_to_save``, biases, embeddings)."""

    tensor: torch.Tensor

    def apply(self, value: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """Return the trained value."""
        return self.tensor.detach().to(value)

    def rows(self, part: slice) -> Replacement:
        """See :class:`Change`."""
        return Replacement(self.tensor[part])


@dataclass(frozen=True)
class Rows:
    """Puts trained rows into an embedding (``trainable_token_indices``)."""

    index: torch.Tensor
    tensor: torch.Tensor

    def apply(self, value: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """Return the value with the rows replaced."""
        return value.index_copy(0, self.index.to(value.device), self.tensor.detach().to(value))

    def rows(self, part: slice) -> Rows:
        """See :class:`Change`."""
        inside = (self.index >= part.start) & (self.index < part.stop)
        return Rows(self.index[inside] - part.start, self.tensor[inside.to(self.tensor.device)])


@dataclass(frozen=True)
class Addition:
    """Adds ``scaling·tensor`` (``lora_bias``)."""

    tensor: torch.Tensor
    scaling: float

    def apply(self, value: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """Return the sum."""
        return value + self.tensor.detach().to(value) * self.scaling

    def rows(self, part: slice) -> Addition:
        """See :class:`Change`."""
        return Addition(self.tensor[part], self.scaling)


def merge(base: torch.Tensor, changes: Sequence[Change], compute: torch.dtype) -> torch.Tensor:
    """Apply the changes to a parameter, computing in ``compute``.

    Args:
        base: the parameter, any floating dtype.
        changes: in the order of the adapters.
        compute: float32 to merge, float64 to verify.

    Returns:
        The merged parameter in ``compute``, on the base's device.
    """
    first = base.to(compute)
    if len(changes) == 1 and first is not base and isinstance(changes[0], LowRank) and changes[0].is_plain:
        return changes[0].add_to(first)  # nearly always; the copy is ours
    value = first
    for change in changes:
        value = change.apply(value, first)
    return value


def merge_rounded(
    base: torch.Tensor, changes: Sequence[Change], dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Merge in fp32 and round once, a block of rows at a time, so that no fp32 copy of the whole is ever made.

    Args:
        base: the parameter, any floating dtype.
        changes: in the order of the adapters.
        dtype: of the result.
        out: where the result goes, of the parameter's shape and the result's dtype; it may be the parameter itself.
            None: a new tensor.

    Returns:
        The merged parameter on the base's device.
    """
    shape = result_shape(tuple(base.shape), changes)
    if shape != tuple(base.shape) or not shape or any(change.rows(slice(0, 1)) is None for change in changes):
        return merge(base, changes, torch.float32).to(dtype)
    result = torch.empty(shape, dtype=dtype, device=base.device) if out is None else out
    block = _CPU_BLOCK * torch.get_num_threads() if base.device.type == "cpu" else _GPU_BLOCK
    step = max(1, block * shape[0] // max(1, base.numel()))
    for start in range(0, shape[0], step):
        part = slice(start, min(start + step, shape[0]))
        result[part] = merge(base[part], [cut for c in changes if (cut := c.rows(part)) is not None], torch.float32)
    return result


def result_shape(shape: tuple[int, ...], changes: Sequence[Change]) -> tuple[int, ...]:
    """Return the parameter's shape after the changes: a replacement may have grown an embedding."""
    for change in changes:
        if isinstance(change, Replacement):
            shape = tuple(change.tensor.shape)
    return shape
