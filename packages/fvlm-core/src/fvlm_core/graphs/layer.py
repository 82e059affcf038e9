"""One layer's two recordings, and the autograd function that replays them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fvlm_core.fused.adapted import Adapted, adapted, substituted
from fvlm_core.graphs.stage import Stage
from fvlm_core.graphs.tape import Recorder, Tape
from fvlm_kernels import LoRALinear

Autocast = torch.dtype | None
"""The dtype of autocast where it is on."""


def linear_layers(module: nn.Module) -> list[nn.Module]:
    """Return the linear layers of a block, PEFT's wrappers in the place of what they wrap."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: list[nn.Module] = []

    def visit(parent: nn.Module) -> None:
        for child in parent.children():
            if isinstance(child, BaseTunerLayer | nn.Linear):
                found.append(child)
            else:
                visit(child)

    visit(module)
    return found


class LayerState:
    """What of a layer's state a recording depends on beside its shapes; compared before every replay.

    Args:
        module: the layer.
    """

    def __init__(self, module: nn.Module) -> None:
        self._linears = linear_layers(module)
        self.adapted = [adapted(linear) for linear in self._linears]
        inside = {id(p) for linear in self._linears for p in linear.parameters()}
        others = [p for p in module.parameters() if id(p) not in inside]
        self._others = [(p, p.requires_grad, p.data_ptr()) for p in others]
        biases = [one.layer.bias for one in self.adapted if one is not None and one.layer.bias is not None]
        adapters = [p for one in self.adapted if one is not None for p in (one.layer.a, one.layer.b) if p is not None]
        self.trained = [p for p in (*adapters, *biases, *others) if p.requires_grad]
        hooked = any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in module.modules())
        dropped = any(isinstance(m, nn.Dropout) and m.p > 0 and m.training for m in module.modules())
        self.recordable = None not in self.adapted and not hooked and not dropped

    def holds(self) -> bool:
        """Whether nothing has changed."""
        return all(one is not None and one.holds() for one in self.adapted) and all(
            p.requires_grad is flag and p.data_ptr() == place for p, flag, place in self._others
        )

    def pairs(self) -> Iterator[tuple[nn.Module, Adapted]]:
        """Yield each linear layer that has an adapter with what it is for the kernels."""
        for linear, one in zip(self._linears, self.adapted, strict=True):
            if one is not None and one.layer.a is not None:
                yield linear, one


class Copies:
    """Parameters in another dtype, at a place that stays; all recordings of a model share them."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}

    def of(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the place of a parameter's copy; whoever reads it fills it first."""
        key = (id(parameter), dtype)
        held = self._held.get(key)
        if held is None or held[0] is not parameter or held[1].requires_grad is not parameter.requires_grad:
            copy = torch.empty_like(parameter, dtype=dtype).detach().requires_grad_(parameter.requires_grad)
            held = self._held[key] = parameter, copy
        return held[1]


class RecordedLayer:
    """A layer for one stage.

    The adapters' matrices are cast to autocast's dtype once a pass, in one launch, instead of at each of their uses;
    their gradients are rounded to that dtype either way.

    Args:
        state: the layer's state.
        stage: the memory that it works on.
        call: runs the layer on ``(hidden, **kwargs)`` without checkpointing.
        recorder: makes the recordings.
        autocast: autocast's dtype, or None.
        copies: of adapters in autocast's dtype.
    """

    def __init__(
        self,
        state: LayerState,
        stage: Stage,
        call: Callable[..., Any],
        recorder: Recorder,
        autocast: Autocast,
        copies: Copies,
    ) -> None:
        self.state, self.stage, self.trained = state, stage, state.trained
        self._call, self._autocast, self._device = call, autocast, stage.x.device.type
        self._copies: dict[int, Tensor] = {}
        self._sources: list[Tensor] = []
        self._substitutes: dict[nn.Module, Adapted] = {}
        if autocast is not None:
            self._copy_adapters(autocast, copies)
        self._flat: Tensor | None = None
        self._views: list[Tensor] = []
        if self.trained:
            self._flat, self._views = stage.gradients_for(self.trained)
        self._forward_tape: Tape | None = None
        self._backward_tape: Tape | None = None
        self._recorder = recorder
        self._sizes = [p.numel() for p in self.trained]

    def _copy_adapters(self, dtype: torch.dtype, copies: Copies) -> None:
        for linear, one in self.state.pairs():
            a, b = one.layer.a, one.layer.b
            if a is None or b is None or a.dtype == dtype:
                continue
            cast_a, cast_b = copies.of(a, dtype), copies.of(b, dtype)
            self._copies |= {id(a): cast_a, id(b): cast_b}
            self._sources += [a, b]
            layer = LoRALinear(one.layer.base, cast_a, cast_b, one.layer.scaling, one.layer.bias, one.layer.dropout)
            self._substitutes[linear] = Adapted(layer, one.compute_dtype, one.holds)

    @contextmanager
    def _prepared(self) -> Iterator[None]:
        """Autocast without its cache of weights, whose entries would be recorded; adapters' copies in their place."""
        casting: AbstractContextManager[Any] = nullcontext()
        if self._autocast is not None:
            casting = torch.autocast(self._device, self._autocast, cache_enabled=False)
        with substituted(self._substitutes), casting:
            yield

    def _refresh(self) -> None:
        if self._copies:
            with torch.no_grad():
                torch._foreach_copy_([self._copies[id(p)] for p in self._sources], self._sources)

    def work_forward(self) -> None:
        """What is recorded as the forward pass."""
        self._refresh()
        with torch.no_grad(), self._prepared():
            self.stage.y.copy_(self._run(self.stage.x))

    def work_backward(self) -> None:
        """What is recorded as the backward pass: the forward pass again, and the gradients."""
        self._refresh()
        x = self.stage.x.detach().requires_grad_(self.stage.needs_dx)
        leaves = [self._copies.get(id(p), p) for p in self.trained]
        wanted = [x, *leaves] if self.stage.needs_dx else leaves
        with torch.enable_grad():
            with self._prepared():
                y = self._run(x)
            found = list(torch.autograd.grad(y, wanted, self.stage.dy, allow_unused=True))
        with torch.no_grad():
            if self.stage.needs_dx and self.stage.dx is not None:
                dx = found.pop(0)
                _put([self.stage.dx], [dx])
            if found:
                _put(self._views, found)

    def _run(self, x: Tensor) -> Tensor:
        out: Tensor = self._call(x, **self.stage.kwargs)
        return out

    @property
    def _has_gradients(self) -> bool:
        return self.stage.needs_dx or bool(self.trained)

    def warm_up(self) -> bool:
        """Run both passes once, so that everything is compiled before the first recording.

        Returns:
            Whether the layer is of the kind that can be recorded: one hidden state in, one of the same form out.
        """
        x = self.stage.x
        with torch.no_grad(), self._prepared():
            self._refresh()
            out: Any = self._call(x, **self.stage.kwargs)
        if not isinstance(out, Tensor) or out.shape != x.shape or out.dtype != x.dtype:
            return False
        self._recorder.warm_up(self.work_forward)
        if self._has_gradients:
            self._recorder.warm_up(self.work_backward)
        return True

    def record(self) -> None:
        """Record both passes."""
        self._forward_tape = self._recorder.record(self.work_forward)
        if self._has_gradients:
            self._backward_tape = self._recorder.record(self.work_backward)

    def forward(self, hidden: Tensor) -> Tensor:
        """Replay the forward pass."""
        stage = self.stage
        stage.load(stage.x, hidden)
        _replay(self._forward_tape)
        return stage.take(stage.y, hidden.shape[-2])

    def backward(self, hidden: Tensor, dy: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        """Replay the backward pass; return the gradients of the input and of the trained parameters."""
        stage = self.stage
        stage.load(stage.x, hidden)
        stage.load(stage.dy, dy)
        _replay(self._backward_tape)
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
    """A recorded layer in the autograd graph. Arguments: it, its keyword arguments, the input, its parameters."""

    @staticmethod
    def forward(ctx: Any, layer: RecordedLayer, values: tuple[Any, ...], hidden: Tensor, *trained: Tensor) -> Tensor:
        """Replay the forward pass; autograd keeps the input."""
        ctx.layer, ctx.values = layer, values
        ctx.save_for_backward(hidden)
        layer.stage.load_arguments(values)
        return layer.forward(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Replay the backward pass."""
        layer: RecordedLayer = ctx.layer
        (hidden,) = ctx.saved_tensors
        layer.stage.load_arguments(ctx.values)
        dx, parameters = layer.backward(hidden, grads[0])
        return None, None, dx, *parameters
