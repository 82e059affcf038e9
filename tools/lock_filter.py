"""Make `uv.lock` independent of the package index it was resolved through.

uv writes the address of every file and of its index into the lock file, so that a lock made behind one mirror cannot be
used behind another. What is committed keeps the pinned versions and the dependency graph and drops the rest; uv
completes the file locally from whatever index is configured.

    python tools/lock_filter.py < uv.lock            # git's clean filter: prints the neutral form
    python tools/lock_filter.py --check FILE         # fails on any address in FILE
    python tools/lock_filter.py --check-staged       # fails where git's index holds another uv.lock than the one here
    python tools/lock_filter.py --install            # registers the filter in this clone's git configuration

Standard library only: git runs it before any environment exists.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

_REGISTRY = re.compile(r'registry = "[^"]*"')
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def neutral(lines: Iterable[str]) -> Iterator[str]:
    """Yield the lines of a `uv.lock` without its file lists, index addresses and member metadata."""
    skip_until_close = False  # inside `wheels = [` … `]`
    skip_section = False  # inside a [package.metadata…] table
    blank = False  # blank lines are held back, so that what is dropped leaves no gap behind
    for line in lines:
        stripped = line.strip()
        if skip_until_close:
            skip_until_close = stripped != "]"
            continue
        if stripped.startswith("["):
            skip_section = stripped.startswith("[package.metadata")
        if skip_section or stripped.startswith("sdist = "):
            continue
        if stripped.startswith("wheels = ["):
            skip_until_close = not stripped.endswith("]")
            continue
        if not stripped:
            blank = True
            continue
        if blank:
            yield "\n"
            blank = False
        yield _REGISTRY.sub('registry = "."', line)


def check(path: Path) -> int:
    """Return 1 and name the first offending line if `path` holds an address, else 0."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if _ADDRESS.search(line):
            print(
                f"{path}:{number} holds a download address; commit it through the clean filter "
                "(python tools/lock_filter.py --install, then git add --renormalize uv.lock)",
                file=sys.stderr,
            )
            return 1
    return 0


def check_staged(root: Path) -> int:
    """Return 1 if the `uv.lock` in git's index is not the neutral form of the one in `root`, else 0."""
    staged = subprocess.run(["git", "show", ":uv.lock"], cwd=root, capture_output=True, check=True).stdout.decode()
    with (root / "uv.lock").open(encoding="utf-8") as here:
        if "".join(neutral(here)) != staged:
            print("uv.lock has changed: run `git add uv.lock` and commit it with the pyproject files", file=sys.stderr)
            return 1
    return 0


def install() -> int:
    """Register the clean filter in this clone."""
    for key, value in {
        "filter.uvlock.clean": "python3 tools/lock_filter.py",
        "filter.uvlock.smudge": "cat",
        "filter.uvlock.required": "true",
    }.items():
        subprocess.run(["git", "config", key, value], check=True)
    return 0


def main(arguments: list[str]) -> int:
    """Run one of the uses in the module's docstring."""
    if arguments == ["--install"]:
        return install()
    if len(arguments) == 2 and arguments[0] == "--check":
        return check(Path(arguments[1]))
    if arguments == ["--check-staged"]:
        return check_staged(Path(__file__).resolve().parent.parent)
    if arguments:
        print(__doc__, file=sys.stderr)
        return 2
    sys.stdout.writelines(neutral(sys.stdin))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
