"""LoRA on a loaded model: what the user asked for, checked, and put on by PEFT."""

from __future__ import annotations

import dataclasses
import re
from contextlib import contextmanager
from difflib import get_close_matches
from math import isfinite
from typing import TYPE_CHECKING, Any, cast

from fvlm_core.errors import ConfigError
from fvlm_core.options import check_flag
from fvlm_vision.arguments import is_integer, is_positive

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

# Options of this package beside those of PEFT's LoraConfig.
OWN_OPTIONS = ("target_modules", "finetune_projector_layers", "finetune_last_n_layers")
# What LoraConfig has and get_peft_model takes no second word on: set from its arguments, from the selection of modules,
# or by PEFT itself; and what would change the model's layers.
_SETTLED = frozenset(
    {
        "r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "loftq_config",
        "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode",
        "exclude_modules", "layers_to_transform", "layers_pattern", "layer_replication", "fan_in_fan_out",
        "megatron_config", "megatron_core",
    }
)  # fmt: skip
_BIASES = ("none", "all", "lora_only")


def check_numbers(r: Any, lora_alpha: Any, lora_dropout: Any, bias: Any, random_state: Any, use_rslora: Any) -> None:
    """Check the LoRA arguments that PEFT would take without a word.

    Raises:
        ConfigError: one cannot be used.
    """
    if not is_positive(r):
        raise ConfigError(f"r={r!r} is not a LoRA rank: pass a whole number of at least 1, such as 16.")
    if not _is_number(lora_alpha) or not lora_alpha > 0:
        raise ConfigError(f"lora_alpha={lora_alpha!r} is not a LoRA scale: pass a number above 0, such as 16.")
    if not _is_number(lora_dropout) or not 0 <= lora_dropout < 1:
        raise ConfigError(f"lora_dropout={lora_dropout!r} is not a dropout rate: pass a number from 0 to below 1.")
    if bias not in _BIASES:
        raise ConfigError(f"bias={bias!r} is not a choice of biases: pass one of {', '.join(map(repr, _BIASES))}.")
    check_flag("use_rslora", use_rslora)
    if random_state is not None and (not is_integer(random_state) or not 0 <= random_state < 2**63):
        raise ConfigError(f"random_state={random_state!r} is not a seed: pass a whole number of at least 0, or None.")


def check_lora_options(options: dict[str, Any]) -> None:
    """Refuse options that neither this package nor PEFT's LoraConfig knows, and switches that are no boolean.

    Raises:
        ConfigError: one is unknown (the message names the nearest known one), or is neither True nor False.
    """
    fields = _lora_fields()
    known = sorted({*OWN_OPTIONS, *fields})
    for name, value in options.items():
        if name in known:
            if fields.get(name) in (bool, "bool"):
                check_flag(name, value)
            continue
        if name in ("exclude_modules", "layers_to_transform", "layers_pattern"):
            raise ConfigError(f"{name!r} is not taken: choose modules by target_modules or finetune_last_n_layers.")
        near = get_close_matches(name, known, n=1)
        hint = f"the nearest one is {near[0]!r}." if near else f"known options are {', '.join(known)}."
        raise ConfigError(f"{name!r} is not an option of get_peft_model: {hint}")


def check_names(options: dict[str, Any], model: PreTrainedModel, targets: Sequence[str]) -> None:
    """Refuse names of modules that PEFT would pass over, at most with a warning: they would change nothing.

    Args:
        options: of `get_peft_model`, of which ``modules_to_save``, ``rank_pattern`` and ``alpha_pattern`` hold names.
        model: the one to adapt.
        targets: full names of the modules that get an adapter.

    Raises:
        ConfigError: a name means no module of the model, or a pattern none of those that get an adapter, or nothing.
    """
    saved = options.get("modules_to_save")
    if saved is not None:
        if not isinstance(saved, list | tuple | set | frozenset) or not all(isinstance(name, str) for name in saved):
            raise ConfigError(f"modules_to_save={saved!r} is not a list of names: pass one, such as ['lm_head'].")
        names = [name for name, _ in model.named_modules()]
        for entry in saved:
            if not entry or not any(name.endswith(entry) for name in names):
                raise ConfigError(
                    f"modules_to_save: {entry!r} is the end of no module's name in this {model.config.model_type!r} "
                    "model: see model.named_modules() for the names."
                )
    for option in ("rank_pattern", "alpha_pattern"):
        patterns = options.get(option)
        if patterns is not None and not isinstance(patterns, dict):
            raise ConfigError(f"{option}={patterns!r} is not a dictionary from names to numbers: pass one.")
        for pattern in patterns or ():
            try:
                compiled = re.compile(rf"(.*\.)?({pattern})$")  # as PEFT does
            except re.error as error:
                raise ConfigError(
                    f"{option}: {pattern!r} is not a regular expression ({error}): mend it, or write a module's name."
                ) from None
            if not any(map(compiled.match, targets)):
                raise ConfigError(
                    f"{option}: {pattern!r} matches none of the {len(targets)} modules that get an adapter, such as "
                    f"{targets[0]!r}: correct it, or leave it out."
                )


def build_lora_config(
    modules: list[str], *, loftq_config: Any, quantized: bool, revision: str | None, **options: Any
) -> LoraConfig:
    """PEFT's configuration for LoRA on exactly ``modules``.

    Args:
        modules: full names of the modules that get an adapter.
        loftq_config: PEFT's LoftQConfig or its fields; giving one asks for LoftQ initialization.
        quantized: whether the base weights are quantized already.
        revision: of the base model on the Hub; noted in the adapter, so that PEFT loads the same base.
        **options: further fields of LoraConfig.

    Raises:
        ConfigError: PEFT refuses the combination, or LoftQ is asked for on quantized weights or without a GPU.
    """
    import torch
    from peft import LoraConfig

    if loftq_config:
        if options.setdefault("init_lora_weights", "loftq") != "loftq":
            raise ConfigError(
                f"loftq_config and init_lora_weights={options['init_lora_weights']!r} contradict each other: "
                "leave one of them out."
            )
        options["loftq_config"] = loftq_config
    if options.get("init_lora_weights") == "loftq" and quantized:
        raise ConfigError(
            "LoftQ quantizes the base weights itself, and this model's are quantized already: "
            "load it with load_in_16bit=True, or leave loftq_config out."
        )
    if options.get("init_lora_weights") == "loftq" and not (torch.cuda.is_available() or torch.xpu.is_available()):
        raise ConfigError("LoftQ is computed on a GPU, and there is none here: leave loftq_config out.")
    try:
        return LoraConfig(target_modules=modules, task_type="CAUSAL_LM", revision=revision, **options)
    except (ImportError, TypeError, ValueError) as error:
        raise ConfigError(f"PEFT refuses these LoRA options: {_one_line(error)}") from None


@contextmanager
def seeded(random_state: int | None, model: PreTrainedModel) -> Iterator[None]:
    """Draw from ``random_state`` inside and leave the global random state as it was; None: draw from that one."""
    import torch

    if random_state is None:
        yield
        return
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(random_state)
        yield


def freeze_other_biases(model: PeftModel) -> None:
    """Freeze the biases of the towers without an adapter, which PEFT's ``bias="all"`` would train too."""
    from fvlm_core.arch import facts_for, plain_modules, tower_of

    facts = facts_for(model)
    targeted = cast("list[str]", model.base_model.targeted_module_names)
    towers = {tower_of(name, facts) for name in targeted}
    for name, module in plain_modules(model):
        bias = module._parameters.get("bias")
        if bias is not None and tower_of(name, facts) not in towers:
            bias.requires_grad_(False)


def _lora_fields() -> dict[str, Any]:
    """PEFT's options by name, with their types (which are text where PEFT postpones annotations)."""
    from peft import LoraConfig

    fields = (field for field in dataclasses.fields(LoraConfig) if field.init)
    return {field.name: field.type for field in fields if field.name not in _SETTLED}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
