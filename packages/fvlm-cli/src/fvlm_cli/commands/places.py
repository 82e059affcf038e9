"""Where verbs write to: what cannot be written is said before anything takes time."""

from __future__ import annotations

from pathlib import Path

from fvlm_core.errors import ConfigError


def check_file(option: str, path: Path) -> None:
    """Refuse the name of a file to write that is a folder's, or lies under a file.

    Args:
        option: what named it.
        path: the file, which may exist.

    Raises:
        ConfigError: no file can be there.
    """
    if path.is_dir():
        raise ConfigError(f"{option} {str(path)!r} is a folder; name a file.")
    check_parents(option, path)


def check_parents(option: str, path: Path) -> None:
    """Refuse a file or folder to write that lies under a file.

    Raises:
        ConfigError: it does.
    """
    for parent in path.parents:
        if parent.exists() and not parent.is_dir():
            raise ConfigError(f"{option} {str(path)!r} would lie under {str(parent)!r}, which is a file; name another.")
