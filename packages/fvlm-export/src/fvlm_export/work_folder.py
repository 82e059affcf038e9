"""The folder that a result is built in, and the one moment at which it becomes the output.

Everything is written into a hidden folder beside the output and renamed into place when it is whole. Until then the
output is what it was before; a run that fails removes what it wrote, and one that is killed leaves only the hidden
folder.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import sys
from pathlib import Path
from types import TracebackType
from typing import TextIO

from fvlm_core.errors import ConfigError, ExportError

LOCK, SCRATCH = ".lock", ".base"  # neither is part of the result
_WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO}
_AT_FDCWD = -100
_EXCHANGE = 2  # renameat2's RENAME_EXCHANGE


class WorkFolder:
    """A context in which a result is built; leaving it with an exception removes what was built.

    Args:
        output: where the result goes.
        overwrite: whether an existing output may be replaced.

    Raises:
        ConfigError: the output exists and may not be replaced, or is a file.
        ExportError: the folder cannot be made.
    """

    def __init__(self, output: Path, *, overwrite: bool) -> None:
        self.output = output
        self._lock: TextIO
        self.path = output.parent / f".{output.name}.unfinished"
        if output.exists() and not output.is_dir():
            raise ConfigError(f"output_dir={str(output)!r} is a file; name a folder.")
        if output.is_dir() and any(output.iterdir()) and not overwrite:
            raise ConfigError(f"output_dir={str(output)!r} is not empty; pass overwrite=True to replace it.")

    def __enter__(self) -> WorkFolder:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / LOCK).open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another run is writing output_dir={str(self.output)!r}; wait for it, or stop it."
            ) from None
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()
        if isinstance(value, OSError) and value.errno in _WRITE_ERRORS:
            raise _cannot_write(self.path, value) from value

    def publish(self) -> None:
        """Make the finished folder the output, in one step."""
        shutil.rmtree(self.path / SCRATCH, ignore_errors=True)
        (self.path / LOCK).unlink()
        for path in (*self.path.rglob("*"), self.path):
            _to_disk(path)  # or a loss of power could leave a folder that looks finished and is not
        if not self.output.exists():
            os.rename(self.path, self.output)
        elif not any(self.output.iterdir()):
            os.rename(self.path, self.output)  # rename(2) replaces an empty folder
        else:
            _exchange(self.path, self.output)  # what was the output is now the work folder, and goes with it
        _to_disk(self.output.parent)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(first: Path, second: Path) -> None:
    """Swap two folders; atomic where the system can do it (Linux), else through a third name."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if hasattr(libc, "renameat2"):
            done = libc.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _EXCHANGE)
            if done == 0:
                return
    aside = second.parent / f".{second.name}.replaced"
    os.rename(second, aside)
    os.rename(first, second)
    os.rename(aside, first)


def check_space(folder: Path, needed: int) -> None:
    """Check that a disk has room.

    Raises:
        ExportError: it has not.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ExportError(
            f"{folder} has {free / 1e9:,.2f} GB free and the result needs {needed / 1e9:,.2f} GB; free some space or "
            "choose another output folder."
        )


def _cannot_write(path: Path, error: OSError) -> ExportError:
    return ExportError(f"{error.filename or path} cannot be written ({error.strerror}); nothing was left behind.")
