"""Triton kernels for training vision-language models, with PyTorch references.

Every op is a function on tensors; see the module of its name for its maths, gradients and numerics. ``impl=None`` runs
Triton on a GPU and plain PyTorch elsewhere, ``impl="torch"`` and ``impl="triton"`` choose.
"""

from .layer_norm import layer_norm
from .rms_norm import rms_norm

__all__ = ["__version__", "layer_norm", "rms_norm"]

__version__ = "0.1.0"
