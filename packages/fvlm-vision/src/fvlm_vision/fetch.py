"""Fetches an image or a video over HTTP(S), once the user has allowed it, within a size and a time limit."""

from __future__ import annotations

import http.client
import queue
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPMessage
from typing import IO, Any
from urllib.parse import urljoin, urlsplit

from fvlm_core.errors import ConfigError, DataError
from fvlm_vision.arguments import positive

_CHUNK = 1 << 16


@dataclass(frozen=True)
class FetchLimits:
    """How much one fetch may take.

    Args:
        max_bytes: size of the encoded image or video, in bytes.
        seconds: time of the whole fetch, name lookup, redirects and download included.

    Raises:
        ConfigError: a limit is not positive.
    """

    max_bytes: int = 20_000_000
    seconds: float = 10.0

    def __post_init__(self) -> None:
        positive("max_bytes", self.max_bytes)
        if not (isinstance(self.seconds, int | float) and self.seconds > 0):
            raise ConfigError(f"seconds={self.seconds!r} is no positive number of seconds.")


def shown(url: str) -> str:
    """Return an address as messages and logs show it: without what may be secret, its user, password and query."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return repr(f"{parts.scheme}://{host}{parts.path}" + ("?…" if parts.query else ""))


class _WebRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to HTTP(S) only, and says so: urllib's own handler would also go to FTP."""

    def http_error_302(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage
    ) -> Any:
        target = urljoin(req.full_url, headers.get("location", ""))
        if urlsplit(target).scheme not in ("http", "https"):
            raise DataError(f"the address {shown(req.full_url)} redirects to {shown(target)}, which is not HTTP(S).")
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _opener() -> urllib.request.OpenerDirector:
    """Return an opener that knows HTTP and HTTPS and nothing else: no file, ftp or data handler."""
    opener = urllib.request.OpenerDirector()
    handlers: list[Any] = [
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
        _WebRedirects(),
    ]
    for handler in handlers:
        opener.add_handler(handler)
    return opener


def fetch(url: str, limits: FetchLimits) -> bytes:
    """Return the body of `url`.

    Args:
        url: an http or https address.
        limits: the size and time that the fetch may take.

    Returns:
        The undecoded body, at most `limits.max_bytes` bytes.

    Raises:
        DataError: the scheme is another, the server cannot be reached or refuses, or a limit is passed.
    """
    if urlsplit(url).scheme.lower() not in ("http", "https"):
        raise DataError(f"the address {shown(url)} is not HTTP(S).")
    # A thread of its own, because nothing else bounds the time of a name lookup or of headers that drip. Left behind,
    # it ends by its own deadlines.
    answers: queue.SimpleQueue[bytes | DataError] = queue.SimpleQueue()
    threading.Thread(target=lambda: answers.put(_answer(url, limits)), daemon=True).start()
    try:
        answer = answers.get(timeout=limits.seconds)
    except queue.Empty:
        raise _too_slow(url, limits) from None
    if isinstance(answer, DataError):
        raise answer
    return answer


def _answer(url: str, limits: FetchLimits) -> bytes | DataError:
    deadline = time.monotonic() + limits.seconds
    try:
        with _opener().open(url, timeout=limits.seconds) as response:
            return _read(response, url, limits, deadline)
    except DataError as error:
        return error
    except urllib.error.HTTPError as error:
        return DataError(f"the address {shown(url)} answered {error.code}; correct it or drop the sample.")
    except TimeoutError:
        return _too_slow(url, limits)
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        if isinstance(error, urllib.error.URLError) and isinstance(error.reason, TimeoutError):
            return _too_slow(url, limits)
        return DataError(f"the address {shown(url)} cannot be fetched ({error}); correct it or drop the sample.")


def _read(response: Any, url: str, limits: FetchLimits, deadline: float) -> bytes:
    parts: list[bytes] = []
    size = 0
    while part := response.read1(_CHUNK):  # read1 returns what has come: a slow drip cannot hold the deadline up
        parts.append(part)
        size += len(part)
        if size > limits.max_bytes:
            raise DataError(f"what {shown(url)} sends is larger than {limits.max_bytes} bytes; download it first.")
        if time.monotonic() > deadline:
            raise _too_slow(url, limits)
    return b"".join(parts)


def _too_slow(url: str, limits: FetchLimits) -> DataError:
    return DataError(f"the address {shown(url)} took longer than {limits.seconds:g} s; download it first.")
