"""The memory that recordings of one kind of layer and one shape share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from math import prod
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

from fvlm_kernels import AttentionResiduals

Key = tuple[Any, ...]
TOKEN_AXES = {"position_embeddings": -2, "position_ids": -1, "cache_position": -1}
"""Keyword arguments of a decoder layer that have a token axis, and which it is."""
_MASK = "attention_mask"


def is_square_mask(name: str, value: Any, tokens: int) -> bool:
    """Whether a keyword argument says of each token which tokens it sees, ``(rows, 1, tokens, tokens)``."""
    return name == _MASK and isinstance(value, Tensor) and value.dim() == 4 and value.shape[-2:] == (tokens, tokens)


def describe(kwargs: Mapping[str, Any], tokens: int | None, fixed: tuple[str, ...] = ()) -> Key | None:
    """Return what of a layer's keyword arguments a recording depends on.

    Args:
        kwargs: tensors, tuples of tensors, and plain values.
        tokens: the length that is going to be rounded up, or None: then shapes must match exactly.
        fixed: names of arguments without a token axis, whose shapes must match in any case.

    Returns:
        None where an argument is of another kind (such as a cache), or has no place to be rounded up.
    """
    parts: list[Any] = []
    for name, value in kwargs.items():
        if value is None or isinstance(value, bool | int | float | str):
            parts.append((name, value))
            continue
        tensors = value if isinstance(value, tuple | list) else (value,)
        for tensor in tensors:
            if not isinstance(tensor, Tensor) or tensor.requires_grad:
                return None
            shape = list(tensor.shape)
            if tokens is not None and is_square_mask(name, tensor, tokens):
                shape[-2:] = [-1, -1]
            elif tokens is not None and name not in fixed:
                axis = TOKEN_AXES.get(name)
                if axis is None or shape[axis] != tokens:
                    return None
                shape[axis] = -1
            parts.append((name, tuple(shape), tensor.dtype))
    return tuple(parts)


def can_round_up(kwargs: Mapping[str, Any], tokens: int) -> bool:
    """Tell whether all tensors among a layer's keyword arguments have a known token axis, or are a mask of tokens."""
    return all(
        name in TOKEN_AXES or is_square_mask(name, value, tokens)
        for name, value in kwargs.items()
        if not (value is None or isinstance(value, bool | int | float | str))
    )


class Arena:
    """The memory that all stages take theirs from.

    Only one layer is replayed at a time, what it reads is loaded before, and what it leaves is copied out at once. So
    the input of one stage may lie where another's lies: a run over many image sizes holds the memory of the largest.

    Attributes:
        loaded: of each role of a keyword argument where it was last copied to, and what in which version, without
            keeping that alive.
    """

    def __init__(self) -> None:
        self._largest: dict[Key, Tensor] = {}
        self.loaded: dict[str, tuple[Key, ref[Tensor], int]] = {}

    def room(self, role: str, like: Tensor, shape: Sequence[int]) -> Tensor:
        """Return memory of a shape, and of the dtype and device of ``like``.

        Args:
            role: what it is for; rooms of different roles do not overlap.
            like: a tensor.
            shape: of the room.
        """
        key, size = (role, like.dtype, like.device), prod(shape)
        held = self._largest.get(key)
        if held is None or held.numel() < size:
            held = self._largest[key] = like.new_zeros(size)
        return held[:size].view(tuple(shape))


class _Place(NamedTuple):
    """Where a tensor among the keyword arguments lies, which tells it from other places, and whether it is a mask."""

    role: str
    room: Tensor
    key: Key
    is_mask: bool


class Stage:
    """Fixed memory for the input, output, gradients and keyword arguments of a layer.

    Args:
        hidden: a hidden state ``(..., tokens, width)`` of the shape that is recorded, but for its token axis.
        kwargs: the layer's keyword arguments.
        tokens: how long the token axis is in the recording; at least as long as in ``hidden``. Where it is longer, what
            is behind the given tokens is filled with zeros: right for layers in which no token sees a later one.
        needs_dx: whether the input's gradient is wanted.
        arena: where its memory comes from.
    """

    def __init__(self, hidden: Tensor, kwargs: Mapping[str, Any], tokens: int, needs_dx: bool, arena: Arena) -> None:
        shape = (*hidden.shape[:-2], tokens, hidden.shape[-1])
        self.tokens, self.needs_dx, self._arena = tokens, needs_dx, arena
        self.x, self.y, self.dy = (arena.room(role, hidden, shape) for role in ("x", "y", "dy"))
        self.dx = arena.room("dx", hidden, shape) if needs_dx else None
        self._places: list[_Place] = []
        self.kwargs = {name: self._room_for(name, name, value, hidden.shape[-2]) for name, value in kwargs.items()}
        self._gradients: dict[Key, tuple[Tensor, list[Tensor]]] = {}

    def _room_for(self, name: str, role: str, value: Any, given: int) -> Any:
        if isinstance(value, tuple | list):
            return tuple(self._room_for(name, f"{role} {number}", part, given) for number, part in enumerate(value))
        if not isinstance(value, Tensor):
            return value
        shape, is_mask = list(value.shape), is_square_mask(name, value, given)
        if is_mask:
            shape[-2:] = [self.tokens, self.tokens]
        if name in TOKEN_AXES and shape[TOKEN_AXES[name]] == given:
            shape[TOKEN_AXES[name]] = self.tokens
        room = self._arena.room(f"argument {role}", value, shape)
        self._places.append(_Place(role, room, (room.data_ptr(), room.shape), is_mask))
        return room

    def load_arguments(self, values: tuple[Any, ...]) -> None:
        """Copy the tensors among keyword arguments, in the order of the first ones, unless they lie here already."""
        loaded = self._arena.loaded
        for (role, room, key, is_mask), value in zip(self._places, _tensors(values), strict=True):
            there, known, version = loaded.pop(role, (None, None, 0))
            now = 0 if value.is_inference() else value._version
            if there != key or known is None or known() is not value or version != now:
                (_fill_mask if is_mask else _fill)(room, value)
            loaded[role] = key, ref(value), now  # not where the copy failed

    def load(self, room: Tensor, value: Tensor) -> None:
        """Copy a hidden state or its gradient to its place."""
        given = value.shape[-2]
        if given == self.tokens:
            room.copy_(value)
        else:
            room.narrow(-2, 0, given).copy_(value)
            room.narrow(-2, given, self.tokens - given).zero_()

    def take(self, room: Tensor, given: int) -> Tensor:
        """Return a copy of the first tokens of what a replay left."""
        return room.narrow(-2, 0, given).clone(memory_format=torch.contiguous_format)

    def keep(self, made: Sequence[AttentionResiduals | None]) -> list[AttentionResiduals | None]:
        """Copy what attention gave to its place in the shared memory; return the places.

        Places keep the order of the strides, on which the next operator's copies depend. They are made when a layer is
        run before its first recording, so that no recording owns them.
        """
        placed: list[AttentionResiduals | None] = []
        for number, one in enumerate(made):
            if one is None:
                placed.append(None)
                continue
            out, logsumexp = self._place(f"out{number}", one.out), self._place(f"logsumexp{number}", one.logsumexp)
            placed.append(AttentionResiduals(one.backend, out, logsumexp))
        return placed

    def _place(self, role: str, value: Tensor) -> Tensor:
        flat = self._arena.room(role, value, (value.numel(),))
        place = flat.as_strided(value.shape, torch.empty_like(value, device="meta").stride())
        place.copy_(value)
        return place

    def gradients_for(self, parameters: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return one flat piece of memory for the gradients of parameters, and its parts in their shapes."""
        key = tuple((tuple(p.shape), p.dtype) for p in parameters)
        if key not in self._gradients:
            dtype = reduce(torch.promote_types, (p.dtype for p in parameters))  # autograd gives each its own again
            sizes = [p.numel() for p in parameters]
            flat = self._arena.room("gradients", self.x.new_empty(0, dtype=dtype), (sum(sizes),))
            views = [part.view(p.shape) for part, p in zip(flat.split(sizes), parameters, strict=True)]
            self._gradients[key] = flat, views
        return self._gradients[key]


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    """Yield the tensors among keyword arguments; other values are the same in all calls that a recording serves."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from value


def _fill_mask(room: Tensor, source: Tensor) -> None:
    """Copy a mask of tokens; the tokens behind see themselves alone, so that no softmax is over nothing."""
    given, room = source.shape[-1], room.data
    seen, unseen = (True, False) if room.dtype == torch.bool else (0.0, torch.finfo(room.dtype).min)
    room.fill_(unseen)
    room.diagonal(dim1=-2, dim2=-1)[..., given:].fill_(seen)
    room[..., :given, :given].copy_(source)


def _fill(room: Tensor, source: Tensor) -> None:
    for axis, (have, given) in enumerate(zip(room.shape, source.shape, strict=True)):
        if have != given:  # behind the given tokens lie older values, which are finite, and which nothing reads
            room = room.narrow(axis, 0, given)
    # Past autograd's count of changes: a kept layer's backward pass finds the values of its own forward pass here,
    # because they are loaded again before it.
    room.data.copy_(source)
