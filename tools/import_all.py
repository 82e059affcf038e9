"""Import every module of an installed package, so that an import that it does not declare shows.

python -P tools/import_all.py fvlm_core       # -P: nothing beside this script is importable
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path


def import_all(name: str) -> list[str]:
    """Import the package `name` and every module below it, `__main__` excepted; return their names."""
    package = importlib.import_module(name)
    below = pkgutil.walk_packages(package.__path__, prefix=f"{name}.", onerror=_raise)
    names = [name, *(module.name for module in below if not module.name.endswith(".__main__"))]
    for module in names:
        importlib.import_module(module)
    return names


def _raise(name: str) -> None:
    raise ImportError(f"{name} could not be imported") from sys.exc_info()[1]


def main(arguments: list[str]) -> int:
    """Import the package named and say from where; return 1 where that is the repository's own source."""
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    names = import_all(arguments[0])
    package = sys.modules[arguments[0]]
    origin = Path(package.__file__ or "")
    print(f"{len(names)} modules of {package.__name__} {package.__version__} imported from {origin.parent}")
    if Path(__file__).resolve().parent.parent / "packages" in origin.resolve().parents:
        print("that is the repository's source, not what was installed", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
