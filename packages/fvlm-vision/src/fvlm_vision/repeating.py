"""The part of the trainer that outlives a batch too large for what layers keep: it trains on it once more.

Layers give memory back by themselves where they can (`fvlm_core.graphs`). What is left is memory that runs out
elsewhere: in the loss, between layers, or where an unrecorded layer computes again in the backward pass. Then the whole
micro-batch is repeated, with the same dropout, on top of the gradients that the micro-batches before it left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType

from fvlm_core.checkpointing import checkpointing_mode, graphs_of
from fvlm_core.errors import ResourceError
from fvlm_core.repeat import RandomState, once_more
from fvlm_vision.stepping import SteppingTrainer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fvlm_core.graphs import LayerGraphs
    from fvlm_vision.flat_optimizer import FlatOptimizer

MOST_COPIED = 1 << 30
"""Bytes of gradients that are copied before a micro-batch that adds to them, beside those that lie in flat ones."""


class RepeatingTrainer(SteppingTrainer):
    """A trainer that repeats a micro-batch where memory ran out, once layers have given back what they kept."""

    _counts: dict[str, list[torch.Tensor]]

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Run a micro-batch forward and backward; return its loss.

        Raises:
            ResourceError: it does not fit into memory.
        """
        step: Callable[..., Any] = super().training_step
        return self._repeated(lambda: step(model, inputs, *args, **kwargs), inputs, trains=True)

    def prediction_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Evaluate a batch.

        Raises:
            ResourceError: it does not fit into memory.
        """
        step: Callable[..., Any] = super().prediction_step
        return self._repeated(lambda: step(model, inputs, *args, **kwargs), inputs, trains=False)

    def _repeated(self, work: Callable[[], Any], inputs: dict[str, Any], trains: bool) -> Any:
        graphs = graphs_of(self.model) if self.model is not None else None
        start = None
        if graphs is not None and graphs.may_hold and self._alone:
            parameters = self._trained() if trains else []
            start = once_more(lambda: Start(parameters, self._counts[self._mode()], self._flat), graphs.give_back)
        while True:
            try:
                return work()
            except torch.OutOfMemoryError as error:
                if start is None or graphs is None or not start.restorable or not graphs.keep_less():
                    if self.args.auto_find_batch_size:
                        raise  # accelerate waits for it
                    raise self._too_large(inputs, trains, held=_holds(graphs)) from error
            start.restore()  # here nothing holds what the failed pass had made

    def _mode(self) -> str:
        return "train" if self.model is not None and self.model.training else "eval"

    @property
    def _alone(self) -> bool:
        """Whether no other process waits for this one's gradients, which would come twice."""
        return bool(self.accelerator.distributed_type == DistributedType.NO and self.args.n_gpu <= 1)

    def _trained(self) -> list[torch.nn.Parameter]:
        if self.optimizer is None:
            return [] if self.model is None else [p for p in self.model.parameters() if p.requires_grad]
        return [p for group in self.optimizer.param_groups for one in group["params"] for p in self.behind(one)]

    def _too_large(self, inputs: dict[str, Any], trains: bool, held: bool) -> ResourceError:
        ids = inputs.get("input_ids")
        size = " x ".join(map(str, ids.shape)) if isinstance(ids, torch.Tensor) else "unknown"
        place = f"step {self.state.global_step + 1}" if trains else "evaluation"
        remedy = (
            f"lower per_device_{'train' if trains else 'eval'}_batch_size or max_seq_length, make images smaller, or "
            "load in 4 bit"
        )
        if held:
            why = "gradients would be added twice" if self._alone else f"{self.args.world_size} processes work in step"
            remedy = (
                "use 'offload' instead of 'auto', or a lower memory_budget in from_pretrained, since the batch cannot "
                f"be repeated where {why}"
            )
        elif self.model is not None and checkpointing_mode(self.model) in (False, True):
            remedy = f"set use_gradient_checkpointing='offload', {remedy}"
        return ResourceError(
            f"memory of {self.accelerator.device} ran out in {place}, over a batch of {size} tokens: {remedy}."
        )


def _holds(graphs: LayerGraphs | None) -> bool:
    return graphs is not None and (graphs.holds or graphs.unrecorded.holds)


class Start:
    """What a micro-batch starts from: random numbers, the gradients so far, and what was counted.

    Args:
        parameters: those whose gradients it adds to.
        counts: a list that it appends to.
        flat: what holds most of them; None: nothing does.
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        counts: list[torch.Tensor],
        flat: FlatOptimizer | None = None,
    ) -> None:
        self._random = RandomState(p.device for p in parameters[:1])  # what lies on several devices keeps nothing
        self._counts, self._counted = counts, len(counts)
        self._without = [p for p in parameters if p.grad is None]
        self._flat = flat if len(self._without) < len(parameters) else None
        if self._flat is not None:
            self._flat.hold()
        grads = [p.grad for p in (parameters if flat is None else flat.alone) if p.grad is not None]
        self._made = [(g, g._version) for g in grads]
        self._copies: list[tuple[list[torch.Tensor], torch.Tensor]] | None = None
        if sum(g.nbytes for g in grads) <= MOST_COPIED and not any(g.is_sparse for g in grads):
            self._copies = _copied(grads)

    @property
    def restorable(self) -> bool:
        """Whether the gradients can be had as they were: copies are there, or nothing was added to them yet."""
        return self._copies is not None or all(g._version == version for g, version in self._made)

    def restore(self) -> None:
        """Put everything back."""
        self._random.restore()
        del self._counts[self._counted :]
        for parameter in self._without:
            parameter.grad = None
        if self._flat is not None:
            self._flat.put_back()
        for grads, flat in self._copies or ():
            parts = flat.split([g.numel() for g in grads])
            torch._foreach_copy_(grads, [part.view(g.shape) for part, g in zip(parts, grads, strict=True)])
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what records layers finds no memory that is cached elsewhere


def _copied(grads: list[torch.Tensor]) -> list[tuple[list[torch.Tensor], torch.Tensor]]:
    """Return the gradients of each dtype and device, and a copy of them in one piece: a launch or two for thousands."""
    groups: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for g in grads:
        groups.setdefault((g.dtype, g.device), []).append(g)
    return [(group, torch.cat([g.flatten() for g in group])) for group in groups.values()]
