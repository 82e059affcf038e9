"""Letting `trl.SFTConfig()` be made on a machine without an accelerator.

TRL's configuration turns bf16 mixed precision on unless told otherwise, and transformers then refuses it where no
device has bf16: `SFTConfig(output_dir="out")` raises on a laptop before any trainer exists. The programs that FVLM runs
unchanged build it exactly so. When a model is loaded onto the CPU of such a machine, the default, and only the default,
becomes False; `bf16=True` written out still raises, and nothing changes where there is an accelerator.

This is the one place where FVLM changes a class that is not its own (docs/architecture.md): the configuration is made
by the user before FVLM sees an instance of it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

_ORIGINAL = "_fvlm_original_post_init"


def let_defaults_fit_the_cpu() -> bool:
    """Make bf16 off the default of `trl.SFTConfig` if this machine has no device for it.

    Returns:
        Whether the default is changed, now or by an earlier call.
    """
    from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available
    from trl import SFTConfig

    if is_torch_bf16_gpu_available() or is_torch_xla_available():
        return False
    if _ORIGINAL in vars(SFTConfig):
        return True
    config: Any = SFTConfig  # a class whose method is replaced
    original: Callable[[Any], None] = config.__post_init__

    @functools.wraps(original)
    def post_init(self: Any) -> None:
        if self.bf16 is None:
            self.bf16 = False
        original(self)

    setattr(config, _ORIGINAL, original)
    config.__post_init__ = post_init
    logger.info("No device here has bf16: trl.SFTConfig leaves it off unless it is asked for.")
    return True


def restore_defaults() -> None:
    """Undo `let_defaults_fit_the_cpu`."""
    from trl import SFTConfig

    config: Any = SFTConfig
    if _ORIGINAL in vars(config):
        config.__post_init__ = vars(config)[_ORIGINAL]
        delattr(config, _ORIGINAL)
