"""How much device memory recordings may hold for what layers keep between their two passes."""

from __future__ import annotations

import torch

from fvlm_core.errors import ConfigError

_SPARE_SHARE = 0.1
_SPARE_BYTES = 1 << 30
_MARGIN = 1.5
"""How many times its own size a kept layer must find free: what runs beside it needs room as well."""

_PLANS = 4
"""How often a plan is made, the last one being to keep nothing."""


class Room:
    """Decides layer by layer whether what it computed may stay in memory for its backward pass.

    Args:
        budget: GiB of device memory that may be allocated in all; None: what is free, less a tenth of the device and
            one GiB, which longer batches and whatever else runs there may need.

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

    def left(self, device: torch.device) -> float:
        """Return how many bytes may still be held."""
        if device.type != "cuda":
            return float("inf") if self.budget is None else self.budget * 2**30 - self.kept_bytes
        allocated = torch.cuda.memory_allocated(device)
        if self.budget is not None:
            return self.budget * 2**30 - allocated
        free, total = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - allocated
        return free + cached - _SPARE_SHARE * total - _SPARE_BYTES

    def has_for(self, size: int, device: torch.device) -> bool:
        """Tell whether a layer of ``size`` bytes may be kept."""
        return self.kept_bytes + size <= self.most and _MARGIN * size <= self.left(device)

    def lower(self) -> None:
        """Note that memory ran out, and that nothing is kept now: half as much may be from now on, and at last nothing.

        Plans are made anew a few times only, since each time all layers are recorded again.
        """
        self._lowered += 1
        self.most = self.kept_bytes // 2 if self._lowered < _PLANS else 0
        self.kept_bytes = 0
