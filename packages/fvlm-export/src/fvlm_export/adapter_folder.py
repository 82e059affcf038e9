"""An adapter's folder, put into a skeleton so that PEFT's own layers can be read.

The base parameters become placeholders that take no memory; only the adapter's tensors are real. What PEFT would load
with a warning is an error here: a tensor of the file that fits nowhere, or one that the config asks for and the file
lacks.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

from fvlm_core.errors import CheckpointError
from fvlm_export.adapters import module_name
from fvlm_export.changes import Change, Replacement
from fvlm_export.compute import all_finite
from fvlm_export.layout import Layout
from fvlm_export.older_names import use_todays_names
from fvlm_export.safetensor_file import SafetensorFile
from fvlm_export.skeleton import Skeleton, skeleton_of
from fvlm_export.threads import torch_threads

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (folder / CONFIG).is_file()


def read_adapter_config(folder: Path) -> PeftConfig:
    """Read an adapter's config.

    Raises:
        CheckpointError: it is missing, torn, or of a kind that cannot be merged.
    """
    path = folder / CONFIG
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); pass the folder that save_pretrained wrote."
        ) from error
    if kind != "LORA":
        raise CheckpointError(f"{path} is of peft_type {kind!r}; only LORA adapters can be merged.")
    try:
        config: PeftConfig = PeftConfig.from_pretrained(str(folder))
        return config
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be used ({error}); it may need another version of peft.") from error


@dataclass(frozen=True)
class PlacedAdapters:
    """Adapters on a skeleton.

    Attributes:
        model: the PEFT model; its base parameters are placeholders, except those that an adapter's file brings itself.
        placeholders: the placeholders, kept alive so that an identity never means something else.
    """

    model: PeftModel
    placeholders: list[torch.nn.Parameter]

    def own_parameters(self) -> dict[str, list[Change]]:
        """Return the base parameters that came with the adapters' files (biases, resized embeddings)."""
        empty = {id(param) for param in self.placeholders}
        return {
            module_name(name): [Replacement(param)]
            for name, param in self.model.named_parameters()
            if not _of_adapter(name) and id(param) not in empty
        }


def place_adapters(folders: Mapping[str, Path], skeleton: Skeleton, layout: Layout) -> PlacedAdapters:
    """Load adapters into a new skeleton of the same model.

    Args:
        folders: adapter name → folder, at least one.
        skeleton: of the base model; it is not changed.
        layout: of the base model, to bring old module names up to date.

    Raises:
        CheckpointError: an adapter is torn, or does not fit the base.
    """
    base = skeleton_of(skeleton.model.config, type(skeleton.model)).model
    peft: PeftModel | None = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT warns of here is either an error below or handled by the merge
        for name, folder in folders.items():
            config: Any = read_adapter_config(folder)
            config.inference_mode = True
            config.init_lora_weights = True  # an initialization from the base's values would read placeholders
            modules = (path for path, _ in skeleton.model.named_modules())
            use_todays_names(config, _renamed_modules(folder, layout), modules)
            try:
                if peft is None:
                    peft = PeftModel(base, config, adapter_name=name, low_cpu_mem_usage=True)
                else:
                    peft.add_adapter(name, config, low_cpu_mem_usage=True)
            except (TypeError, ValueError) as error:
                raise CheckpointError(
                    f"the adapter in {folder} does not fit {type(skeleton.model).__name__} ({_line(error)}); "
                    "pass the base that it was trained on as base=."
                ) from error
        if peft is None:
            raise CheckpointError("no adapter folder was given.")
        placeholders = _fill_base(peft)
        for name, folder in folders.items():
            _load(peft, name, folder, layout)
    return PlacedAdapters(peft, placeholders)


def _fill_base(peft: PeftModel) -> list[torch.nn.Parameter]:
    """Give every base parameter a CPU placeholder: PEFT moves an adapter to wherever its base layer is.

    It also casts an adapter to its base layer's dtype, which would round what was trained in fp32; an integer
    placeholder, which is what a quantized layer looks like, keeps it from that.
    """
    made = []
    for path, module in peft.named_modules():
        for name, param in list(module._parameters.items()):
            if param is not None and not _of_adapter(f"{path}.{name}"):
                empty = torch.zeros((), dtype=torch.uint8).expand(param.shape)
                module._parameters[name] = torch.nn.Parameter(empty, requires_grad=False)
                made.append(module._parameters[name])
        for name, buffer in list(module._buffers.items()):  # e.g. what trained token rows were before training
            if buffer is not None and buffer.device.type == "meta":
                module._buffers[name] = torch.zeros((), dtype=buffer.dtype).expand(buffer.shape)
    return made


def _of_adapter(name: str) -> bool:
    return any(marker in name for marker in (".lora_", ".modules_to_save.", ".trainable_tokens_"))


def _load(peft: PeftModel, adapter: str, folder: Path, layout: Layout) -> None:
    path = folder / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{folder} has an {CONFIG} but no {WEIGHTS}; save the adapter as safetensors.")
    file = SafetensorFile(path)
    expected = get_peft_model_state_dict(peft, adapter_name=adapter, save_embedding_layers=False)
    tensors = {_renamed(key, expected, layout): file.tensor(key) for key in file.infos}
    with torch_threads(1):
        _check_finite(tensors, path)
    missing = sorted(key for key in expected if key not in tensors and ".lora_" in key)
    if missing:
        raise CheckpointError(f"{path} lacks {missing[0]!r}, which its config asks for; save the adapter again.")
    try:
        result: Any = set_peft_model_state_dict(peft, tensors, adapter_name=adapter, low_cpu_mem_usage=True)
    except KeyError as error:  # a module to save that the file lacks
        raise CheckpointError(f"{path} lacks {error}, which its config asks for; save the adapter again.") from error
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{path} does not fit the base ({_line(error)}); pass the base it was trained on."
        ) from error
    if result.unexpected_keys:
        raise CheckpointError(
            f"{path} holds {result.unexpected_keys[0]!r}, which fits no tensor of "
            f"{type(layout.skeleton.model).__name__}; pass the base that the adapter was trained on as base=."
        )


def _renamed(key: str, expected: Mapping[str, object], layout: Layout) -> str:
    """Bring a key of an adapter made with older module names (transformers before 4.52) up to date."""
    if key in expected:
        return key
    module, _, rest = key.removeprefix(_PREFIX).partition(".lora_")
    if rest:
        for leaf in ("weight", "bias"):
            renamed = layout.param_named(f"{module}.{leaf}")
            if renamed in layout.skeleton.shapes:
                return f"{_PREFIX}{renamed.removesuffix('.' + leaf)}.lora_{rest}"
        return key
    return _PREFIX + layout.param_named(module) if key.startswith(_PREFIX) else key


def _renamed_modules(folder: Path, layout: Layout) -> dict[str, str]:
    """Return older module name → today's, of those in an adapter's file whose name has changed."""
    path = folder / WEIGHTS
    found: dict[str, str] = {}
    for key in SafetensorFile(path).infos if path.is_file() else ():
        module, part, _ = key.removeprefix(_PREFIX).partition(".lora_")
        if part and module not in found:
            found[module] = _renamed(key, {}, layout).removeprefix(_PREFIX).partition(".lora_")[0]
    return {old: new for old, new in found.items() if old != new}


def _check_finite(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not all_finite(tensor):
            raise CheckpointError(
                f"{path}: tensor {name!r} holds NaN or infinity; the training diverged, or it is torn."
            )


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if isinstance(error, RuntimeError) and lines else (lines[0] if lines else type(error).__name__)
