"""The module tree of a model without its weights: what each parameter is called, its shape, and what is tied to what.

Built on torch's meta device from a config, so a 70 B model costs no memory. Merging needs it to know which tensor of a
checkpoint belongs to which module.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fvlm_core.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device and what can be read off it.

    Attributes:
        model: the module tree; every parameter is on the meta device.
        shapes: every parameter's and persistent buffer's shape, by its module name; tied names are listed too.
        parameters: the names among them that are parameters (a checkpoint must hold these, unless tied).
        tied: tied name → the name that holds the values, e.g. ``lm_head.weight → model.embed_tokens.weight``.
    """

    model: PreTrainedModel
    shapes: dict[str, tuple[int, ...]]
    parameters: frozenset[str]
    tied: dict[str, str]


def plain_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return a copy of a config without its quantization, at every level."""
    plain = copy.deepcopy(config)
    for part in [plain, *_sub_configs(plain)]:
        if "quantization_config" in part.__dict__:
            del part.quantization_config
    return plain


def _sub_configs(config: PretrainedConfig) -> list[PretrainedConfig]:
    return [config.__dict__[name] for name in config.sub_configs if config.__dict__.get(name) is not None]


def skeleton_of(config: PretrainedConfig, cls: type[PreTrainedModel] | None = None, *, trust: bool = False) -> Skeleton:
    """Build the skeleton of the model that a config describes.

    Args:
        config: the model's config; a quantization in it is left out.
        cls: its class; None: the class its ``architectures`` names, else what AutoModelForImageTextToText makes of it.
        trust: whether a class that the checkpoint itself brings may be run.

    Raises:
        CheckpointError: transformers has no class for the config.
    """
    config = plain_config(config)
    config._attn_implementation = "eager"  # nothing will run, and the trained model's own choice may need a GPU
    with torch.device("meta"):
        model = cls._from_config(config) if cls is not None else _auto(config, trust)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    parameters = frozenset(name for name, _ in model.named_parameters(remove_duplicate=False))
    return Skeleton(model, shapes, parameters, model.get_expanded_tied_weights_keys(all_submodels=True))


def _auto(config: PretrainedConfig, trust: bool) -> PreTrainedModel:
    import transformers

    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)._from_config(config)  # type: ignore[no-any-return]
    try:
        return transformers.AutoModelForImageTextToText.from_config(config, trust_remote_code=trust)  # type: ignore[no-any-return]
    except ValueError as error:
        raise CheckpointError(
            f"no model class is known for model_type {config.model_type!r} with architectures {config.architectures}; "
            "update transformers, or pass trust_remote_code=True if the checkpoint brings its own class."
        ) from error
