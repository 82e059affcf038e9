"""Which weights of a 4-bit output are quantized, and how its config says so."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fvlm_core.errors import ExportError

if TYPE_CHECKING:
    from fvlm_export.live import LiveModel
    from fvlm_export.skeleton import Skeleton


def modules_to_quantize(skeleton: Skeleton, live: LiveModel | None) -> frozenset[str]:
    """Return the linear modules to write as NF4: those that the live model holds in 4 bit, else what its family says.

    Raises:
        ExportError: there is none.
    """
    if live is not None and live.four_bit:
        return frozenset(live.quantized)
    kept = _kept_by_family(skeleton)
    found = frozenset(
        name
        for name, module in skeleton.model.named_modules()
        if type(module) is nn.Linear and not any(name == path or name.startswith(f"{path}.") for path in kept)
    )
    if not found:
        raise ExportError("the model has no linear layer to write in 4 bit; use save_method='merged_16bit'.")
    return found


def quantization_config(skeleton: Skeleton, quantized: frozenset[str], dtype: torch.dtype) -> dict[str, Any]:
    """Return the ``quantization_config`` of the output.

    Args:
        skeleton: of the model.
        quantized: module names written as NF4.
        dtype: what the weights are dequantized to when they are used.
    """
    from fvlm_core.precision import Precision
    from fvlm_core.quantized import quantization

    linears = [name for name, module in skeleton.model.named_modules() if type(module) is nn.Linear]
    left = [name for name in linears if name not in quantized]
    kept = [path for path in _kept_by_family(skeleton) if any(n == path or n.startswith(f"{path}.") for n in left)]
    by_family = {n for n in linears if any(n == path or n.startswith(f"{path}.") for path in kept)}
    if by_family != set(left):
        # transformers matches these as regular expressions from the start of a name
        kept = [f"{re.escape(name)}$" for name in left]
    config = quantization(Precision.NF4, dtype, tuple(kept))
    if config is None:
        raise ExportError("fvlm_core knows no quantization for 4 bit; this is an error in FVLM, please report it.")
    return config.to_dict()


def _kept_by_family(skeleton: Skeleton) -> tuple[str, ...]:
    from fvlm_core.arch import facts_for

    return facts_for(skeleton.model).unquantized
