"""A checkpoint folder or Hub id → a model in the asked precision, on the asked devices."""

from __future__ import annotations

import copy
import logging
import re
from typing import TYPE_CHECKING, Any, cast

from fvlm_core.checkpoint import GENERATION_CONFIG, Source, check_weights, find_source, read_config
from fvlm_core.checkpointing import use_graphs
from fvlm_core.errors import CheckpointError, ConfigError, MissingExtraError
from fvlm_core.fused import fuse_model
from fvlm_core.graphs import LayerGraphs
from fvlm_core.options import HUB_OPTIONS, MODEL_OPTIONS, check_flag, check_options
from fvlm_core.origin import Origin, set_origin
from fvlm_core.placement import check_places, choose_device_map, enter_device, main_device
from fvlm_core.precision import Precision, choose_dtype, within_range
from fvlm_core.quantized import (
    adopt_stored_quantization,
    build_skeleton,
    cast_unquantized,
    keep_stored_layout,
    quantization,
    settle_precision,
    stored_precision,
)

if TYPE_CHECKING:
    import os

    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from fvlm_core.arch import ArchFacts

logger = logging.getLogger(__name__)


def load_model(
    model_name: str | os.PathLike[str],
    *,
    precision: Precision | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = "sequential",
    token: str | bool | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    fused_layers: bool | None = None,
    memory_budget: float | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load an image-text-to-text model.

    Args:
        model_name: a folder or a Hub id with a transformers checkpoint in safetensors.
        precision: how its base weights are held; None: as they are stored if the checkpoint is quantized, else 4 bit.
        dtype: what is not quantized is held in it, and all is computed in it; see `fvlm_core.precision.choose_dtype`.
        device_map: see `fvlm_core.placement.choose_device_map`.
        token: for private or gated repositories of the Hub. It is passed on and never kept.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run model code that the checkpoint brings along.
        fused_layers: run fused layers in the place of the model's own (`fvlm_core.fused`); None: where the whole model
            lies on one GPU.
        memory_budget: GiB of device memory that may be allocated in all while ``use_gradient_checkpointing="auto"``
            chooses what layers keep, the one mode that takes it; None: what is free, less a reserve
            (`fvlm_core.graphs.room`).
        **kwargs: options of transformers' ``from_pretrained``: those of `fvlm_core.options`.

    Returns:
        The model in evaluation mode, with its `Origin` set. Under `Precision.FULL` every parameter requires a gradient;
        under the others none does, since adapters are to be put on it.

    Raises:
        ConfigError: an argument cannot be used, or contradicts how the checkpoint is stored.
        CheckpointError: the checkpoint is missing, damaged, incomplete, or of a kind that cannot be loaded.
    """
    check_options(kwargs)
    check_flag("trust_remote_code", trust_remote_code)
    if fused_layers is not None:
        check_flag("fused_layers", fused_layers)
    hub = {key: value for key, value in kwargs.items() if key in HUB_OPTIONS}
    options = {key: value for key, value in kwargs.items() if key in MODEL_OPTIONS}
    graphs = LayerGraphs(memory_budget=memory_budget)
    source = find_source(model_name, revision, token, **hub)
    placed = choose_device_map(device_map)
    enter_device(placed)
    if "max_memory" in options and isinstance(placed, dict):
        logger.warning("max_memory does nothing here: %s places the whole model.", placed)
    chosen_dtype = choose_dtype(dtype, main_device(placed))
    stored = stored_precision(read_config(source, trust_remote_code), source.name)
    settled = settle_precision(precision, stored, source.name)
    check_weights(source, options.get("variant"))
    config = _build_config(source, trust_remote_code, options.get("code_revision"))
    if "attn_implementation" in options:
        _check_attention(config, options["attn_implementation"], trust_remote_code)
    if isinstance(device_map, dict) and set(device_map) != {""}:
        check_places(device_map, build_skeleton(config))
    chosen_dtype = within_range(chosen_dtype, dtype, _written_facts(config))
    if stored is not None:
        adopt_stored_quantization(config, source, chosen_dtype, options.get("variant"))
    elif settled.quantized:
        options["quantization_config"] = quantization(settled, chosen_dtype, _unquantized(config))
    model = _read_weights(
        source, config, dtype=chosen_dtype, device_map=placed, trust_remote_code=trust_remote_code, **options
    )
    if stored is not None:
        cast_unquantized(model, chosen_dtype)
    if settled is Precision.NF4:
        keep_stored_layout(model)
    model.requires_grad_(settled is Precision.FULL)
    if "attn_implementation" not in options:
        _attend_packed(model)
    _speed_up(model, fused_layers, graphs, memory_budget)
    origin = Origin(
        source=source.name,
        revision=revision,
        precision=settled,
        source_quantized=stored is not None,
        dtype=str(chosen_dtype).removeprefix("torch."),
        trust_remote_code=trust_remote_code,
    )
    set_origin(model, origin)
    return model


def _speed_up(model: PreTrainedModel, fused_layers: bool | None, graphs: LayerGraphs, budget: float | None) -> None:
    """Fuse a model's layers and let them be recorded, as asked for and as far as where it lies allows.

    Raises:
        ConfigError: fused layers or a budget for recordings are asked for, and cannot be had.
    """
    devices = sorted({str(p.device) for p in model.parameters()})
    on_gpu = len(devices) == 1 and model.device.type == "cuda"
    if len(devices) > 1:
        # accelerate hooks every module of such a model, and a hooked module keeps its forward.
        if fused_layers is True:
            raise ConfigError(
                f"fused_layers=True cannot be had for a model that lies on {', '.join(devices)}: leave it out, or load "
                "the model onto one device."
            )
        logger.info("The model lies on %s: its layers are neither fused nor CUDA graphs.", ", ".join(devices))
    elif fused_layers is True or (fused_layers is None and on_gpu):
        logger.info("%s", fuse_model(model).summary)
    if on_gpu and fused_layers is not False:
        use_graphs(model, graphs)
    elif budget is not None:
        raise ConfigError(
            f"memory_budget={budget!r} has nothing to plan: layers keep what they compute only as CUDA graphs, "
            "which need fused layers and a model that lies on one GPU as a whole; leave it out."
        )


def _build_config(source: Source, trust_remote_code: bool, code_revision: str | None) -> PreTrainedConfig:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    code = {"code_revision": code_revision} if code_revision else {}
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            source.name, trust_remote_code=trust_remote_code, **source.options, **code
        )
    except (AttributeError, KeyError, TypeError, ValueError, StrictDataclassError) as error:
        raise CheckpointError(
            f"config.json of {source.name!r} cannot be used ({type(error).__name__}: {_first_line(error)}): "
            "save or download the checkpoint again."
        ) from None
    _check_task(config, source)
    return config


def _check_attention(config: PreTrainedConfig, chosen: Any, trust_remote_code: bool) -> None:
    """Refuse an attention that this model, or this machine, cannot have, before weights are read."""
    import torch
    from transformers import AutoModelForImageTextToText

    try:
        with torch.device("meta"):
            AutoModelForImageTextToText.from_config(
                copy.deepcopy(config), attn_implementation=chosen, trust_remote_code=trust_remote_code
            )
    except ImportError as error:
        raise MissingExtraError(
            f"attn_implementation={chosen!r} needs a package that is not here ({_first_line(error)}): install it, or "
            "pass 'sdpa'."
        ) from None
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ConfigError(
            f"attn_implementation={chosen!r} is none that a {config.model_type} model can have: pass 'sdpa', 'eager', "
            "'flash_attention_2' or another of transformers' names, or leave it out."
        ) from None


def _check_task(config: PreTrainedConfig, source: Source) -> None:
    """Refuse a model that takes no images."""
    from transformers import AutoModelForImageTextToText

    brings_code = "AutoModelForImageTextToText" in (getattr(config, "auto_map", None) or {})
    if type(config) not in AutoModelForImageTextToText._model_mapping and not brings_code:
        raise CheckpointError(
            f"{source.name!r} is a {config.model_type!r} model, which is not one that takes images and text and gives "
            "text: pass a vision-language checkpoint."
        )


def _written_facts(config: PreTrainedConfig) -> ArchFacts | None:
    from fvlm_core.arch import facts_by_type

    vision_type = config.vision_config.model_type if "vision_config" in config.sub_configs else None
    return facts_by_type(config.model_type, vision_type)


def _unquantized(config: PreTrainedConfig) -> tuple[str, ...]:
    """What transformers is told not to quantize.

    It takes a name as a regular expression from the start of a module's name, so that ``mlp.gate`` would take
    ``mlp.gate_proj`` with it. The written facts name whole towers, which nothing else starts like (tested for every
    family); what is derived for other models is closed off.
    """
    from fvlm_core.arch import facts_for

    facts = _written_facts(config)
    if facts is not None:
        return facts.unquantized
    return tuple(rf"{re.escape(name)}(\.|$)" for name in facts_for(build_skeleton(config)).unquantized)


def _read_weights(source: Source, config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText

    source.json(GENERATION_CONFIG)  # transformers takes anything for it, and fails later
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            source.name,
            config=config,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are reported, and refused below with one sentence
            output_loading_info=True,
            # Where transformers looks for an adapter in the model's repository: else at the default branch, by network.
            adapter_kwargs={key: value for key, value in source.options.items() if key != "token"},
            **source.options,
            **options,
        )
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"The weights of {source.name!r} cannot be read ({_first_line(error)}): check that it has safetensors "
            "files, the network and the token."
        ) from None
    model: PreTrainedModel = loaded[0]
    report: dict[str, Any] = loaded[1]
    if report["mismatched_keys"]:
        name, stored, expected = sorted(report["mismatched_keys"])[0]
        raise CheckpointError(
            f"{source.name!r} stores {name!r} with shape {tuple(stored)}, and its config.json asks for "
            f"{tuple(expected)}: use the config.json that belongs to these weights."
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{source.name!r} lacks {len(missing)} of the weights of a {config.model_type!r} model, such as "
            f"{missing[0]!r}: save or download the checkpoint again."
        )
    if report["unexpected_keys"]:
        unexpected = sorted(report["unexpected_keys"])
        logger.warning("%d weights of %s are not used, such as %s.", len(unexpected), source.name, unexpected[0])
    return model


def _attend_packed(model: PreTrainedModel) -> None:
    """Spare vision towers that pack their images the loop over them; same values, see `fvlm_core.attention`."""
    from fvlm_core.arch import facts_for
    from fvlm_core.attention import use_varlen_attention

    facts = facts_for(model)
    if facts.packs_images:
        for path in facts.vision:
            use_varlen_attention(cast("PreTrainedModel", model.get_submodule(path)))


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".:") if text else type(error).__name__
