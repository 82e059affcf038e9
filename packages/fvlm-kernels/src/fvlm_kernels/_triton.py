"""Triton where it is installed, and a stand-in elsewhere, so that the package imports on every platform.

Triton is published for Linux alone. On other platforms the PyTorch references are all there is, yet the op files
must still be importable with their ``@triton.jit`` functions in them; the stand-in's ``jit`` hands the function back as
it is, and :func:`fvlm_kernels._launch.use_triton` sees to it that nobody calls it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["HAS_TRITON", "INTERPRETED", "tl", "triton"]


class _NoTriton:
    """Answers for ``triton`` at import time where Triton is not installed."""

    @staticmethod
    def jit(fn: Callable[..., Any]) -> Callable[..., Any]:
        return fn


triton: Any
tl: Any
try:
    import triton as _installed
    import triton.language as _language

    triton, tl = _installed, _language
    HAS_TRITON = True
    # Whether kernels run on the CPU is decided when they are decorated, so it is read once, here, as Triton reads it.
    INTERPRETED = bool(triton.knobs.runtime.interpret)
except ModuleNotFoundError as error:
    if error.name != "triton":  # a broken installation must not pass for an absent one
        raise
    triton, tl = _NoTriton(), None
    HAS_TRITON = False
    INTERPRETED = False
