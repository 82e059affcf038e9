"""The errors that bad input gets: one sentence that names the value, where it came from and what to do."""

from __future__ import annotations


class FvlmError(Exception):
    """Base of every error that FVLM raises for something its user can mend."""


class ConfigError(FvlmError, ValueError):
    """An argument or a config key holds a value that cannot be used, or contradicts another."""


class CheckpointError(FvlmError, ValueError):
    """A model or adapter folder is missing, incomplete, or of a kind that cannot be loaded."""


class DataError(FvlmError, ValueError):
    """A training sample cannot be used.

    Args:
        reason: one sentence that names the value and what to do.
        row: the sample's row number in its dataset, counted from 0, where it is known.
    """

    def __init__(self, reason: str, row: int | None = None) -> None:
        super().__init__(reason if row is None else f"row {row}: {reason}")
        self.reason = reason
        self.row = row

    def at(self, row: int) -> DataError:
        """Return the same error with its row number."""
        return DataError(self.reason, row)

    def __reduce__(self) -> tuple[type[DataError], tuple[str, int | None]]:  # crosses dataloader worker processes
        return type(self), (self.reason, self.row)


class ExportError(FvlmError, RuntimeError):
    """A merge, its verification, a save or a push failed; nothing that looks finished was left behind."""


class ResourceError(FvlmError, RuntimeError):
    """Device memory does not suffice for what was asked for."""


class MissingExtraError(FvlmError, ImportError):
    """An optional package is needed; the message says which extra installs it."""
