"""Self-contained HTML reports: one file, no network, readable in fifty years."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fvlm_cli.report.curve import loss_curve
    from fvlm_cli.report.quickstart import write_quickstart_report

__all__ = ["loss_curve", "write_quickstart_report"]

_HOME = {"loss_curve": "curve", "write_quickstart_report": "quickstart"}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
