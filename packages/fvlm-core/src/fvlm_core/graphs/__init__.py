"""Checkpointed layers as CUDA graphs: one launch for a layer's forward pass and one for its backward pass.

A training step of a 2-billion-parameter model is thousands of small launches, each of which costs the host more time
than the device needs for the work. A layer under gradient checkpointing is the right piece to record: its forward pass
keeps nothing but its input, and its backward pass (recomputation and gradients) needs nothing but that input and the
gradient of its output. So both are recorded once for a shape and replayed from then on, over memory that all layers of
a kind share.

What may change between two replays is either copied into that memory (the hidden state, the gradient, rotary tables) or
looked at before each replay (which adapter is active, where its parameters lie); after a change the layer is recorded
anew or run as it is. Lengths of text and numbers of patches are rounded up, so that nearly equal ones share a
recording.
"""

from __future__ import annotations

from fvlm_core.graphs.calls import module_of
from fvlm_core.graphs.runner import LayerGraphs

__all__ = ["LayerGraphs", "module_of"]
