"""What ``fvlm quickstart`` does, as library code: handwriting, training, merging, checking."""

from __future__ import annotations

STEPS = 300
"""How many steps are trained unless told otherwise."""
