"""What a model family's facts are: where its towers lie, which linears do what, what stays in 16 bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fvlm_core.batch_plan import QwenPlanner

Tower = Literal["vision", "projector", "language", "audio", "head"]
Part = Literal["attention", "mlp", "other"]

CHATML_TURNS = ("<|im_start|>user\n", "<|im_start|>assistant\n")
INST_TURNS = ("[INST]", "[/INST]")

TOWERS: tuple[Tower, ...] = ("vision", "projector", "language", "audio", "head")
PARTS: tuple[Part, ...] = ("attention", "mlp", "other")


@dataclass(frozen=True, kw_only=True)
class MediaTokens:
    """Where the ids of a family's media tokens are written down.

    Attributes:
        image: config fields that hold the id of what stands for a piece of an image.
        video: the same for a video.
        framing: config fields with the ids of what opens, closes or splits a media span.
        processor: processor attributes with more such ids (an id or a list of them); those that a processor lists in
            its ``image_token_ids`` need no entry.
        texts: a regular expression that matches the whole text of further added tokens of that kind, for families
            whose processors keep no ids of them.
    """

    image: tuple[str, ...] = ()
    video: tuple[str, ...] = ()
    framing: tuple[str, ...] = ()
    processor: tuple[str, ...] = ()
    texts: str | None = None


@dataclass(frozen=True, kw_only=True)
class ArchFacts:
    """The facts of one family. All paths are dotted module paths below the task model (the one with the head).

    Attributes:
        model_type: ``config.model_type`` of the checkpoints that these facts describe.
        vision_type: ``config.vision_config.model_type`` they must also have, where one model type wraps many towers.
        vision: the vision towers; a projector inside one is named by ``projector`` and is not part of it.
        projector: what carries image features into the language model.
        language: the language towers, cross-attention to the image included.
        audio: the audio towers; never trained here.
        lm_head: the output layer, or None when there is none.
        attention: what the names of the attention linears end in, in whole components: ``"qkv"``, ``"attn.proj"``.
        mlp: the same for the feed-forward linears. A linear that neither lists is ``"other"``.
        layers: tower → its lists of blocks, in the order in which they run.
        unquantized: what 4- and 8-bit loading leaves in 16 bit.
        media: where the ids of the placeholder tokens are found.
        beyond_float16: its activations grow beyond what float16 can hold (65,504), so that it computes in float32 where
            a device has no bfloat16.
        packs_images: the vision attention gets the patches of all images in one row and their cumulative lengths, so
            that `fvlm_core.attention` can serve it without a loop over images.
        least_image_tokens: the fewest tokens that the images of a batch may come to, for the class's own forward.
        planner: makes what precomputes a batch's positions and boundaries for a model of this family
            (`fvlm_core.batch_plan`), or None for a family that derives nothing from its images' sizes.
        fused: class names of modules → the kind of fused layer that takes their place (`fvlm_core.fused.table`).
        fused_text: model type of the text model (``config.text_config.model_type``) → more of the same, for families
            that wrap text models of several kinds.
        turns: what the chat templates of its checkpoints on the Hub open a user's and an assistant's turn with; those
            templates mark no assistant spans of their own.
        generic: derived from the module tree, not written by hand.
    """

    model_type: str
    vision_type: str | None = None
    vision: tuple[str, ...]
    projector: tuple[str, ...]
    language: tuple[str, ...]
    audio: tuple[str, ...] = ()
    lm_head: str | None = "lm_head"
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    layers: Mapping[Tower, tuple[str, ...]]
    unquantized: tuple[str, ...]
    media: MediaTokens = field(default_factory=MediaTokens)
    beyond_float16: bool = False
    packs_images: bool = False
    least_image_tokens: int = 1
    planner: Callable[[PreTrainedModel], QwenPlanner] | None = None
    fused: Mapping[str, str] = field(default_factory=dict)
    fused_text: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    turns: tuple[str, str] | None = None
    generic: bool = False

    def towers(self) -> dict[Tower, tuple[str, ...]]:
        """Return the paths of every tower, the head included."""
        return {
            "vision": self.vision,
            "projector": self.projector,
            "language": self.language,
            "audio": self.audio,
            "head": () if self.lm_head is None else (self.lm_head,),
        }
