"""Which tokens stand for media, by their text."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from fvlm_core.arch import derive_facts, facts_for, media_token_ids
from fvlm_core.testing import FAMILIES
from fvlm_core.testing.checkpoint import blueprint

QWEN = ({"<|image_pad|>"}, {"<|video_pad|>"}, {"<|vision_start|>", "<|vision_end|>"})
CELLS = {f"<row_{row}_col_{col}>" for row in (1, 2) for col in (1, 2)}
IDEFICS = ({"<image>"}, set(), {"<fake_token_around_image>", "<global-img>"} | CELLS)
EXPECTED = {
    "qwen2_vl": QWEN,
    "qwen2_5_vl": QWEN,
    "qwen3_vl": QWEN,
    "mllama": ({"<|image|>"}, set(), set()),
    "pixtral": ({"[IMG]"}, set(), {"[IMG_BREAK]", "[IMG_END]"}),
    "mistral3": ({"[IMG]"}, set(), {"[IMG_BREAK]", "[IMG_END]"}),
    "gemma3": ({"<image_soft_token>"}, set(), {"<start_of_image>", "<end_of_image>"}),
    "paligemma": ({"<image>"}, set(), set()),
    "llava_onevision": ({"<image>"}, {"<video>"}, set()),
    "idefics3": IDEFICS,
    "smolvlm": IDEFICS,  # a video becomes images before it is tokenized
    "internvl": ({"<IMG_CONTEXT>"}, set(), {"<img>", "</img>"}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_media_tokens_by_text(family, skeleton):
    plan = blueprint(family)
    for facts in (facts_for(skeleton(family)), derive_facts(skeleton(family))):
        ids = media_token_ids(facts, plan.config, plan.processor)
        decoded = tuple(
            set(plan.processor.tokenizer.convert_ids_to_tokens(sorted(group)))
            for group in (ids.image, ids.video, ids.framing)
        )
        assert decoded == EXPECTED[family]
        assert ids.all == ids.image | ids.video | ids.framing
        assert len(ids.all) == len(ids.image) + len(ids.video) + len(ids.framing)


@pytest.mark.parametrize("family", ["qwen2_vl", "pixtral", "mistral3", "gemma3", "idefics3", "internvl"])
def test_image_tokens_are_as_many_as_features(family, tiny):
    """What counts as a piece of an image is what the model puts a feature in place of."""
    model = AutoModelForImageTextToText.from_pretrained(tiny(family)).eval()
    processor = AutoProcessor.from_pretrained(tiny(family))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8))
    text = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], tokenize=False)
    batch = processor(text=[text], images=[image], return_tensors="pt", add_special_tokens=False)
    width = model.get_input_embeddings().weight.shape[1]
    wanted = ("pixel_values", "image_grid_thw", "image_sizes", "pixel_attention_mask")
    with torch.no_grad():
        features = model.get_image_features(**{key: batch[key] for key in wanted if key in batch}, return_dict=True)
    pooled = features.pooler_output
    parts = pooled if isinstance(pooled, list | tuple) else [pooled]
    rows = sum(part.reshape(-1, width).shape[0] for part in parts)
    ids = media_token_ids(facts_for(model), model.config, processor)
    assert int(torch.isin(batch["input_ids"], torch.tensor(sorted(ids.image))).sum()) == rows
