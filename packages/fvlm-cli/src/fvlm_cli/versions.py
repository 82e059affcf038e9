"""The versions that a run's result depends on, read without importing anything."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

FVLM = ("fvlm-cli", "fvlm-vision", "fvlm-export", "fvlm-core", "fvlm-kernels")
LIBRARIES = (
    "torch", "triton", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "datasets", "safetensors",
    "huggingface-hub",
)  # fmt: skip


def versions() -> dict[str, str | None]:
    """Return the version of Python, of FVLM's packages and of what they build on; None for one not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in (*FVLM, *LIBRARIES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def git_state() -> dict[str, str | bool] | None:
    """Return the commit of the working directory and whether anything there differs from it; None without git."""
    try:
        commit = _git("rev-parse", "HEAD")
        return {"commit": commit.strip(), "changed": bool(_git("status", "--porcelain").strip())}
    except (OSError, subprocess.SubprocessError):  # no git, no repository, or no commit in it
        return None


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout
