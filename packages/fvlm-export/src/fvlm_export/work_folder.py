"""The folder that a result is built in, and the one moment at which it becomes the output.

Everything is written into a hidden folder beside the output and renamed into place when it is whole. Until then the
output is what it was before. An older output is given up only for one that is on the disk, so that a loss of power
costs neither; where there was none, the result is left to the system like a copied file, which is as safe against
everything but a loss of power in the next half minute, and its record tells whether that has torn it.

A run that fails removes what it wrote, except where something outside broke it off: a
full disk, the network, Ctrl-C. Then the shards that were finished and proved stay in the hidden folder, as a killed run
leaves them, and the same merge takes them over.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TextIO, TypeGuard

from fvlm_core.checkpoint import ADAPTER_CONFIG, CONFIG
from fvlm_core.errors import ConfigError, ExportError
from fvlm_export.remote import UnreachableError
from fvlm_export.resume import keep_finished

LOCK, SCRATCH = ".lock", ".base"  # neither is part of the result
_WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO}
_TAKEN = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}  # what a rename onto a full folder or a file says
_AT_FDCWD = -100
_EXCHANGE = 2  # renameat2's RENAME_EXCHANGE


class NoSpaceError(ExportError):
    """A disk has no room for a result."""


class WorkFolder:
    """A context in which a result is built; leaving it with an exception removes what was built and is not resumable.

    Args:
        output: where the result goes.
        overwrite: whether an existing output may be replaced: a folder with a model or an adapter in it, in which the
            process does not stand; see also :meth:`check_reads`.
        resumable: whether finished shards stay where a run was broken off.

    Attributes:
        output: where the result goes, with links followed: what they point to is replaced, not they.
        replaces: whether there is an older output that the result will take the place of.

    Raises:
        ConfigError: the output exists and may not be replaced, or is a file.
        ExportError: the folder cannot be made.
    """

    def __init__(self, output: Path, *, overwrite: bool, resumable: bool = True) -> None:
        self.output, self._resumable = output.resolve(), resumable
        self._lock: TextIO
        self.path = self.output.parent / f".{self.output.name}.unfinished"
        if output.exists() and not output.is_dir():
            raise ConfigError(f"output_dir={str(output)!r} is a file; name a folder.")
        self.replaces = output.is_dir() and any(output.iterdir())
        if self.replaces and not overwrite:
            raise ConfigError(f"output_dir={str(output)!r} is not empty; pass overwrite=True to replace it.")
        if self.replaces:
            _check_replaceable(output)

    def check_reads(self, folders: Iterable[str | os.PathLike[str]]) -> None:
        """Check that the output takes the place of nothing that the result is made of, which would be deleted.

        Raises:
            ConfigError: it does.
        """
        for folder in folders if self.replaces else ():
            if Path(folder).expanduser().resolve().is_relative_to(self.output):
                raise ConfigError(
                    f"output_dir={str(self.output)!r} is or holds {str(folder)!r}, which is read; name another."
                )

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
        kept = self._keep(value) if self._resumable and value is not None else 0
        if not kept:
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()
        if _is_write_error(value):
            raise _cannot_write(self.path, value, kept) from value

    def _keep(self, error: BaseException) -> int:
        """Keep the finished shards where they are as right as before; return how many there are."""
        full = isinstance(error, NoSpaceError) or _is_write_error(error)
        if not full and not isinstance(error, (KeyboardInterrupt, UnreachableError)):
            return 0
        try:
            return keep_finished(self.path, frozenset({LOCK} if full else {LOCK, SCRATCH}))
        except OSError:  # a disk that cannot even be read
            return 0

    def publish(self) -> None:
        """Make the finished folder the output, in one step.

        Raises:
            ConfigError: the output was empty or not there, and is not now.
        """
        shutil.rmtree(self.path / SCRATCH, ignore_errors=True)
        (self.path / LOCK).unlink()
        if not (self.replaces and self.output.exists()):
            try:
                os.rename(self.path, self.output)  # rename(2) replaces an empty folder, and no other
            except OSError as error:
                if error.errno not in _TAKEN:
                    raise
                raise ConfigError(
                    f"output_dir={str(self.output)!r} was filled by another meanwhile; save again, elsewhere."
                ) from error
            return
        for path in (*self.path.rglob("*"), self.path):
            _to_disk(path)  # or a loss of power could leave neither the old output nor a whole new one
        _exchange(self.path, self.output)  # what was the output is now the work folder, and goes with it
        _to_disk(self.output.parent)


def _check_replaceable(output: Path) -> None:
    """Refuse to replace, which is to delete, what can hardly be meant."""
    if Path.cwd().is_relative_to(output.resolve()):
        raise ConfigError(f"output_dir={str(output)!r} is or holds the current folder; name another.")
    if not any((output / name).is_file() for name in (CONFIG, ADAPTER_CONFIG)):
        raise ConfigError(
            f"output_dir={str(output)!r} holds no model that overwrite=True could replace; name another, or empty it."
        )


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
        raise NoSpaceError(
            f"{folder} has {free / 1e9:,.2f} GB free and the result needs {needed / 1e9:,.2f} GB; free some space or "
            "choose another output folder."
        ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # what a disk that fills up later says


def _is_write_error(error: BaseException | None) -> TypeGuard[OSError]:
    return isinstance(error, OSError) and error.errno in _WRITE_ERRORS


def _cannot_write(path: Path, error: OSError, kept: int = 0) -> ExportError:
    left = f"{kept} finished shards stay in {path} for the same merge" if kept else "nothing was left behind"
    return ExportError(f"{error.filename or path} cannot be written ({error.strerror}); {left}.")
