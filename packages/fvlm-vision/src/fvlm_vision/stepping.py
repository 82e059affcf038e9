"""The part of the trainer that works around each step: optimizer, clipping, and what need not be done every time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel

from fvlm_core.arch import facts_for, task_model, tower_of
from fvlm_vision.flat_optimizer import FlatOptimizer
from fvlm_vision.loading import LoadingTrainer
from fvlm_vision.traversal import remembered


class SteppingTrainer(LoadingTrainer):
    """A trainer whose steps take the host little time, and wait for the device only where something is reported.

    See `FlatOptimizer` and `remembered`.
    """

    _flat: FlatOptimizer | None = None
    _parameter_count: int | None = None
    _filters_losses = False

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; what takes a walk through the whole model is done once, not in every step."""
        model: Any = self.model
        with remembered(model), self._filtering_losses():
            return super().train(*args, **kwargs)

    @contextmanager
    def _filtering_losses(self) -> Iterator[None]:
        """Take ``logging_nan_inf_filter`` over: transformers' own waits for the device in every micro-batch to ask."""
        self._filters_losses, self.args.logging_nan_inf_filter = self.args.logging_nan_inf_filter, False
        try:
            yield
        finally:
            self._filters_losses, self.args.logging_nan_inf_filter = False, self._filters_losses

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Run a micro-batch forward and backward; return its loss.

        Where the arguments ask for the filter, the mean of the losses since the last report stands for one that is no
        number, as in `transformers.Trainer`.
        """
        loss: Any = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[no-untyped-call]
        if not self._filters_losses:
            return loss
        mean = self._tr_loss / (1 + self.state.global_step - self._globalstep_last_logged)
        return torch.where(loss.isfinite(), loss, mean.to(loss))

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Estimate a batch's operations as `transformers.Trainer` does, counting the model's parameters once."""
        model: Any = self.model
        name = getattr(model, "main_input_name", "input_ids")
        if name not in inputs:
            return 0
        if self._parameter_count is None:
            self._parameter_count = int(model.num_parameters(exclude_embeddings=True))
        return 6 * int(inputs[name].numel()) * self._parameter_count

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer that the arguments ask for; over flat parameters where that gives the same values."""
        trained: Any = self.model if model is None else model
        if self.optimizer is not None or not self._can_be_flat(trained):
            return super().create_optimizer(model)
        kind, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, trained)
        if not FlatOptimizer.suits(kind, options):
            return super().create_optimizer(model)
        decayed = set(self.get_decay_parameter_names(trained))
        named = [(name, p) for name, p in trained.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for name, p in named if name in decayed], "weight_decay": self.args.weight_decay},
            {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0},
        ]
        facts = facts_for(trained)
        towers = {id(p): tower_of(name, facts) for name, p in task_model(trained).named_parameters()}
        self._flat = FlatOptimizer(kind, groups, options, together=lambda p: towers.get(id(p)))
        self.optimizer = self._flat.optimizer
        return self.optimizer

    def behind(self, parameter: torch.nn.Parameter) -> list[torch.nn.Parameter]:
        """Return the model's parameters that lie in one of the optimizer's: itself, or what a flat one was made of."""
        return [parameter] if self._flat is None else self._flat.behind(parameter)

    def _can_be_flat(self, model: Any) -> bool:
        """Adapters on a GPU, and nobody else who looks for gradients in the optimizer's parameters."""
        on_gpu = all(p.is_cuda for p in model.parameters() if p.requires_grad)
        return isinstance(model, PeftModel) and on_gpu and self.accelerator.scaler is None

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        """Clip the gradients; return their norm before."""
        if self._flat is None:
            return super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        return self._flat.clip(self.args.max_grad_norm)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """Return the gradients' norm, which is taken here where nothing is clipped."""
        if grad_norm is None and self._flat is not None:
            grad_norm = self._flat.clip(float("inf"))
        return super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
