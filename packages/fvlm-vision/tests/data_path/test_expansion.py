"""Ids of a placeholder that is repeated after tokenizing are those of the processor, which repeats it before."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fvlm_core.errors import DataError
from fvlm_core.testing import FAMILIES
from fvlm_vision import FastVisionDataCollator
from fvlm_vision.encoding import Encoder
from fvlm_vision.expansion import can_expand, encode_expanded
from fvlm_vision.reading import Item
from fvlm_vision.render import Rendered

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
IMAGE = "<|image_pad|>"

# What a tokenizer might join with a placeholder beside it: spaces, combining and joining marks, broken and whole
# special tokens, a piece of the placeholder itself.
LETTERS = ("", " ", "  ", "\n", "\n\n", "\t", "a", "é", "\u0301", "\u0338", "\u200d", "\ufeff", "🙂", "'s", "1")
MARKS = (
    "|>",
    "<|",
    "<|image",
    "pad|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "Read this.",
)
NEIGHBOURS = st.sampled_from([*LETTERS, *MARKS])
PIECES = st.lists(st.tuples(st.lists(NEIGHBOURS, max_size=4).map("".join), st.booleans()), min_size=1, max_size=5)


def test_the_families_that_expand(processor_of):
    assert tuple(family for family in FAMILIES if can_expand(processor_of(family))) == QWEN
    for setting, value in (("image_token", "<|vision_start|>"), ("image_token_id", 0)):
        processor = processor_of("qwen2_vl")
        setattr(processor, setting, value)
        assert not can_expand(processor), setting
    processor = processor_of("qwen2_vl")
    processor.tokenizer.split_special_tokens = True
    assert not can_expand(processor)
    processor = processor_of("qwen2_vl")
    processor.tokenizer.init_kwargs["max_length"] = 3
    assert not can_expand(processor)


@pytest.mark.parametrize("family", QWEN)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(PIECES, min_size=1, max_size=3), multiple=st.sampled_from([None, 1, 8]), data=st.data())
def test_everything_equals_the_processors_own_call(family, processor_of, encoders, rows, multiple, data):
    items = []
    for place, pieces in enumerate(rows):
        text = "".join(before + IMAGE * has_image for before, has_image in pieces) or "x"
        sizes = [(30 + 40 * n, 60 - 9 * n) for n in range(text.count(IMAGE))]
        spans = data.draw(st.none() | st.lists(st.integers(0, len(text)), min_size=2, max_size=6, unique=True))
        marks = None if spans is None else sorted(spans)
        trained = None if marks is None else list(zip(marks[::2], marks[1::2], strict=False))
        images = [Image.new("RGB", size, (place, n, 9)) for n, size in enumerate(sizes)]
        items.append(Item(Rendered(text, trained), images, [], None, place))
    found, expected = (copy.copy(encoder) for encoder in encoders(family))
    found.pad_to_multiple_of = expected.pad_to_multiple_of = multiple
    ours, theirs = found.encode(items), expected.encode(items)
    assert set(ours.batch) == set(theirs.batch)
    for name, value in theirs.batch.items():
        assert torch.equal(torch.as_tensor(ours.batch[name]), torch.as_tensor(value)), name
        assert torch.as_tensor(ours.batch[name]).dtype == torch.as_tensor(value).dtype, name
    assert set(ours.per_token) == set(theirs.per_token)
    assert (ours.trained is None) == (theirs.trained is None)
    if theirs.trained is not None:  # of the padding nothing is asked, nor of the images: neither is ever learned
        asked = theirs.batch["attention_mask"].bool() & (theirs.batch["mm_token_type_ids"] == 0)
        assert torch.equal(ours.trained[asked], theirs.trained[asked])


@pytest.fixture(scope="module")
def encoders(processor_of):
    """Two encoders of a family: one that may expand, and one that calls the whole processor."""
    made = {}

    def make(family):
        if family not in made:
            pair = Encoder(processor_of(family), None, {}), Encoder(processor_of(family), None, {})
            pair[1]._can_expand = False
            assert pair[0]._can_expand
            made[family] = pair
        return made[family]

    return make


def test_a_placeholder_that_the_tokenizer_does_not_find_is_an_error(processor_of):
    processor = processor_of("qwen2_vl")
    grids = torch.tensor([[1, 4, 4]])
    with pytest.raises(DataError, match="finds 0 image placeholders for 1 images"):
        encode_expanded(processor, [Rendered("no placeholder", None)], [1], grids, 1, with_spans=False)


def test_the_tokenizer_gets_one_placeholder_an_image(shared_model_of, processor_of, ask):
    processor = processor_of("qwen2_vl")
    collator = FastVisionDataCollator(shared_model_of("qwen2_vl"), processor)
    texts = []
    call = type(processor.tokenizer)._encode_plus

    class Seen(type(processor.tokenizer)):
        def _encode_plus(self, text, *args, **kwargs):
            texts.extend(text)
            return call(self, text, *args, **kwargs)

    processor.tokenizer.__class__ = Seen
    batch = collator([ask(images=2), ask(images=0)])
    assert [text.count(IMAGE) for text in texts] == [2, 0]
    assert int((batch["input_ids"] == processor.image_token_id).sum()) > 2
