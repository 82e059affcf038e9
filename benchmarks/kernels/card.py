"""What a row of results must say about where it was measured, and the ceilings of that card."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from benchmarks.kernels.clock import Clock

ROOT = Path(__file__).resolve().parents[2]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str:
    """Return the commit of the working tree, ``+`` where it has changes, ``unknown`` where there is no history."""
    try:
        name = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.strip()
        changes = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown"
    return name + ("+" if changes else "")


def provenance(device: torch.device, at: str | None) -> dict[str, str | None]:
    """Return commit, card, versions and time for a row; ``at`` names the commit where it cannot be asked for."""
    return {
        "commit": at or commit(),
        "card": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "liger": _version("liger-kernel"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def append_row(row: dict[str, Any], out: Path | None) -> None:
    """Append a row to a file of results, where one is asked for."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _best(clock: Clock, call: Callable[[], Any], repeats: int = 15) -> float:
    reads = []
    for _ in range(repeats):
        reads.append(clock.start(call))
    clock.sync()
    return min(read() for read in reads)


def ceilings(clock: Clock, tiny: bool) -> dict[str, float]:
    """Measure the card: bytes a second of a large copy, read and written, and flop a second of a large bf16 product."""
    n = 2**20 if tiny else 2**30
    source, target = (
        torch.ones(n, dtype=torch.uint8, device=clock.device),
        torch.empty(n, dtype=torch.uint8, device=clock.device),
    )
    side = 64 if tiny else 8192
    a = torch.randn(side, side, device=clock.device).bfloat16()
    b = torch.randn(side, side, device=clock.device).bfloat16()
    return {
        "bytes": 2 * n / _best(clock, lambda: target.copy_(source)),
        "flops": 2 * side**3 / _best(clock, lambda: a @ b),
    }
