"""How much device memory recordings may hold for what layers keep between their two passes."""

from __future__ import annotations

import logging

import torch

from fvlm_core.errors import ConfigError

logger = logging.getLogger(__name__)

_SPARE_SHARE = 0.1
_SPARE_BYTES = 1 << 30
_MARGIN = 1.5
"""How many times its own size a kept layer must find free: what runs beside it needs room as well."""

_FIRST_GUESS = 1 << 28
"""Bytes that a layer is taken to keep before one like it has."""
_PLANS = 4
"""How often a plan is made, the last one being to keep nothing."""


class Room:
    """Decides layer by layer whether what it computed may stay in memory for its backward pass.

    Args:
        budget: GiB of device memory that may be allocated in all; None: what is free, less a tenth of the device and
            one GiB, which longer batches and whatever else runs there may need. A process that
            ``torch.cuda.set_per_process_memory_fraction`` gave a share of the device has that for its device.

    Raises:
        ConfigError: the budget is not above 0.
    """

    def __init__(self, budget: float | None = None) -> None:
        if budget is not None and not budget > 0:
            raise ConfigError(f"memory_budget={budget!r} is no amount of memory: pass GiB above 0, or None.")
        self.budget = budget
        self.kept_bytes = 0
        self.most = float("inf")
        """How many bytes may be kept in all, whatever else seems free: less each time that memory ran out."""
        self._lowered = 0
        self._warned = False

    def left(self, device: torch.device) -> float:
        """Return how many bytes may still be held."""
        if device.type != "cuda":
            return float("inf") if self.budget is None else self.budget * 2**30 - self.allocated(device)
        free, share = _measured(device)
        if self.budget is not None:
            return min(self.budget * 2**30 - self.allocated(device), free)
        return free - _SPARE_SHARE * share - _SPARE_BYTES

    def allocated(self, device: torch.device) -> int:
        """Return how many bytes are allocated; without a GPU, what layers keep."""
        return torch.cuda.memory_allocated(device) if device.type == "cuda" else self.kept_bytes

    def free(self, device: torch.device) -> float:
        """Return how many bytes can be allocated, whatever the budget is; there is no end to them without a GPU."""
        return _measured(device)[0] if device.type == "cuda" else float("inf")

    def allows(self, size: float, device: torch.device) -> bool:
        """Tell whether there is memory for a layer to run that would keep ``size`` bytes."""
        return _MARGIN * size <= self.free(device)

    def taken_since(self, before: int, device: torch.device) -> int:
        """Return what a layer keeps, ``before`` bytes having been allocated before it ran; without a GPU, one MiB."""
        return max(self.allocated(device) - before, 1) if device.type == "cuda" else 1 << 20

    def has_for(self, size: int, device: torch.device, beside: int = 0) -> bool:
        """Tell whether a layer may be kept.

        Args:
            size: how many bytes it will keep; 0: none like it has been kept yet.
            device: where it is.
            beside: how many bytes more will be needed meanwhile.
        """
        size = size or _FIRST_GUESS
        return self.kept_bytes + size <= self.most and _MARGIN * size + beside <= self.left(device)

    def close(self) -> None:
        """Note that memory ran out in a layer that was to be kept: nothing more is from now on."""
        self.most = self.kept_bytes

    def describe(self, device: torch.device) -> str:
        """Say why there is no more room."""
        if self.kept_bytes and self.most < float("inf"):
            return f"of {self.most / 2**30:.2f} GiB that may be kept since memory ran short"
        plan = "a tenth of the device and 1 GiB stay free" if self.budget is None else f"memory_budget={self.budget}"
        return f"{plan}, {self.allocated(device) / 2**30:.2f} GiB are allocated"

    def warn(self, device: torch.device) -> None:
        """Say once that the budget cannot be kept to, where it is used up although no layer keeps anything."""
        if self.budget is None or self.kept_bytes or self._warned or self.allocated(device) < self.budget * 2**30:
            return
        self._warned = True
        logger.warning(
            "memory_budget=%s is exceeded while no layer keeps anything (%.2f GiB are allocated): it can only spare "
            "what layers would keep, so raise it, or make the batches smaller.",
            self.budget,
            self.allocated(device) / 2**30,
        )

    def lower(self) -> None:
        """Note that memory ran out, and that nothing is kept now: half as much may be from now on, and at last nothing.

        Plans are made anew a few times only, since each time all layers are recorded again.
        """
        self._lowered += 1
        self.most = self.kept_bytes // 2 if self._lowered < _PLANS else 0
        self.kept_bytes = 0


def _measured(device: torch.device) -> tuple[float, float]:
    """Return how many bytes of a GPU this process can allocate, and how many it may take in all."""
    unused, total = torch.cuda.mem_get_info(device)  # a call of the driver, which layers that are not recorded wait for
    share = torch.cuda.get_per_process_memory_fraction(device) * total
    reserved = torch.cuda.memory_reserved(device)
    return min(unused, share - reserved) + reserved - torch.cuda.memory_allocated(device), share
