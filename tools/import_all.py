"""Import every module of an installed package, so that an import that it does not declare shows.

python -P tools/import_all.py fvlm_core [MODULE ...]     # -P: nothing beside this script is importable

The modules named after the package stand on an extra that is not installed, and must fail to be imported.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path


def import_all(name: str, of_extras: list[str]) -> list[str]:
    """Import the package `name` and every module below it, `__main__` and those of extras excepted; return their names.

    Raises:
        ImportError: a module cannot be imported, or one of an extra can.
    """
    package = importlib.import_module(name)
    below = pkgutil.walk_packages(package.__path__, prefix=f"{name}.", onerror=_raise)
    names = [name, *(module.name for module in below if not module.name.endswith(".__main__"))]
    for module in of_extras:
        names.remove(module)
    for module in names:
        importlib.import_module(module)
    for module in of_extras:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError:
            continue
        raise ImportError(f"{module} needs no extra: import it as the others")
    return names


def _raise(name: str) -> None:
    raise ImportError(f"{name} could not be imported") from sys.exc_info()[1]


def main(arguments: list[str]) -> int:
    """Import the package named and say from where; return 1 where that is the repository's own source."""
    if not arguments:
        print(__doc__, file=sys.stderr)
        return 2
    names = import_all(arguments[0], arguments[1:])
    package = sys.modules[arguments[0]]
    origin = Path(package.__file__ or "")
    print(f"{len(names)} modules of {package.__name__} {package.__version__} imported from {origin.parent}")
    if Path(__file__).resolve().parent.parent / "packages" in origin.resolve().parents:
        print("that is the repository's source, not what was installed", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
