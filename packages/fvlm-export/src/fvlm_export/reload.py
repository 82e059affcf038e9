"""A whole model's saved weights, back into the model in memory: what resuming a full finetuning needs.

`save_pretrained` stores weights under the names of the day the base was made (``visual.blocks…``), and
`transformers.Trainer` hands them to modules of today's names (``model.visual.blocks…``), which take none of them: the
run would go on from the base, with a warning.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fvlm_core.checkpoint import find_source, weight_files
from fvlm_core.errors import CheckpointError
from fvlm_export.layout import Layout
from fvlm_export.safetensor_file import SafetensorFile
from fvlm_export.skeleton import skeleton_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def holds_weights(folder: Path) -> bool:
    """Return whether a folder holds a whole model's weights in safetensors files."""
    return (folder / _ONE).is_file() or (folder / _INDEX).is_file()


def load_saved_weights(model: PreTrainedModel, folder: Path) -> None:
    """Give a model the weights that it, or one like it, was saved with; in the dtypes and places that it has.

    Args:
        model: not quantized, without an adapter.
        folder: where `save_pretrained` wrote; one tensor at a time is read.

    Raises:
        CheckpointError: a file is missing or torn, or its weights are not those of such a model.
    """
    opened = [SafetensorFile(path) for path in weight_files(find_source(folder))]
    files = {name: file for file in opened for name in file.infos}
    shapes = {name: file.infos[name].shape for name, file in files.items()}
    layout, slots = Layout.of_checkpoint(skeleton_of(model.config, type(model)), shapes)
    places = model.state_dict()
    for slot in slots:
        if not slot.params:
            continue
        for name, value in layout.to_params(
            slot, {stored: files[stored].tensor(stored) for stored in slot.stored}
        ).items():
            if value.shape != places[name].shape:
                raise CheckpointError(
                    f"{folder} holds {name!r} in the shape {tuple(value.shape)}, where the model has "
                    f"{tuple(places[name].shape)}; resume with the model that was trained."
                )
            places[name].copy_(value)
        for stored in slot.stored:
            files[stored].release(stored)
