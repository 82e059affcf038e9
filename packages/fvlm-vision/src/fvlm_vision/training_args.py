"""The trainer's settings, brought into agreement with the model: always on a copy, and said in one log line."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig

from fvlm_core.errors import ConfigError
from fvlm_core.origin import origin_of
from fvlm_vision.processes import check_world, fit_processes, refuse_sharding

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

logger = logging.getLogger(__name__)

_UNUSABLE = (
    ("packing", False, "samples with images are not regrouped; padding_free=True puts each batch into one row"),
    ("eval_packing", (None, False), "samples with images are not regrouped"),
    ("loss_type", "nll", "the loss is the model's own"),
    ("use_liger_kernel", False, "it would replace the model's forward"),
    ("label_smoothing_factor", 0.0, "the loss is the model's own"),
    ("truncation_mode", "keep_start", "cutting the start would cut images"),
    ("completion_only_loss", (None, True), "use messages to learn the prompt as well"),
)
_CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")
"""The setting's name, and the one that transformers 5.23 has beside it and reads."""


def own_copy(args: TrainingArguments | None) -> SFTConfig:
    """Return the settings as an `SFTConfig` of the trainer's own: what the user passed is never changed.

    Raises:
        ConfigError: a setting asks for what cannot be done with images.
    """
    if args is None:
        own = SFTConfig(bf16=is_torch_bf16_gpu_available())  # its own default raises where there is no such device
    elif isinstance(args, SFTConfig):
        own = copy.copy(args)
        own.accelerator_config = copy.copy(args.accelerator_config)
        for name in _CHECKPOINTING:
            if f"{name}_kwargs" in vars(args):
                setattr(own, f"{name}_kwargs", copy.copy(vars(args)[f"{name}_kwargs"]))
    else:
        settings = args.to_dict()
        settings["hub_token"] = args.hub_token  # to_dict hides it
        own = SFTConfig(**settings)
    refuse_sharding(own)
    for name, usable, why in _UNUSABLE:
        value = getattr(own, name)
        if value not in (usable if isinstance(usable, tuple) else (usable,)):
            raise ConfigError(f"{name}={value!r} in the training arguments cannot be used here: {why}; leave it out.")
    return own


def align(args: SFTConfig, model: PreTrainedModel) -> None:
    """Set precision, checkpointing, columns and devices of the trainer's own copy by what the model is.

    Args:
        args: changed in place.
        model: where FVLM loaded it, its precision and checkpointing win over the settings.
    """
    changed: dict[str, Any] = {}

    def put(name: str, value: Any) -> None:
        if getattr(args, name) != value:
            changed[name] = value
            setattr(args, name, value)

    origin = origin_of(model)
    on_cpu = args.device.type == "cpu"
    if origin is not None or on_cpu:
        dtype = getattr(torch, origin.dtype) if origin is not None else model.dtype
        put("bf16", dtype == torch.bfloat16)
        put("fp16", dtype == torch.float16 and not on_cpu)
        args.mixed_precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    if origin is not None:
        for name in _CHECKPOINTING:
            if name in vars(args):
                put(name, False)  # the model's own mode stands
    if on_cpu:
        vars(args)["_setup_devices"] = torch.device("cpu")  # "cpu:1" of a second process is no place to load to
    check_world(args)
    if args.world_size > 1:
        fit_processes(args, model)
    if args.n_gpu > 1:
        # One process with several GPUs: nn.DataParallel cannot hold quantized or dispatched models.
        args._n_gpu = 1
        changed["n_gpu"] = 1
    if changed:
        settings = ", ".join(f"{name}={value}" for name, value in changed.items())
        logger.info("Training settings follow the model: %s.", settings)
    if args.device.type == "cuda" and args.dataloader_pin_memory:
        moving: Any = args.accelerator_config
        moving.non_blocking = True  # else each batch waits until the device has done all before it
    # Not said: these only keep trl from preparing rows that the collator prepares.
    args.remove_unused_columns = False
    given = args.dataset_kwargs if isinstance(args.dataset_kwargs, dict) else {}
    args.dataset_kwargs = {**given, "skip_prepare_dataset": True}


def sequence_limit(args: SFTConfig, model: PreTrainedModel) -> int | None:
    """Return the most tokens a sample may have: the smaller of `model.max_seq_length` and a chosen `max_length`.

    SFTConfig's default of `max_length` is not a choice where the model has a limit of its own.
    """
    of_model: int | None = getattr(model, "max_seq_length", None)
    default = type(args).__dataclass_fields__["max_length"].default
    if of_model is not None and args.max_length == default:
        return of_model
    limits = [limit for limit in (of_model, args.max_length) if limit is not None]
    return min(limits, default=None)
