"""Tokenizing texts while each image is still one placeholder, and repeating the placeholder's id afterwards.

A Qwen processor writes an image's placeholder hundreds of times into the text and has the tokenizer find every one of
them. The ids are the same when one is found and repeated: the placeholder is an added token, at which a tokenizer cuts
the text before it does anything else, so what stands around it never sees how often it stands there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fvlm_core.errors import DataError
from fvlm_vision.spans import tokens_in

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import ProcessorMixin

    from fvlm_vision.render import Rendered


def can_expand(processor: ProcessorMixin) -> bool:
    """Return whether an image becomes one added token, as often as its grid has merged patches, and nothing else.

    Only where it is known that the processor does just that (the Qwen families'), and where its tokenizer has no
    settings of its own that reach into a call.
    """
    from transformers import Qwen2_5_VLProcessor, Qwen2VLProcessor, Qwen3VLProcessor
    from transformers.processing_utils import TextKwargs

    family: Any = processor
    tokenizer = family.tokenizer
    if type(processor) not in (Qwen2VLProcessor, Qwen2_5_VLProcessor, Qwen3VLProcessor) or not tokenizer.is_fast:
        return False
    token = tokenizer.added_tokens_decoder.get(family.image_token_id)
    return (
        token is not None
        and token.content == family.image_token
        and not (token.normalized or token.single_word or tokenizer.split_special_tokens)
        and set(tokenizer.model_input_names) == {"input_ids", "attention_mask"}
        and not set(TextKwargs.__annotations__) - {"padding", "padding_side"} & set(tokenizer.init_kwargs)
    )


def adds_special_tokens(processor: ProcessorMixin, texts: Sequence[str]) -> bool:
    """Return whether the tokenizer is to add its special tokens: not where the template wrote them already."""
    tokenizer: Any = processor.tokenizer
    return tokenizer.bos_token is None or not texts[0].startswith(tokenizer.bos_token)


def encode_expanded(
    processor: ProcessorMixin,
    texts: Sequence[Rendered],
    image_counts: Sequence[int],
    grids: torch.Tensor,
    multiple: int,
    with_spans: bool,
) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """Return the tokens that the processor makes of texts and images, for a processor that `can_expand`.

    Args:
        processor: of the texts and grids.
        texts: one a sample, each image one placeholder.
        image_counts: how many images each sample has.
        grids: shape (images, 3), int64: frames, rows and columns of patches of each image, in order.
        multiple: the padded length is a multiple of this.
        with_spans: whether to tell which tokens lie in the trained spans.

    Returns:
        `input_ids`, `attention_mask` and `mm_token_type_ids`, shape (batch, tokens), int64, padded on the right; and
        the trained tokens, shape (batch, tokens), bool, or None.

    Raises:
        DataError: the tokenizer does not find a placeholder for each image.
    """
    family: Any = processor
    plain = [text.text for text in texts]
    special = adds_special_tokens(processor, plain)
    encoding = family.tokenizer(plain, add_special_tokens=special, return_offsets_mapping=with_spans)
    times = (grids.prod(dim=1) // family.image_processor.merge_size**2).numpy()
    repeats, first = [], 0
    for ids, count in zip(encoding["input_ids"], image_counts, strict=True):
        is_image = np.asarray(ids) == family.image_token_id
        if is_image.sum() != count:
            raise DataError(
                f"the tokenizer finds {is_image.sum()} image placeholders for {count} images; remove text that it "
                "reads together with a placeholder."
            )
        repeat = np.ones(len(ids), np.int64)
        repeat[is_image] = times[first : first + count]
        repeats.append(repeat)
        first += count
    width = -(-max(int(repeat.sum()) for repeat in repeats) // multiple) * multiple
    tokens = np.full((len(texts), width), family.tokenizer.pad_token_id, np.int64)
    mask = np.zeros_like(tokens)
    trained = torch.zeros(tokens.shape, dtype=torch.bool) if with_spans else None
    for row, repeat in enumerate(repeats):
        length = int(repeat.sum())
        tokens[row, :length] = np.repeat(encoding["input_ids"][row], repeat)
        mask[row, :length] = 1
        if trained is not None:
            inside = _trained(texts[row], encoding["offset_mapping"][row])
            trained[row, :length] = inside.repeat_interleave(torch.from_numpy(repeat))
    types = ((tokens == family.image_token_id) & (mask == 1)).astype(np.int64)
    names = {"input_ids": tokens, "attention_mask": mask, "mm_token_type_ids": types}
    return {name: torch.from_numpy(value) for name, value in names.items()}, trained


def _trained(text: Rendered, offsets: list[tuple[int, int]]) -> torch.Tensor:
    if text.trained is None:
        return torch.ones(len(offsets), dtype=torch.bool)
    return tokens_in(text.trained, torch.tensor(offsets, dtype=torch.int64).reshape(-1, 2))
