"""Where a model's modules go."""

from __future__ import annotations

import logging
import os
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from fvlm_core.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

logger = logging.getLogger(__name__)

_STRATEGIES = ("sequential", "auto", "balanced", "balanced_low_0")


def main_device(device_map: Any) -> torch.device:
    """The device that computes the first layer: what decides the dtype of a model placed by ``device_map``."""
    import torch

    if isinstance(device_map, dict):
        device_map = next(iter(device_map.values()), "cpu")
        device_map = "cpu" if device_map == "disk" else device_map
    if isinstance(device_map, str) and device_map in _STRATEGIES:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cuda", device_map) if isinstance(device_map, int) else torch.device(device_map)


def choose_device_map(device_map: Any) -> Any:
    """What `transformers` is given for the user's ``device_map``.

    * A strategy (``"sequential"``, ``"auto"``, ``"balanced"``, ``"balanced_low_0"``) or None means the CPU where there
      is no GPU; the process's own GPU under torchrun, where every process holds a whole model; and the strategy itself
      otherwise (None: ``"sequential"``).
    * A device, its name or number, and a dictionary from module names to devices, are taken as they are.

    Raises:
        ConfigError: it is none of these, or names a GPU that is not there.
    """
    import torch

    if device_map is None or (isinstance(device_map, str) and device_map in _STRATEGIES):
        if not torch.cuda.is_available():
            return {"": "cpu"}
        if "LOCAL_RANK" in os.environ:
            return {"": _local_rank()}
        return device_map or "sequential"
    if isinstance(device_map, dict):
        if not device_map:
            raise ConfigError("device_map={} places nothing: pass 'sequential', a device, or {'': device}.")
        for device in device_map.values():
            _check_device(device, device_map)
        return device_map
    return {"": _check_device(device_map, device_map)}


def check_places(device_map: dict[str, Any], model: nn.Module) -> None:
    """Check that a dictionary of places names parts of a model, and places all of it.

    transformers takes it without a look: what no entry names would stay on the CPU, whatever a misspelt one says.

    Args:
        device_map: names of modules or parameters, ``""`` for the whole, to devices.
        model: the model, with or without memory for its weights.

    Raises:
        ConfigError: an entry names nothing in the model, or something of it has no place.
    """
    names = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    for entry in device_map:
        if entry not in names:
            near = get_close_matches(str(entry), names, n=1)
            hint = f"the nearest name is {near[0]!r}" if near else "pass names of modules, or '' for the whole model"
            raise ConfigError(f"device_map={device_map!r} places {entry!r}, which the model does not have: {hint}.")
    places = tuple(f"{entry}." if entry else "" for entry in device_map)
    for name, _ in (*model.named_parameters(), *model.named_buffers()):
        if not f"{name}.".startswith(places):
            raise ConfigError(
                f"device_map={device_map!r} has no place for {name!r}: add it, or its module, or '' for all the rest."
            )


def enter_device(placed: Any) -> None:
    """Make the GPU that a process of several has for itself its current one, and say so.

    torch starts every process on the first GPU: what is allocated without naming a device, by bitsandbytes or by a
    user's script, would pile up there. Nothing is done in a process that stands alone, or for a model elsewhere.

    Args:
        placed: what `choose_device_map` returned.
    """
    import torch

    device = placed.get("") if isinstance(placed, dict) and len(placed) == 1 else None
    index = device.index if isinstance(device, torch.device) else device
    if "LOCAL_RANK" not in os.environ or not isinstance(index, int):
        return
    torch.cuda.set_device(index)
    rank, world = os.environ.get("RANK", os.environ["LOCAL_RANK"]), os.environ.get("WORLD_SIZE", "?")
    logger.info("Process %s of %s: the whole model goes to cuda:%d.", rank, world, index)


def _local_rank() -> int:
    import torch

    text = os.environ["LOCAL_RANK"]
    if not text.isdecimal() or int(text) >= torch.cuda.device_count():
        raise ConfigError(
            f"LOCAL_RANK={text!r} (environment) names no GPU of the {torch.cuda.device_count()} here: "
            "start at most as many processes as there are GPUs."
        )
    return int(text)


def _check_device(device: Any, device_map: Any) -> Any:
    """``device`` as `transformers` takes it, if it exists."""
    import torch

    if device == "disk":
        return device
    try:
        # A bare number is a GPU's; a bool is an int to Python but no device to anyone.
        if isinstance(device, bool):
            raise TypeError
        found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except (RuntimeError, TypeError):
        raise ConfigError(
            f"device_map={device_map!r} is not understood: pass one of {', '.join(map(repr, _STRATEGIES))}, a device "
            "such as 'cuda:0' or 'cpu', or a dictionary from module names to devices."
        ) from None
    if found.type == "meta":
        raise ConfigError(f"device_map={device_map!r} names a device without memory: pass 'sequential', or a real one.")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device_map={device_map!r} names {found}, and there are {torch.cuda.device_count()} GPUs here: "
            "pass 'sequential', or a device that exists."
        )
    if found.type == "cuda" and found.index is None:
        return torch.device("cuda", _local_rank() if "LOCAL_RANK" in os.environ else torch.cuda.current_device())
    return found
