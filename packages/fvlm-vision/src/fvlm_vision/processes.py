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
    """Tell whether this process is the first of its process group, or of those that a launcher has just started.

    One that stands alone is the first.
    """
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank() == 0
    return int(os.environ.get("RANK", "0")) == 0


def refuse_sharding(args: SFTConfig) -> None:
    """Refuse what splits a model's weights among processes.

    Fused layers, recordings and a merge read whole weights at fixed places, and nothing here has been compared with a
    sharded run. transformers takes these settings on a CPU and ignores them.

    Raises:
        ConfigError: the arguments, or the environment that ``accelerate launch`` made, ask for it.
    """
    asked = {
        "fsdp": bool(args.fsdp) or _is_on("ACCELERATE_USE_FSDP"),
        "deepspeed": args.deepspeed is not None or _is_on("ACCELERATE_USE_DEEPSPEED"),
        "parallelism_config": args.parallelism_config is not None,
    }
    for name, is_asked in asked.items():
        if is_asked:
            raise ConfigError(
                f"{name} splits the weights among processes, which FVLM does not do: leave it out, so that each "
                "process has the model on its own GPU (4 bit makes it small), or start one process with "
                "device_map='balanced' for a model that fits no single one."
            )


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")


def check_world(args: SFTConfig) -> None:
    """Check that the arguments know of all processes; without a GPU, accelerate looks for none unless told to.

    Raises:
        ConfigError: each of several processes would train alone, on all rows.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != args.world_size:
        raise ConfigError(
            f"WORLD_SIZE={started} (environment), and the training arguments know of {args.world_size}: without a GPU "
            "several processes need use_cpu=True in them."
        )


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
