"""Quantized base weights: what bitsandbytes is told, and what an already-quantized checkpoint holds."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from fvlm_core.checkpoint import Source, tensor_names, weight_files
from fvlm_core.errors import CheckpointError, ConfigError
from fvlm_core.precision import Precision

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

# What bitsandbytes saves beside a quantized weight: the 4-bit state, or the scales of 8 bit.
_QUANTIZED = re.compile(r"\.weight\.quant_state\.bitsandbytes__\w+$|\.SCB$")


def quantization(precision: Precision, dtype: torch.dtype, unquantized: tuple[str, ...]) -> BitsAndBytesConfig | None:
    """What bitsandbytes is told to load a 16-bit checkpoint in ``precision``; None where it is not quantized.

    Args:
        precision: NF4 (with double quantization) or int8; anything else is not quantized.
        dtype: what quantized weights are computed in.
        unquantized: paths of the modules that stay as they are, with all that is below them
            (`fvlm_core.arch.ArchFacts.unquantized`).
    """
    from transformers import BitsAndBytesConfig

    if precision is Precision.NF4:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=list(unquantized),
        )
    if precision is Precision.INT8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(unquantized))
    return None


def stored_precision(config: dict[str, Any], name: str) -> Precision | None:
    """The precision that a checkpoint's own weights are quantized in; None for a checkpoint that is not quantized.

    Args:
        config: its ``config.json``.
        name: what the user called it, for the error.

    Raises:
        CheckpointError: it is quantized by something other than bitsandbytes.
    """
    stored = config.get("quantization_config")
    if not stored:
        return None
    method = stored.get("quant_method", "bitsandbytes")
    if stored.get("load_in_4bit") and method == "bitsandbytes":
        return Precision.NF4
    if stored.get("load_in_8bit") and method == "bitsandbytes":
        return Precision.INT8
    raise CheckpointError(
        f"{name!r} is quantized with {method!r}, and only bitsandbytes checkpoints can be fine-tuned: "
        "pass the 16-bit checkpoint it was made from."
    )


def settle_precision(asked: Precision | None, stored: Precision | None, name: str) -> Precision:
    """The precision to load in: what was asked for, or what the checkpoint is stored in, or 4 bit.

    Raises:
        ConfigError: the checkpoint is quantized, and another precision was asked for by name.
    """
    if stored is None:
        return asked or Precision.NF4
    if asked not in (None, stored):
        raise ConfigError(
            f"{asked.argument}=True does not fit {name!r}, whose weights are stored in {stored.value}: "
            f"leave it out or pass {stored.argument}=True, or pass the 16-bit checkpoint."
        )
    return stored


def adopt_stored_quantization(
    config: PreTrainedConfig, source: Source, dtype: torch.dtype, variant: str | None
) -> None:
    """Make ``config`` load an already-quantized checkpoint exactly as it is stored.

    The checkpoint's own list of unquantized modules is written for the transformers version and the module names that
    it was saved with. A mismatch would put 16-bit weights into quantized layers, so the list is derived anew from what
    is stored: a linear layer is quantized if and only if the checkpoint holds a quantization state for it.

    Args:
        config: changed in place.
        source: the checkpoint; its weights are downloaded if need be, and their headers read.
        dtype: what quantized weights are computed in.
        variant: of the weight files.

    Raises:
        CheckpointError: the checkpoint says it is quantized and holds no quantized weight.
    """
    from torch import nn

    names = {name for path in weight_files(source, variant) for name in tensor_names(path)}
    stored = {_QUANTIZED.sub("", name) for name in names if _QUANTIZED.search(name)}
    if not stored:
        raise CheckpointError(
            f"config.json of {source.name!r} has a quantization_config, and no stored weight is quantized: "
            "remove that key from it, or save the checkpoint again."
        )
    skeleton = build_skeleton(config)
    quantized = _renamed(stored, skeleton)
    kept = [name for name, module in skeleton.named_modules() if type(module) is nn.Linear and name not in quantized]
    config.quantization_config = {
        **config.quantization_config,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        # transformers matches these as regular expressions from the start of a name: "layers.1" would take "layers.10".
        "llm_int8_skip_modules": [f"{re.escape(name)}$" for name in kept],
    }


def cast_unquantized(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Hold in ``dtype`` what an already-quantized checkpoint stores unquantized.

    transformers leaves a tensor of such a checkpoint in its stored dtype if its name was changed on loading, as those
    of older layouts are. What the model keeps in float32 in any case stays there.
    """
    from bitsandbytes.nn import Int8Params, Params4bit
    from transformers.core_model_loading import build_glob_alternation

    plan = model._get_dtype_plan(dtype)
    kept = build_glob_alternation(list(plan))[0] if plan else None
    for name, parameter in model.named_parameters():
        quantized = isinstance(parameter, Params4bit | Int8Params)
        if not quantized and parameter.is_floating_point() and not (kept and kept.search(name)):
            parameter.data = parameter.data.to(dtype)


def keep_stored_layout(model: PreTrainedModel) -> None:
    """Let NF4 weights on the CPU stay in the layout that they are stored in.

    On a CPU with AVX512-BF16, bitsandbytes rearranges a weight for good at its first forward pass in evaluation mode.
    From then on the layer computes in bfloat16 and passes no gradient on, so that a model that was asked something
    before its training could not be trained.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def build_skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of ``config`` without memory for its weights."""
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        skeleton: PreTrainedModel = AutoModelForImageTextToText.from_config(config)
    return skeleton


def _renamed(modules: set[str], skeleton: PreTrainedModel) -> set[str]:
    """The names that modules of a checkpoint have in the model it is loaded into (transformers renames old layouts)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(skeleton)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    state = skeleton.state_dict()
    return {
        rename_source_key(f"{name}.weight", renamings, converters, skeleton.base_model_prefix, state)[0].removesuffix(
            ".weight"
        )
        for name in modules
    }
