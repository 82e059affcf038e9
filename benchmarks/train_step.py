"""A training step of several stacks on one checkpoint of real size: see `benchmarks.training.run`."""

from __future__ import annotations

import sys

from benchmarks.training.run import main

if __name__ == "__main__":
    sys.exit(main())
