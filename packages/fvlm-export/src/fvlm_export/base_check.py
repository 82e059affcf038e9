"""Whether a checkpoint is the one that a model or an adapter was trained on.

Shapes say little: every fine-tune of a model has them. So values are compared: a live 4- or 8-bit weight with what the
checkpoint gives when it is quantized the same way, and an adapter's record of its base with the files at hand.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from fvlm_core.errors import ExportError
from fvlm_export.bases import CheckpointBase
from fvlm_export.remote import RemoteShard, Shard

if TYPE_CHECKING:
    from fvlm_export.live import LiveModel

_SAMPLE = 4
_EQUAL = 0.995  # of the packed bytes; devices round a few values differently, another checkpoint changes many more
_BLOCK, _BLOCKS = 1 << 16, 16


@torch.no_grad()
def check_live_base(base: CheckpointBase, live: LiveModel, where: str) -> int:
    """Check that a model's quantized weights came from a checkpoint.

    Args:
        base: the checkpoint.
        live: the model.
        where: the checkpoint's name, for the error.

    Returns:
        How many weights were compared.

    Raises:
        ExportError: one differs.
    """
    slots = {slot.params[0]: slot for slot in base.slots if slot.conversion is None and slot.params}
    names = [name for name in live.quantized if f"{name}.weight" in slots]
    step = max(1, len(names) // _SAMPLE)
    for name in names[::step][:_SAMPLE]:
        weight: Any = live.quantized[name].weight
        slot = slots[f"{name}.weight"]
        stored = base.params(slot, weight.device)[f"{name}.weight"]
        share = _share_equal(weight, stored)
        base.release(slot)
        if share < _EQUAL:
            raise ExportError(
                f"{name!r} of the model is not {where!r} quantized (only {share:.1%} of its bytes agree): that is not "
                "the checkpoint it was trained on; pass the right one as base=, or base='dequantized'."
            )
    return min(len(names), _SAMPLE)


def _share_equal(weight: Any, stored: torch.Tensor) -> float:
    from bitsandbytes import functional

    if type(weight).__name__ == "Params4bit":
        state = weight.quant_state
        packed, _ = functional.quantize_4bit(
            stored.to(state.dtype).contiguous(),
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=weight.data.dtype,
        )
        held = weight.data
    else:
        packed, _, _ = functional.int8_vectorwise_quant(stored.to(torch.float16))
        held = weight.data
    if packed.numel() != held.numel():
        return 0.0
    return float((packed.reshape(-1) == held.reshape(-1)).float().mean())


def fingerprint(shards: Sequence[Shard]) -> str | None:
    """Return a hash of a checkpoint that another set of weights would not have, without reading all of it.

    It covers every shard's size and its bytes at evenly spaced places, the header among them. Names of files and
    folders do not enter, so a copy has the same.

    Returns:
        The hash; None where a shard is on the Hub, whose revision says as much.
    """
    digest = hashlib.sha256()
    for shard in shards:
        if isinstance(shard, RemoteShard):
            return None
        path = shard.path
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            for number in range(_BLOCKS):
                file.seek(max(0, size - _BLOCK) * number // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()
