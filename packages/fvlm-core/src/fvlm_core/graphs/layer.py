"""One layer's two recordings, and the autograd function that replays them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fvlm_core.graphs.leaves import Leaves
from fvlm_core.graphs.stage import Stage
from fvlm_core.graphs.state import Copies, LayerState
from fvlm_core.graphs.tape import Recorder, Tape
from fvlm_core.passes import LayerPass, running
from fvlm_core.repeat import once_more
from fvlm_kernels import AttentionResiduals

Autocast = torch.dtype | None
"""The dtype of autocast where it is on."""


class RecordedLayer:
    """A layer for one stage.

    Args:
        state: the layer's state.
        stage: the memory that it works on.
        call: runs the layer on ``(hidden, **kwargs)`` without checkpointing.
        recorder: makes the recordings.
        autocast: autocast's dtype, or None.
        copies: of adapters in autocast's dtype.
        keep_from: from how many keys on the attention's result is kept between the passes; None: it never is.
    """

    def __init__(
        self,
        state: LayerState,
        stage: Stage,
        call: Callable[..., Any],
        recorder: Recorder,
        autocast: Autocast,
        copies: Copies,
        keep_from: int | None = None,
    ) -> None:
        self.state, self.stage, self.trained = state, stage, state.trained
        self._call, self._autocast, self._device = call, autocast, stage.x.device.type
        self._leaves = Leaves(state, autocast, copies)
        self._flat: Tensor | None = None
        self._views: list[Tensor] = []
        if self.trained:
            self._flat, self._views = stage.gradients_for(self.trained)
        self._forward_tape: Tape | None = None
        self._backward_tape: Tape | None = None
        self._kept_backward_tape: Tape | None = None
        self._held: tuple[Tensor, Tensor] | None = None
        self.passes = 0
        """How often the forward pass was replayed; a kept layer holds what belongs to the last one."""
        self.kept_bytes = 0
        """How much it holds for that."""
        self._recorder, self._keep_from = recorder, keep_from if self.has_gradients else None
        self._attention: list[AttentionResiduals | None] = []
        """Where in the stage the results of attention lie that are kept between the passes."""
        self._sizes = [p.numel() for p in self.trained]
        self._released = False

    @contextmanager
    def _prepared(self) -> Iterator[None]:
        """Leaves in the parameters' place, and autocast without its cache of weights, which would be recorded."""
        casting: AbstractContextManager[Any] = nullcontext()
        if self._autocast is not None:
            casting = torch.autocast(self._device, self._autocast, cache_enabled=False)
        with self._leaves.in_place(), casting:
            yield

    def work_forward(self) -> None:
        """What is recorded as the forward pass."""
        self._leaves.refresh()
        first = LayerPass(False, [], self._keep_from)
        with torch.no_grad(), self._prepared(), running(first):
            self.stage.y.copy_(self._run(self.stage.x))
            self._attention = self.stage.keep(first.kept)

    def work_backward(self) -> None:
        """What is recorded as the backward pass: the forward pass again, but for what is known, and the gradients."""
        self._leaves.refresh()
        x = self.stage.x.detach().requires_grad_(self.stage.needs_dx)
        second = LayerPass(True, self._attention, self._keep_from)
        with torch.enable_grad(), self._prepared(), running(second):
            y = self._run(x)
        self._differentiate(x, y, keep=False)

    def work_forward_kept(self) -> None:
        """What is recorded as the forward pass of a layer that keeps what it computes, its own input included."""
        self._leaves.refresh()
        x = self.stage.x.clone().requires_grad_(self.stage.needs_dx)
        with torch.enable_grad(), self._prepared():
            y = self._run(x)
        self._held = x, y
        with torch.no_grad():
            self.stage.y.copy_(y)

    def work_backward_kept(self) -> None:
        """What is recorded as its backward pass; what it reads stays held, since the next replay fills it again."""
        if self._held is None:
            raise RuntimeError("a layer's backward pass is recorded before its forward pass")
        self._differentiate(*self._held, keep=True)

    def _differentiate(self, x: Tensor, y: Tensor, keep: bool) -> None:
        """Write the gradients of the input and of the trained parameters to the stage."""
        leaves = self._leaves.all
        wanted = [*([x] if self.stage.needs_dx else []), *leaves]
        found = list(torch.autograd.grad(y, wanted, self.stage.dy, allow_unused=True, retain_graph=keep))
        with torch.no_grad():
            if self.stage.needs_dx and self.stage.dx is not None:
                _put([self.stage.dx], [found.pop(0)])
            if leaves:
                _put(self._views, self._leaves.merged(found))

    def _run(self, x: Tensor) -> Tensor:
        out: Tensor = self._call(x, **self.stage.kwargs)
        return out

    @property
    def has_gradients(self) -> bool:
        """Whether a backward pass has anything to do."""
        return self.stage.needs_dx or bool(self.trained)

    def warm_up(self) -> bool:
        """Run both passes once, so that everything is compiled before the first recording.

        Returns:
            Whether the layer is of the kind that can be recorded: one hidden state in, one of the same form out.
        """
        x = self.stage.x
        with torch.no_grad(), self._prepared():
            self._leaves.refresh()
            out: Any = self._call(x, **self.stage.kwargs)
        if not isinstance(out, Tensor) or out.shape != x.shape or out.dtype != x.dtype:
            return False
        self._recorder.warm_up(self.work_forward)
        if self.has_gradients:
            self._recorder.warm_up(self.work_backward)
        return True

    def record(self, keep: bool) -> None:
        """Record both passes.

        Args:
            keep: whether what the forward pass computes stays in memory for the backward pass.
        """
        if keep and self.has_gradients:
            self._forward_tape = self._recorder.record(self.work_forward_kept)
            self._kept_backward_tape = self._recorder.record(self.work_backward_kept)
            self._keep_from, self._attention = None, []  # should it compute again after all, then from its input alone
            return
        self._forward_tape = self._recorder.record(self.work_forward)
        if self.has_gradients:
            self._backward_tape = self._recorder.record(self.work_backward)

    @property
    def kept(self) -> bool:
        """Whether it keeps what its forward pass computes."""
        return self._kept_backward_tape is not None

    def forward(self, hidden: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Replay the forward pass; return its result and what `backward` takes beside the input."""
        stage = self.stage
        stage.load(stage.x, hidden)
        _replay(self._forward_tape)
        self.passes += 1
        return stage.take(stage.y, hidden.shape[-2]), [place.clone() for place in self._places()]

    def _places(self) -> list[Tensor]:
        return [place for one in self._attention if one is not None for place in (one.out, one.logsumexp)]

    def backward_kept(self, dy: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        """Replay the backward pass of the last forward pass; see `backward`."""
        self.stage.load(self.stage.dy, dy)
        _replay(self._kept_backward_tape)
        return self._results(dy)

    def load_saved(self, hidden: Tensor, *kept: Tensor) -> None:
        """Put the input, and what `forward` returned beside the result, where `backward` finds them."""
        self.stage.load(self.stage.x, hidden)
        for place, value in zip(self._places(), kept, strict=True):
            place.copy_(value)

    def backward(self, dy: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        """Replay the backward pass of what was loaded; return the gradients of the input and of trained parameters."""
        self.stage.load(self.stage.dy, dy)
        if self._released:
            self.work_backward()
            return self._results(dy)
        if self._backward_tape is None:
            self._backward_tape = self._recorder.record(self.work_backward)
        _replay(self._backward_tape)
        return self._results(dy)

    def forget_kept(self) -> None:
        """Give up what was recorded of a layer that keeps what it computes, so that it can be recorded otherwise."""
        self._held = None
        self._forward_tape = self._kept_backward_tape = None

    def release(self) -> None:
        """Give up the recordings and the memory that they hold; a backward pass that is still due runs unrecorded."""
        self.forget_kept()
        self._released, self._backward_tape = True, None

    def _results(self, dy: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        stage = self.stage
        dx = None if stage.dx is None else stage.take(stage.dx, dy.shape[-2])
        if self._flat is None:
            return dx, []
        parts = self._flat.clone().split(self._sizes)
        return dx, [part.view(p.shape) for part, p in zip(parts, self.trained, strict=True)]


def _replay(tape: Tape | None) -> None:
    if tape is None:
        raise RuntimeError("a layer is replayed before it was recorded")
    tape.replay()


def _put(rooms: Sequence[Tensor], values: Sequence[Tensor | None]) -> None:
    given = [(room, value) for room, value in zip(rooms, values, strict=True) if value is not None]
    for room, value in zip(rooms, values, strict=True):
        if value is None:
            room.zero_()
    if given:
        torch._foreach_copy_([room for room, _ in given], [value for _, value in given])


class Replay(torch.autograd.Function):
    """A recorded layer in the autograd graph.

    Arguments: it, its keyword arguments, what gives memory back where it runs out, the input, its parameters.
    """

    @staticmethod
    def forward(
        ctx: Any,
        layer: RecordedLayer,
        values: tuple[Any, ...],
        give_back: Callable[[], bool],
        hidden: Tensor,
        *trained: Tensor,
    ) -> Tensor:
        """Replay the forward pass; autograd keeps the input, and what attention gave where the layer says so."""
        ctx.layer, ctx.values, ctx.give_back = layer, values, give_back
        layer.stage.load_arguments(values)
        out, kept = layer.forward(hidden)
        ctx.save_for_backward(hidden, *kept)
        ctx.number = layer.passes
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Replay the backward pass; if memory runs out, run it unrecorded once other layers have given theirs back."""
        dx, parameters = once_more(lambda: _gradients(ctx, grads[0]), ctx.give_back)
        return None, None, None, dx, *parameters


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, list[Tensor]]:
    """Replay a backward pass; of a layer that keeps nothing, or something newer by now, from its input."""
    layer: RecordedLayer = ctx.layer
    layer.stage.load_arguments(ctx.values)
    if layer.kept and ctx.number == layer.passes:
        return layer.backward_kept(dy)
    layer.load_saved(*ctx.saved_tensors)  # they may have come from the host: nothing holds them from here on
    return layer.backward(dy)
