"""Add up the JUnit files that the pytest runs of one `nox` left, and print "N passed, N failed, N skipped".

    python tools/count_tests.py .nox/results

Exits 1 where a test failed or none ran.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path


def count(folder: Path) -> tuple[int, int, int]:
    """Return how many tests passed, failed (errors included) and were skipped in the `.xml` files of `folder`."""
    total = failed = skipped = 0
    for path in sorted(folder.glob("*.xml")):
        for suite in ElementTree.parse(path).getroot().iter("testsuite"):
            total += int(suite.get("tests", 0))
            failed += int(suite.get("failures", 0)) + int(suite.get("errors", 0))
            skipped += int(suite.get("skipped", 0))
    return total - failed - skipped, failed, skipped


def main(arguments: list[str]) -> int:
    """Print the sum over the folder named."""
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    passed, failed, skipped = count(Path(arguments[0]))
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
