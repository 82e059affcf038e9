"""What a returned model carries beside its own methods: bound to the instance, never to its class."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fvlm_core.bound import bind, in_place_of
from fvlm_core.errors import ConfigError
from fvlm_vision.processes import is_first_process

if TYPE_CHECKING:
    from collections.abc import Callable

    from peft import PeftModel
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def bind_methods(model: PreTrainedModel | PeftModel) -> None:
    """Give ``model`` the methods of this module.

    A PeftModel needs its own: those of the model it wraps would save that model alone.
    """
    in_place_of(model, "save_pretrained", save_pretrained)
    methods: list[Callable[..., Any]] = [save_pretrained_merged, push_to_hub_merged, print_trainable_parameters]
    for method in methods:
        bind(model, method)


def save_pretrained(
    model: PreTrainedModel | PeftModel,
    save_directory: str | os.PathLike[str],
    is_main_process: bool | None = None,
    **options: Any,
) -> None:
    """Save adapters as PEFT does, with a note of what they were trained over; without them as transformers does.

    Under torchrun the first process does it. The others return at once and do not wait for it. The note is
    `fvlm_export.AdapterNote`.

    Args:
        model: with adapters or without.
        save_directory: a folder, made if need be.
        is_main_process: whether this process writes (a model without adapters: if transformers agrees, whose newer
            versions write in the first process only); None: if it is the first.
        options: of the model's own method.

    Raises:
        ConfigError: ``save_directory`` is a file.
    """
    from peft import PeftModel

    from fvlm_export import note_of

    root = Path(save_directory)
    if root.is_file():
        raise ConfigError(f"save_directory={os.fspath(save_directory)!r} is a file: name a folder.")
    if not (is_first_process() if is_main_process is None else is_main_process):
        logger.info("The first process of this run saves %s.", save_directory)
        return
    own: Any = type(model)  # of two kinds, each for its own models
    own.save_pretrained(model, os.fspath(save_directory), **options)
    if isinstance(model, PeftModel):
        for name in options.get("selected_adapters") or model.peft_config:
            folder = root if name == "default" else root / name  # where PEFT puts it
            if folder.is_dir():
                note_of(model).write(folder)


def save_pretrained_merged(
    model: PreTrainedModel | PeftModel,
    output_dir: str | os.PathLike[str],
    processor: Any = None,
    save_method: str = "merged_16bit",
    **options: Any,
) -> Path:
    """Save the model with its adapter merged in; see `fvlm_export.save_pretrained_merged`.

    Under torchrun the first process does it. The others return at once and do not wait for it.
    """
    from fvlm_export import save_pretrained_merged as save

    if not is_first_process():
        logger.info("The first process of this run saves %s.", output_dir)
        return Path(output_dir).expanduser().absolute()
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
    """Push the model with its adapter merged in to the Hub; see `fvlm_export.push_to_hub_merged`.

    Under torchrun the first process does it. The others return ``repo_id`` at once and do not wait for it.
    """
    from fvlm_export import push_to_hub_merged as push

    if not is_first_process():
        logger.info("The first process of this run pushes to %s.", repo_id)
        return repo_id
    return push(model, repo_id, processor, save_method=save_method, token=token, private=private, **options)


def print_trainable_parameters(model: PreTrainedModel | PeftModel) -> None:
    """Print how many parameters are trained, in PEFT's words, and which linears of each tower an adapter is on."""
    from peft import PeftModel

    from fvlm_vision.targets import table_of

    if isinstance(model, PeftModel):
        type(model).print_trainable_parameters(model)
        print(table_of(model))
        return
    trained, total = model.num_parameters(only_trainable=True), model.num_parameters()
    print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")
