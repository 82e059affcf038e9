"""What a returned model carries beside its own methods: bound to the instance, never to its class."""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os
    from collections.abc import Callable
    from pathlib import Path

    from peft import PeftModel
    from transformers import PreTrainedModel


def bind_methods(model: PreTrainedModel | PeftModel) -> None:
    """Give ``model`` the methods of this module.

    A PeftModel needs its own: those of the model it wraps would save that model alone.
    """
    methods: list[Callable[..., Any]] = [save_pretrained_merged, push_to_hub_merged]
    if not hasattr(model, "print_trainable_parameters"):  # PEFT's models bring it
        methods.append(print_trainable_parameters)
    for method in methods:
        vars(model)[method.__name__] = MethodType(method, model)


def save_pretrained_merged(
    model: PreTrainedModel | PeftModel,
    output_dir: str | os.PathLike[str],
    processor: Any = None,
    save_method: str = "merged_16bit",
    **options: Any,
) -> Path:
    """Save the model with its adapter merged in; see `fvlm_export.save_pretrained_merged`."""
    from fvlm_export import save_pretrained_merged as save

    return save(model, output_dir, processor, save_method=save_method, **options)


def push_to_hub_merged(
    model: PreTrainedModel | PeftModel,
    repo_id: str,
    processor: Any = None,
    save_method: str = "merged_16bit",
    token: str | None = None,
    private: bool | None = None,
    **options: Any,
) -> str:
    """Push the model with its adapter merged in to the Hub; see `fvlm_export.push_to_hub_merged`."""
    from fvlm_export import push_to_hub_merged as push

    return push(model, repo_id, processor, save_method=save_method, token=token, private=private, **options)


def print_trainable_parameters(model: PreTrainedModel) -> None:
    """Print how many parameters are trained, as PEFT's method of this name does for a model with an adapter."""
    trained, total = model.num_parameters(only_trainable=True), model.num_parameters()
    print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")
