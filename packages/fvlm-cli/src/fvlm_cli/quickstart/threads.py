"""How many threads quickstart computes with on a CPU: one, unless the environment says otherwise.

The tiny model's products are too small for two threads to gain much by, and where the cores have other work too the
threads spend most of their time waiting for each other: beside five other jobs on two cores a step took 2.5 to 3.2 s
with two threads and 0.4 to 1.0 s with one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def single_thread() -> Iterator[None]:
    """Let torch compute in one thread, and in as many as before afterwards; ``OMP_NUM_THREADS`` wins where it is."""
    import torch

    if "OMP_NUM_THREADS" in os.environ or torch.cuda.is_available():
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
