"""Facts derived from a module tree and a config, for a model type that has no facts file.

Correct before clever: what transformers' own accessors say comes first, names of modules second, and whatever remains
unclear stays out of quantization and out of the default LoRA targets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fvlm_core.arch.facts import ArchFacts, MediaTokens, Part, Tower
from fvlm_core.arch.structure import (
    Modules,
    find_layers,
    find_mergers,
    find_outside,
    find_towers,
    inert_attention,
    is_router,
    linear_names,
    part_in_block,
)
from fvlm_core.arch.tree import is_under, plain_modules, unwrap
from fvlm_core.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_IMAGE_FIELDS = ("image_token_id", "image_token_index")
_VIDEO_FIELDS = ("video_token_id", "video_token_index")
_FRAMING_FIELDS = (
    "vision_start_token_id",
    "vision_end_token_id",
    "image_start_token_id",
    "image_end_token_id",
    "boi_token_id",
    "eoi_token_id",
    "boi_token_index",
    "eoi_token_index",
)
_FRAMING_TEXTS = r"<fake_token_around_image>|<global-img>|<row_\d+_col_\d+>"  # of Idefics, SmolVLM and their kin


def derive_facts(model: PreTrainedModel) -> ArchFacts:
    """Derive the facts of a model that no table knows.

    The language tower is ``get_decoder()``; the vision and audio towers are the submodels built from a vision or audio
    config, else ``get_encoder("image")`` and ``get_encoder("audio")``; the head is ``get_output_embeddings()``.
    Everything outside them is the projector, and so is what ends a vision tower in the language model's width. In 4 or
    8 bit, projector, head, routers and every linear outside the blocks stay in 16 bit: patch embeddings cast pixels to
    the dtype of their own weight, and torch's ``nn.MultiheadAttention`` reads its weights directly.

    Args:
        model: the task model; its layers may be wrapped by PEFT, and it may be on the meta device.

    Raises:
        CheckpointError: no language model is found inside it.
    """
    modules = dict(plain_modules(model))
    names = {id(module): name for name, module in modules.items()}
    head = names.get(id(unwrap(model.get_output_embeddings())))
    language = names.get(id(model.get_decoder())) or names.get(id(model.base_model))
    if not language:
        raise CheckpointError(
            f"No language model was found in a {model.config.model_type!r} model: write its facts file "
            "(docs/add-a-model.md)."
        )
    vision = find_towers(model, modules, "image", avoid=(language,))
    audio = find_towers(model, modules, "audio", avoid=(language, *vision))
    owners: dict[str, Tower] = {language: "language"}
    owners.update(dict.fromkeys(vision, "vision"))
    owners.update(dict.fromkeys(audio, "audio"))
    layers = find_layers(modules, owners)
    blocks = tuple(path for lists in layers.values() for path in lists)
    width = _language_width(model)
    projector = find_outside(modules, (*owners, *(() if head is None else (head,))))
    projector += find_mergers(modules, vision, blocks, width=width)
    parts = {name: part_in_block(name, path, modules) for name, path in _block_linears(modules, blocks)}
    return ArchFacts(
        model_type=model.config.model_type,
        vision=vision,
        projector=projector,
        language=(language,),
        audio=audio,
        lm_head=head,
        attention=_endings(parts, blocks, "attention"),
        mlp=_endings(parts, blocks, "mlp"),
        layers=layers,
        unquantized=_unquantized(modules, projector, head, blocks),
        media=_media(model.config),
        generic=True,
    )


def _language_width(model: PreTrainedModel) -> int | None:
    """Return the width of the text embeddings, or None for a model that does not say which they are."""
    try:
        embedding = unwrap(model.get_input_embeddings())
    except NotImplementedError:  # transformers asks such models for an override
        return None
    return None if embedding is None else int(next(embedding.parameters()).shape[-1])


def _block_linears(modules: Modules, blocks: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return every linear inside a block, with the list that holds the block."""
    linears = linear_names(modules)
    return [(name, path) for name in linears for path in blocks if is_under(name, path)]


def _endings(parts: dict[str, Part], blocks: tuple[str, ...], wanted: Part) -> tuple[str, ...]:
    """Return what the linears of one part are called inside their block, in tree order, each once."""
    endings: dict[str, None] = {}
    for name, part in parts.items():
        if part == wanted:
            path = next(path for path in blocks if is_under(name, path))
            inside = name[len(path) + 1 :].split(".")[1:]
            numbers = [i for i, piece in enumerate(inside[:-1]) if piece.isdigit()]  # experts.7.w1 → w1
            endings[".".join(inside[numbers[-1] + 1 :] if numbers else inside)] = None
    return tuple(endings)


def _unquantized(
    modules: Modules, projector: tuple[str, ...], head: str | None, blocks: tuple[str, ...]
) -> tuple[str, ...]:
    """Return what stays in 16 bit: whole projectors and the head, then single linears."""
    linears = linear_names(modules)
    kept = [path for path in projector if any(is_under(name, path) for name in linears)]
    kept += [] if head is None else [head]
    for name in linears:
        in_block = any(is_under(name, path) for path in blocks)
        if (not in_block or is_router(name)) and not any(is_under(name, path) for path in kept):
            kept.append(name)
    kept += [f"{name}.out_proj" for name in inert_attention(modules) if not any(is_under(name, path) for path in kept)]
    return tuple(dict.fromkeys(kept))


def _media(config: PretrainedConfig) -> MediaTokens:
    """Return the config fields, of those that transformers' models use, that this config has."""

    def present(fields: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in fields if hasattr(config, name) and isinstance(getattr(config, name), int))

    return MediaTokens(
        image=present(_IMAGE_FIELDS)[:1],
        video=present(_VIDEO_FIELDS)[:1],
        framing=present(_FRAMING_FIELDS),
        texts=_FRAMING_TEXTS,
    )
