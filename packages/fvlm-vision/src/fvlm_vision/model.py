"""FastVisionModel: load a vision-language model, put LoRA on it, and switch between training and inference."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from fvlm_core.checkpoint import find_source
from fvlm_core.checkpointing import apply_checkpointing, budget_of, canonical_mode, remove_checkpointing
from fvlm_core.errors import ConfigError
from fvlm_core.load import load_model
from fvlm_core.options import HUB_OPTIONS, check_options
from fvlm_core.origin import origin_of
from fvlm_core.precision import Precision, explicit_precision
from fvlm_vision import modes
from fvlm_vision.adapter import attach_adapter, find_adapter
from fvlm_vision.binding import bind_methods
from fvlm_vision.cpu_config import let_defaults_fit_the_cpu
from fvlm_vision.engine import attach_engine, check_engine, engine_options
from fvlm_vision.lora import (
    build_lora_config,
    check_lora_options,
    check_names,
    check_numbers,
    freeze_other_biases,
    seeded,
)
from fvlm_vision.processor import check_length, load_processor
from fvlm_vision.targets import select_targets

if TYPE_CHECKING:
    import os

    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, ProcessorMixin

logger = logging.getLogger(__name__)

_DEFAULT_MODEL = "unsloth/Llama-3.2-11B-Vision-Instruct-bnb-4bit"


class FastVisionModel:
    """Load, adapt and switch vision-language models. All methods are static; what they return are transformers and PEFT
    models.

    Example::

        model, processor = FastVisionModel.from_pretrained("path/to/checkpoint", load_in_4bit=True)
        model = FastVisionModel.get_peft_model(model, r=16, lora_alpha=32)
        FastVisionModel.for_training(model)
    """

    @staticmethod
    def from_pretrained(
        model_name: str | os.PathLike[str] = _DEFAULT_MODEL,
        max_seq_length: int = 2048,
        dtype: torch.dtype | str | None = None,
        load_in_4bit: bool | None = None,
        load_in_8bit: bool = False,
        load_in_16bit: bool = False,
        full_finetuning: bool = False,
        token: str | bool | None = None,
        device_map: Any = "sequential",
        trust_remote_code: bool = False,
        use_gradient_checkpointing: bool | str = "unsloth",
        revision: str | None = None,
        fast_inference: bool = False,
        gpu_memory_utilization: float = 0.5,
        **kwargs: Any,
    ) -> tuple[PreTrainedModel | PeftModel, ProcessorMixin]:
        """Load a checkpoint, or a saved adapter on its base, and its processor.

        Args:
            model_name: a folder or a Hub id. One that holds an ``adapter_config.json`` is an adapter: its base is
                loaded in the precision asked for and the adapter attached, trainable.
            max_seq_length: the longest sample in tokens; kept as ``model.max_seq_length``, where the collator finds it.
            dtype: of what is not quantized, and of the computation. None: bfloat16 where the device has it, else
                float16; float32 on the CPU.
            load_in_4bit: NF4 with double quantization. None (not given): True unless another precision is chosen, and
                an already-quantized checkpoint loads as it is stored. False with nothing else chosen: 16 bit.
            load_in_8bit: int8.
            load_in_16bit: not quantized, frozen.
            full_finetuning: not quantized, every parameter trainable.
            token: for private or gated repositories; passed on, never kept.
            device_map: ``"sequential"`` and the other strategies of accelerate, a device, or a dictionary.
            trust_remote_code: run model code that the checkpoint brings along.
            use_gradient_checkpointing: False, True, ``"offload"`` (``"unsloth"``) or ``"auto"``; see
                `fvlm_core.checkpointing`.
            revision: branch, tag or commit on the Hub; it does not go with a folder.
            fast_inference: start a vLLM engine on the same checkpoint, as ``model.vllm_engine`` and
                ``model.fast_generate``.
            gpu_memory_utilization: the share of the GPU's memory that this engine may take, above 0 and up to 1.
            **kwargs: ``max_lora_rank`` of the adapters that the engine serves (vLLM's default is 16), and further
                options of loading, such as ``attn_implementation``, ``cache_dir``, ``fused_layers`` or
                ``memory_budget``; see `fvlm_core.load.load_model`.

        Returns:
            The model in evaluation mode and its processor. The model carries ``save_pretrained_merged`` and
            ``push_to_hub_merged``.

        Raises:
            ConfigError: an argument cannot be used, or two contradict each other.
            CheckpointError: the checkpoint is missing, damaged, or of a kind that cannot be loaded.
            MissingExtraError: ``fast_inference`` without vLLM.
        """
        precision = explicit_precision(load_in_4bit, load_in_8bit, load_in_16bit, full_finetuning)
        canonical_mode(use_gradient_checkpointing, kwargs.get("memory_budget"))
        max_lora_rank = kwargs.pop("max_lora_rank", None)
        check_engine(fast_inference, gpu_memory_utilization, max_lora_rank)
        check_length(max_seq_length)
        check_options(kwargs)
        hub = {key: value for key, value in kwargs.items() if key in HUB_OPTIONS}
        source = find_source(model_name, revision, token, **hub)
        if revision is not None and source.folder is not None:
            raise ConfigError(f"revision={revision!r} is of the Hub, and {source.name!r} is a folder: leave it out.")
        adapter = find_adapter(source)
        if adapter is not None and precision is Precision.FULL:
            raise ConfigError(
                f"full_finetuning=True does not fit {source.name!r}, which is an adapter: merge it first, or choose "
                "another precision."
            )
        base = source if adapter is None else adapter.base
        model = load_model(
            base.name,
            precision=precision,
            dtype=dtype,
            device_map=device_map,
            token=token,
            revision=base.revision,
            trust_remote_code=trust_remote_code,
            **{**_without(kwargs, HUB_OPTIONS), **base.hub},
        )
        if model.device.type == "cpu":
            let_defaults_fit_the_cpu()
        check_length(max_seq_length, model)
        vars(model)["max_seq_length"] = max_seq_length
        processor = load_processor(source, adapter, trust_remote_code)
        if fast_inference:
            options = engine_options(model, max_seq_length, gpu_memory_utilization, token, max_lora_rank)
            attach_engine(model, options)
        bind_methods(model)
        if adapter is None:
            apply_checkpointing(model, use_gradient_checkpointing)
            return model, processor
        adapted = attach_adapter(model, adapter)
        bind_methods(adapted)
        apply_checkpointing(adapted, use_gradient_checkpointing)
        return adapted, processor

    @staticmethod
    def get_peft_model(
        model: PreTrainedModel,
        finetune_vision_layers: bool = True,
        finetune_language_layers: bool = True,
        finetune_attention_modules: bool = True,
        finetune_mlp_modules: bool = True,
        r: int = 16,
        lora_alpha: float = 16,
        lora_dropout: float = 0,
        bias: str = "none",
        use_gradient_checkpointing: bool | str = "unsloth",
        random_state: int | None = 3407,
        use_rslora: bool = False,
        loftq_config: Any = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Put LoRA on the chosen parts of a model.

        Args:
            model: from `from_pretrained`, without an adapter.
            finetune_vision_layers: adapters in the vision tower.
            finetune_language_layers: adapters in the language model.
            finetune_attention_modules: adapters on attention projections.
            finetune_mlp_modules: adapters on MLP layers.
            r: rank.
            lora_alpha: the adapters' product is scaled by ``lora_alpha / r`` (``/ sqrt(r)`` with ``use_rslora``).
            lora_dropout: dropout in front of the adapters, from 0 to below 1.
            bias: ``"none"``, ``"all"`` (of the towers with adapters) or ``"lora_only"``: which biases are trained.
            use_gradient_checkpointing: as in `from_pretrained`; this is the later word.
            random_state: seed of the adapters' initial weights; the global random state is left as it was. None: draw
                from the global one.
            use_rslora: rank-stabilized scaling.
            loftq_config: LoftQ initialization by this configuration (on a model that is not quantized).
            **kwargs: ``target_modules`` (list, regular expression or ``"all-linear"``), ``finetune_projector_layers``,
                ``finetune_last_n_layers``, and fields of PEFT's LoraConfig, such as ``modules_to_save``, ``use_dora``
                or ``init_lora_weights``.

        Returns:
            The model with adapters, in training mode. ``model.fvlm_targets`` says what was chosen, tower by tower.

        Raises:
            ConfigError: an argument cannot be used, the choice selects nothing, or the model cannot take an adapter.
        """
        check_numbers(r, lora_alpha, lora_dropout, bias, random_state, use_rslora)
        check_lora_options(kwargs)
        _check_base(model)
        canonical_mode(use_gradient_checkpointing, budget_of(model))
        selection = select_targets(
            model,
            vision=finetune_vision_layers,
            language=finetune_language_layers,
            attention=finetune_attention_modules,
            mlp=finetune_mlp_modules,
            projector=kwargs.pop("finetune_projector_layers", False),
            last_n_layers=kwargs.pop("finetune_last_n_layers", None),
            target_modules=kwargs.pop("target_modules", None),
        )
        check_names(kwargs, model, selection.modules)
        origin = origin_of(model)
        config = build_lora_config(
            list(selection.modules),
            loftq_config=loftq_config,
            quantized=origin is not None and origin.precision.quantized,
            revision=origin.revision if origin is not None else None,
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            bias=bias,
            use_rslora=use_rslora,
            **kwargs,
        )
        adapted = _inject(model, config, random_state)
        if bias == "all":
            freeze_other_biases(adapted)
        vars(adapted)["fvlm_targets"] = selection
        logger.info("LoRA of rank %d:\n%s", r, selection.table)
        bind_methods(adapted)
        apply_checkpointing(adapted, use_gradient_checkpointing)
        modes.for_training(adapted)
        return adapted

    @staticmethod
    def for_training(model: PreTrainedModel | PeftModel) -> None:
        """Switch to training: train mode, the checkpointing mode that was chosen, no key-value cache."""
        modes.for_training(model)

    @staticmethod
    def for_inference(model: PreTrainedModel | PeftModel) -> None:
        """Switch to inference: evaluation mode, no checkpointing, with the key-value cache."""
        modes.for_inference(model)


def _check_base(model: Any) -> None:
    """Check that an adapter can be put on ``model``.

    Raises:
        ConfigError: it has one, or is fully finetuned, or is no model at all.
    """
    from peft import PeftModel
    from transformers import PreTrainedModel

    if isinstance(model, PeftModel):
        raise ConfigError("The model has an adapter already: train it as it is, or load the base model without one.")
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(f"model is a {type(model).__name__}: pass the model that from_pretrained returned.")
    origin = origin_of(model)
    if origin is not None and origin.precision is Precision.FULL:
        raise ConfigError(
            "The model was loaded with full_finetuning=True, which trains every parameter and takes no adapter: leave "
            "get_peft_model out, or load it with load_in_16bit=True."
        )


def _inject(model: PreTrainedModel, config: Any, random_state: int | None) -> PeftModel:
    from peft import get_peft_model

    # PEFT makes the embeddings want a gradient where it finds checkpointing on: a frozen tower would keep activations.
    remove_checkpointing(model)
    with seeded(random_state, model):
        try:
            adapted: PeftModel = get_peft_model(model, config)
        except (ImportError, TypeError, ValueError) as error:
            raise ConfigError(f"PEFT refuses these LoRA options: {' '.join(str(error).split())}") from None
    return adapted


def _without(options: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in names}
