"""Tiny checkpoints survive what a real one must: saving, loading, processing, a loss with gradients, generating."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2VLImageProcessor

from fvlm_core.arch import facts_for, media_token_ids
from fvlm_core.errors import ConfigError
from fvlm_core.testing import FAMILIES, tiny_checkpoint
from fvlm_core.testing.checkpoint import blueprint

PROCESSORS = {
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
    "mllama": "MllamaProcessor",
    "pixtral": "PixtralProcessor",
    "mistral3": "PixtralProcessor",
    "gemma3": "Gemma3Processor",
    "paligemma": "PaliGemmaProcessor",
    "llava_onevision": "LlavaOnevisionProcessor",
    "idefics3": "Idefics3Processor",
    "smolvlm": "SmolVLMProcessor",
    "internvl": "InternVLProcessor",
}
# Of the vision features LLaVA-OneVision reads the last layer's, before the norm that its tower ends with.
UNUSED = {"llava_onevision": {"model.vision_tower.post_layernorm.weight", "model.vision_tower.post_layernorm.bias"}}
QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is the total?"}]}
ANSWER = {"role": "assistant", "content": "It is 1234."}


def picture(seed=0, size=(60, 90)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))


def encode(processor, messages, images, **options):
    text = processor.apply_chat_template(messages, tokenize=False, **options)
    bos = processor.tokenizer.bos_token
    twice = bos is not None and text.startswith(bos)  # the template and the tokenizer both begin the text
    batch = processor(text=[text], images=images, return_tensors="pt", add_special_tokens=not twice)
    batch.pop("labels", None)  # PaliGemma's processor makes some of its own, all masked
    return batch


@pytest.mark.parametrize("family", FAMILIES)
def test_trains_and_generates(family, tiny):
    folder = tiny(family)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor).__name__ == PROCESSORS[family]

    batch = encode(processor, [QUESTION, ANSWER], [picture()])
    masked = media_token_ids(facts_for(model), model.config, processor).all
    labels = batch["input_ids"].clone()
    labels[torch.isin(labels, torch.tensor(sorted(masked)))] = -100
    loss = model(**batch, labels=labels).loss
    assert torch.isfinite(loss)
    loss.backward()
    still = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert still == UNUSED.get(family, set())

    model.eval()
    prompt = encode(processor, [QUESTION], [picture()], add_generation_prompt=True)
    out = model.generate(**prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert out.shape[1] == prompt["input_ids"].shape[1] + 4


@pytest.mark.parametrize("family", FAMILIES)
def test_image_changes_the_logits(family, tiny):
    model = AutoModelForImageTextToText.from_pretrained(tiny(family)).eval()
    processor = AutoProcessor.from_pretrained(tiny(family))
    with torch.no_grad():
        one, other = (model(**encode(processor, [QUESTION], [picture(seed)])).logits[0, -1] for seed in (0, 1))
    assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_assistant_spans_are_marked(family, tiny):
    processor = AutoProcessor.from_pretrained(tiny(family))
    string = {"role": "user", "content": "What is the total?"}
    blocks = {"role": "user", "content": [{"type": "text", "text": "What is the total?"}]}
    render = processor.tokenizer.apply_chat_template
    template = processor.chat_template
    assert render([string], chat_template=template, tokenize=False) == render(
        [blocks], chat_template=template, tokenize=False
    )
    turns = [{"role": "system", "content": "Read."}, string, ANSWER, string, ANSWER]
    out = render(
        turns, chat_template=template, return_dict=True, return_assistant_tokens_mask=True, add_special_tokens=False
    )
    said = [token for token, mine in zip(out["input_ids"], out["assistant_masks"], strict=True) if mine]
    text = processor.tokenizer.decode(said)
    assert text.count(ANSWER["content"]) == 2
    assert "total" not in text
    assert said.count(processor.tokenizer.eos_token_id) == 2  # the end of a turn is learned

    prompt = render([string], chat_template=template, tokenize=False, add_generation_prompt=True)
    assert render([string, ANSWER], chat_template=template, tokenize=False).startswith(prompt + ANSWER["content"])


@pytest.mark.parametrize("family", FAMILIES)
def test_fits_its_vocabulary_and_the_4_bit_kernels(family, skeleton):
    tokenizer = blueprint(family).processor.tokenizer
    model = skeleton(family)
    assert max(tokenizer.get_vocab().values()) < model.get_input_embeddings().num_embeddings
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert module.in_features % 64 == 0, name
            assert module.out_features % 64 == 0, name


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_qwen_takes_videos(family, tiny):
    model = AutoModelForImageTextToText.from_pretrained(tiny(family)).eval()
    processor = AutoProcessor.from_pretrained(tiny(family))
    message = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What is it?"}]}
    text = processor.apply_chat_template([message], tokenize=False)
    frames = np.random.default_rng(0).integers(0, 255, (4, 56, 56, 3), dtype=np.uint8)
    batch = processor(text=[text], videos=[frames], return_tensors="pt", do_sample_frames=False)
    assert (batch["input_ids"] == model.config.video_token_id).sum() > 1
    with torch.no_grad():
        assert torch.isfinite(model(**batch).logits).all()


def test_mllama_never_says_its_image_token(skeleton):
    model = skeleton("mllama")
    assert model.config.image_token_index == model.lm_head.out_features


def test_same_seed_same_bytes_and_no_trace(tmp_path):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one = tiny_checkpoint("qwen2_vl", tmp_path / "one")
    assert torch.equal(torch.get_rng_state(), before)
    # A processor made with max_pixels= would have written it into its class.
    assert Qwen2VLImageProcessor.size == {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
    torch.manual_seed(8)
    again = tiny_checkpoint("qwen2_vl", tmp_path / "again")
    other = tiny_checkpoint("qwen2_vl", tmp_path / "other", seed=1, dtype=torch.bfloat16, max_shard_size="200KB")
    assert (one / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    assert (one / "tokenizer.json").read_bytes() == (again / "tokenizer.json").read_bytes()
    shards = sorted(other.glob("model-*.safetensors"))
    assert len(shards) > 1
    first = load_file(one / "model.safetensors")
    for name, tensor in load_file(shards[0]).items():
        assert tensor.dtype == torch.bfloat16
        assert not torch.equal(tensor.float(), first[name])


def test_nothing_is_left_at_its_initial_value(tiny):
    """Biases of 0, norms of 1 and shut gates would hide a part that a test ought to see."""
    for name, tensor in load_file(tiny("mllama") / "model.safetensors").items():
        assert not torch.all(tensor == tensor.flatten()[0]) or tensor.numel() == 1, name
        assert tensor.abs().sum() > 0, name


def test_unknown_family_is_named():
    with pytest.raises(ConfigError, match=r"'qwen9'.*qwen2_vl"):
        tiny_checkpoint("qwen9", "nowhere")
