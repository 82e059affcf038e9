"""Several processes, a GPU each: what a trainer's settings need for that, and what only one of them does."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from fvlm_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from trl import SFTConfig

NOTHING = float("-inf")
"""The loss of an evaluation batch with nothing to learn. No loss is below 0, and one that diverged must not hide it."""


def is_first_process() -> bool:
    """Tell whether this process is the first of those that torchrun or accelerate started, or stands alone."""
    return int(os.environ.get("RANK", "0")) == 0


def fit_processes(args: SFTConfig, model: nn.Module) -> None:
    """Set what training in several processes needs, where the user has not.

    Args:
        args: the trainer's own copy; changed in place.
        model: what is trained.

    Raises:
        ConfigError: a setting would tear batches apart, or the model lies on several devices.
    """
    from torch.nn.modules.batchnorm import _BatchNorm

    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        raise ConfigError(
            f"the model lies on {', '.join(devices)}, and each of the {args.world_size} processes needs a whole one on "
            "a GPU of its own: leave device_map out, or start one process."
        )
    reading: Any = args.accelerator_config
    if reading.dispatch_batches:
        raise ConfigError(
            "dispatch_batches=True in accelerator_config cannot be used: it cuts a batch by rows, and images do not "
            "lie in rows; leave it out, and every process reads its own samples."
        )
    reading.dispatch_batches = False  # its default for a stream is True
    if args.ddp_find_unused_parameters is None:
        # A batch without images gives the vision tower no gradients, on this process or on another.
        args.ddp_find_unused_parameters = True
    if args.ddp_broadcast_buffers is None:
        # Buffers are rotary frequencies and the like: equal everywhere, and sent before every forward pass otherwise.
        args.ddp_broadcast_buffers = any(isinstance(module, _BatchNorm) for module in model.modules())


def counting(gather: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that gathers as ``gather`` does, and leaves out losses that are `NOTHING`."""

    def gathered(values: Any, *args: Any, **kwargs: Any) -> Any:
        import torch

        found = gather(values, *args, **kwargs)
        if isinstance(found, torch.Tensor) and found.dim() == 1 and found.is_floating_point():
            return found[found != NOTHING]
        return found

    return gathered
