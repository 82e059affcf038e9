"""What a failure means to the shell: its exit code, and the one sentence that stderr gets."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from enum import IntEnum

from fvlm_core.errors import CheckpointError, DataError, ExportError, FvlmError, MissingExtraError, ResourceError


class Exit(IntEnum):
    """The exit codes of every verb."""

    OK = 0
    FAILED = 1  # something else, such as a merge that its own check refuses
    USAGE = 2  # the command line or the config
    DATA = 3  # a sample, an image, a model or adapter folder
    RESOURCES = 4  # memory, disk, permissions, a package that is not installed
    REMOTE = 5  # the Hub
    INTERRUPTED = 130  # Ctrl-C, as shells count it


# Other errors that mean one of these: what the file system, the device and the network say.
HANDLED = (FvlmError, OSError, MemoryError, RuntimeError, UnicodeEncodeError)

_REMOTE = {"huggingface_hub.errors": ("HfHubHTTPError", "LocalTokenNotFoundError"), "httpx": ("HTTPError",)}
_LONG = 300
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE, errno.EACCES, errno.EPERM, errno.EROFS}


def judge(error: BaseException) -> tuple[Exit, str] | None:
    """Return an error's exit code and sentence, or None where it is no failure that a user can mend but a bug."""
    if isinstance(error, FvlmError):
        return _kind(error), _sentence(str(error))
    if isinstance(error, MemoryError) or _is_out_of_device_memory(error):
        advice = "lower train.per_device_train_batch_size or model.max_seq_length, or load in 4 bit."
        return Exit.RESOURCES, f"memory ran out ({_sentence(str(error)) or 'on the host'}): {advice}"
    if _is_remote(error):
        return Exit.REMOTE, f"the Hub did not do it: {_sentence(str(error))}"
    if isinstance(error, OSError) and error.errno is not None:
        place = f"{error.filename}: " if error.filename else ""
        return _of_system(error.errno), _sentence(f"{place}{error.strerror}.")
    if isinstance(error, UnicodeEncodeError):
        wrong = error.object[error.start : error.end]
        return Exit.DATA, f"{wrong!r} in a name or a text is not UTF-8, so it cannot be written; rename or rewrite it."
    return None


def _of_system(number: int) -> Exit:
    return Exit.RESOURCES if number in _NO_ROOM else Exit.DATA


def _kind(error: FvlmError) -> Exit:
    causes = list(_causes(error))
    if isinstance(error, CheckpointError | DataError | ExportError) and any(_is_remote(cause) for cause in causes):
        return Exit.REMOTE
    if isinstance(error, DataError | CheckpointError):
        return Exit.DATA
    if isinstance(error, MissingExtraError | ResourceError):
        return Exit.RESOURCES
    if isinstance(error, ExportError):
        numbers = [cause.errno for cause in causes if isinstance(cause, OSError) and cause.errno is not None]
        return _of_system(numbers[0]) if numbers else Exit.FAILED
    return Exit.USAGE


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield what led to an error, also where `raise … from None` keeps it from the user."""
    following = error.__cause__ or error.__context__
    while following is not None:
        yield following
        following = following.__cause__ or following.__context__


def _is_out_of_device_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")  # where torch was never imported, none of its errors can be here
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _is_remote(error: BaseException) -> bool:
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    kinds = [
        kind
        for module, names in _REMOTE.items()
        if module in sys.modules  # what was never imported has raised nothing
        for kind in (getattr(sys.modules[module], name) for name in names)
    ]
    return isinstance(error, tuple(kinds))


def _sentence(text: str) -> str:
    """Return a text in one line, without the middle of what is too long to be read."""
    return " ".join(
        word if len(word) <= _LONG else f"{word[: _LONG // 2]}…{word[-_LONG // 4 :]}" for word in text.split()
    )
