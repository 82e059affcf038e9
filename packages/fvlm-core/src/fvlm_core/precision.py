"""Which precision a model is loaded in, and which dtype it computes in."""

from __future__ import annotations

import logging
from enum import StrEnum
from typing import TYPE_CHECKING

from fvlm_core.errors import ConfigError
from fvlm_core.options import check_flag

if TYPE_CHECKING:
    import torch

    from fvlm_core.arch import ArchFacts

logger = logging.getLogger(__name__)


class Precision(StrEnum):
    """How a model's base weights are held."""

    NF4 = "4bit"  # NF4 with double quantization (bitsandbytes), for adapters
    INT8 = "8bit"  # LLM.int8 (bitsandbytes), for adapters
    HALF = "16bit"  # not quantized and frozen, for adapters
    FULL = "full"  # not quantized, every parameter trainable

    @property
    def argument(self) -> str:
        """The argument of ``from_pretrained`` that chooses it."""
        return "full_finetuning" if self is Precision.FULL else f"load_in_{self.value}"

    @property
    def quantized(self) -> bool:
        """Whether the base weights are held in fewer than 16 bits."""
        return self in (Precision.NF4, Precision.INT8)


def explicit_precision(
    load_in_4bit: bool | None = None,
    load_in_8bit: bool = False,
    load_in_16bit: bool = False,
    full_finetuning: bool = False,
) -> Precision | None:
    """The precision that the arguments ask for by name, or None where they leave it open.

    Args:
        load_in_4bit: True: NF4; False: anything but; None (not given): open.
        load_in_8bit: True: int8.
        load_in_16bit: True: 16 bit, frozen.
        full_finetuning: True: 16 bit (or 32), every parameter trainable.

    Returns:
        The one that is True; 16 bit where ``load_in_4bit`` is False and nothing else is True; None where all is left
        as it is by default.

    Raises:
        ConfigError: two of them are True, or one is not a boolean.
    """
    given = {
        Precision.NF4: load_in_4bit,
        Precision.INT8: load_in_8bit,
        Precision.HALF: load_in_16bit,
        Precision.FULL: full_finetuning,
    }
    for precision, value in given.items():
        if value is not None or precision is not Precision.NF4:
            check_flag(precision.argument, value)
    chosen = [precision for precision, value in given.items() if value]
    if len(chosen) > 1:
        names = " and ".join(f"{precision.argument}=True" for precision in chosen)
        raise ConfigError(f"{names} contradict each other: choose one of them.")
    if chosen:
        return chosen[0]
    return Precision.HALF if load_in_4bit is False else None


def choose_precision(
    load_in_4bit: bool | None = None,
    load_in_8bit: bool = False,
    load_in_16bit: bool = False,
    full_finetuning: bool = False,
) -> Precision:
    """The precision to load in: the one asked for, or 4 bit where none is (see `explicit_precision`).

    Raises:
        ConfigError: two of the arguments are True, or one is not a boolean.
    """
    return explicit_precision(load_in_4bit, load_in_8bit, load_in_16bit, full_finetuning) or Precision.NF4


def choose_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """The dtype that a model on ``device`` computes in.

    Args:
        dtype: a floating torch dtype or its name (``"bfloat16"``, ``"torch.float16"``, ``"bf16"``, ...); None or
            ``"auto"``: bfloat16 where the device computes in it, else float16; float32 on the CPU.
        device: where the model will be.

    Raises:
        ConfigError: ``dtype`` is no dtype that a model can be trained in.
    """
    import torch

    if dtype is None or dtype == "auto":
        if device.type == "cpu":
            return torch.float32
        # Emulated bfloat16 (cards before Ampere) is slower than float16, so only the real thing counts.
        native = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    names = {
        "bfloat16": torch.bfloat16,
        "bf16": torch.bfloat16,
        "float16": torch.float16,
        "fp16": torch.float16,
        "half": torch.float16,
        "float32": torch.float32,
        "fp32": torch.float32,
        "float": torch.float32,
    }
    found = names.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if found not in (torch.bfloat16, torch.float16, torch.float32):
        raise ConfigError(
            f"dtype={dtype!r} is not a dtype to train in: pass torch.bfloat16, torch.float16, torch.float32, "
            "the name of one, or None."
        )
    return found


def within_range(dtype: torch.dtype, asked: torch.dtype | str | None, facts: ArchFacts | None) -> torch.dtype:
    """Return the dtype that a family computes in: float32 in the place of a float16 that cannot hold its activations.

    Args:
        dtype: from `choose_dtype`.
        asked: what `choose_dtype` was given.
        facts: of the family; None where there are none.

    Raises:
        ConfigError: float16 was asked for by name.
    """
    import torch

    if dtype is not torch.float16 or facts is None or not facts.beyond_float16:
        return dtype
    if asked is not None and asked != "auto":
        raise ConfigError(
            f"dtype={asked!r} does not fit {facts.model_type!r}, whose activations grow beyond what float16 can hold: "
            "pass dtype='float32', or leave it out."
        )
    logger.warning(
        "The activations of %s grow beyond float16, and this device has no bfloat16: it computes in float32.",
        facts.model_type,
    )
    return torch.float32
