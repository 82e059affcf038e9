"""The devices and the memory that are here."""

from __future__ import annotations

import os
import platform
from typing import Any


def machine() -> dict[str, Any]:
    """Return the host and its CUDA devices; memory is in bytes, None where the system does not say."""
    import torch

    devices = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        devices.append({"name": name, "capability": f"{major}.{minor}", "memory": total, "memory_free": free})
    host = {
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": _memory("MemTotal"),
        "memory_free": _memory("MemAvailable"),
    }
    return {"host": host, "devices": devices}


def _memory(name: str) -> int | None:
    """Return a line of Linux's /proc/meminfo in bytes."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                key, _, rest = line.partition(":")
                if key == name:
                    return int(rest.split()[0]) * 1024
    except FileNotFoundError:  # another system
        pass
    return None
