"""The `train` section of a config → `trl.SFTConfig`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, SupportsIndex

from trl import SFTConfig

from fvlm_cli.config.nearest import hint
from fvlm_cli.config.schema import TrainConfig, TrainSection
from fvlm_core.errors import ConfigError

if TYPE_CHECKING:
    from fvlm_core.arch import Tower

TOWERS: tuple[Tower, ...] = ("vision", "projector", "language")
"""Those that may have a learning rate of their own."""

# What other keys of the config, or the run itself, settle.
_SETTLED = frozenset(
    {
        "output_dir", "do_train", "do_eval", "do_predict", "eval_strategy", "save_strategy", "resume_from_checkpoint",
        "disable_tqdm", "bf16", "fp16", "max_length", "gradient_checkpointing", "model_init_kwargs",
        "trust_remote_code", "hub_token",
    }
)  # fmt: skip


class RunArguments(SFTConfig):
    """Arguments that tell trackers and files what the config said where it referred to the environment or another key.

    A copy is whole; what is pickled, as transformers does beside each checkpoint, is a plain `SFTConfig`.

    Attributes:
        written: the names of those arguments, and what was written.
    """

    written: ClassVar[dict[str, Any]] = {}

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments, as trackers log them."""
        return {**super().to_dict(), **self.written}  # type: ignore[no-untyped-call]

    def __copy__(self) -> RunArguments:
        whole = object.__new__(RunArguments)
        vars(whole).update(vars(self))
        return whole

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        told = object.__new__(SFTConfig)
        vars(told).update({**vars(self), **self.written})
        del vars(told)["written"]
        return told.__reduce_ex__(1)  # later protocols hold only what is of the pickled object's own class


def training_arguments(config: TrainConfig, checkpoints: Path, evaluates: bool) -> RunArguments:
    """Return the trainer's arguments.

    Args:
        config: the whole config.
        checkpoints: the folder that checkpoints go to.
        evaluates: whether there is anything to evaluate on.

    Raises:
        ConfigError: `train.extra` has a name that SFTConfig does not know or that another key settles, or SFTConfig
            refuses a value.
    """
    import torch

    train = config.train
    known = {field.name for field in dataclasses.fields(SFTConfig) if field.init}
    _check_extra(train, known)
    elsewhere = {"extra", "max_steps", "eval_steps", "save_steps", *(f"{tower}_learning_rate" for tower in TOWERS)}
    named = train.model_dump(exclude=elsewhere)
    arguments: dict[str, Any] = {
        **named,
        "max_steps": train.max_steps or -1,
        "output_dir": str(checkpoints),
        "save_strategy": "epoch" if train.save_steps is None else "steps",
        "eval_strategy": "no" if not evaluates else "epoch" if train.eval_steps is None else "steps",
        "disable_tqdm": True,
        # The trainer sets both by what the model is; SFTConfig's own default raises on a CPU.
        "bf16": False,
        "gradient_checkpointing": False,
    }
    if train.save_steps is not None:
        arguments["save_steps"] = train.save_steps
    if train.eval_steps is not None:
        arguments["eval_steps"] = train.eval_steps
    if not torch.cuda.is_available():
        arguments["dataloader_pin_memory"] = False  # there is nothing to pin it for, as torch would warn
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            arguments["use_cpu"] = True  # accelerate looks for other processes on a CPU only where it is told to
    try:
        made = RunArguments(**{**arguments, **train.extra})
    except (ImportError, TypeError, ValueError) as error:
        raise ConfigError(f"the train section cannot be used: {' '.join(str(error).split())}") from None
    vars(made)["written"] = config.references("train")
    return made


def _check_extra(train: TrainSection, known: set[str]) -> None:
    for name in train.extra:
        if name in TrainSection.model_fields:
            raise ConfigError(f"train.extra.{name} is a key of its own; write it as train.{name}.")
        if name in _SETTLED:
            raise ConfigError(f"train.extra.{name} is settled by the run itself; leave it out.")
        if name not in known:
            raise ConfigError(f"train.extra.{name} is no argument of trl.SFTConfig; {hint(name, known - _SETTLED)}")
