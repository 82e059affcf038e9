"""How many threads torch computes one tensor with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Have torch compute with so many threads inside, and put its own number back.

    One is right for many small tensors: waiting for each other's ends costs threads more than they save, and on a busy
    machine a hundred times as much.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
