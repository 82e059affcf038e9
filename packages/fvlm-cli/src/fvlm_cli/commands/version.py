"""`fvlm version`: which versions are installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fvlm_cli.output import Output
from fvlm_cli.versions import versions

if TYPE_CHECKING:
    from rich.console import Console


def version(*, out: Output) -> None:
    """Print the versions of FVLM's packages and of what they build on."""
    found = versions()

    def show(console: Console) -> None:
        for name, number in found.items():
            console.print(f"{name:<16} {number or '(not installed)'}")

    out.result(found, show)
