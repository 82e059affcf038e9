"""Where quickstart reads its checkpoint from, and where it writes: never over an earlier run."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from fvlm_core.errors import CheckpointError, ConfigError

_MOST_RUNS = 1000


def shipped_checkpoint() -> Path:
    """Return the folder of the tiny VLM that this package ships.

    Raises:
        CheckpointError: the installation lacks it.
    """
    folder = Path(str(resources.files("fvlm_cli"))) / "assets" / "tiny_vlm"
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{str(folder)!r} holds no checkpoint: install fvlm-cli again, or make one with examples/tiny_vlm."
        )
    return folder


def fresh_folder(wanted: Path) -> Path:
    """Make an empty folder: ``wanted`` itself, or, when that holds something, ``wanted-2``, ``wanted-3``, …

    Raises:
        ConfigError: ``wanted`` is a file, its parent cannot be written to, or a thousand runs are there already.
    """
    for number in range(1, _MOST_RUNS + 1):
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            folder.mkdir(parents=True, exist_ok=number == 1)
        except FileExistsError:
            if number == 1:
                raise ConfigError(f"--output {str(wanted)!r} is a file: name a folder.") from None
            continue
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise ConfigError(f"--output {str(wanted)!r} cannot be made ({reason}): name another folder.") from None
        if number > 1 or not any(folder.iterdir()):
            return folder
    raise ConfigError(f"--output {str(wanted)!r} and {_MOST_RUNS - 1} folders after it are taken: name another folder.")
