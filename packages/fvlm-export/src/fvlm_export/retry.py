"""Trying again what the Hub may answer the next time: limits, errors of its own, connections that break."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

import httpx
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

logger = logging.getLogger(__name__)

T = TypeVar("T")

WAITS = (1.0, 4.0, 15.0)  # seconds, between tries of what huggingface_hub does not retry by itself


def patiently(request: Callable[[], T], errors: tuple[type[Exception], ...]) -> T:
    """Make a request, and again after a while where its failure may pass.

    Args:
        request: what is asked.
        errors: what it may raise.

    Raises:
        Exception: the last error, or the first that will not pass.
    """
    for wait in WAITS:
        try:
            return request()
        except errors as error:
            cause = cause_of(error)
            if not _passing(cause):
                raise
            logger.warning("the Hub did not answer as it should (%s); trying again in %.0f s", status_of(cause), wait)
            time.sleep(wait)
    return request()


def cause_of(error: BaseException) -> BaseException:
    """Return what an upload thread's wrapper hides, or that of a download, which calls every failure a missing file."""
    while isinstance(error, (RuntimeError, LocalEntryNotFoundError)) and error.__cause__ is not None:
        error = error.__cause__
    return error


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status that an error is about; None: it is about none."""
    return error.response.status_code if isinstance(error, (HfHubHTTPError, httpx.HTTPStatusError)) else None


def _passing(error: BaseException) -> bool:
    status = status_of(error)
    if status is not None:
        return status == 429 or status >= 500
    if isinstance(error, OfflineModeIsEnabled):  # a ConnectionError, and asked for
        return False
    return isinstance(error, (httpx.TransportError, ConnectionError, TimeoutError))
