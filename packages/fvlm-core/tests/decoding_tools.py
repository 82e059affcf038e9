"""Prompts with pictures, padded on the left, and models that decode by recordings."""

import pytest
import torch
from family_tools import conversation, picture
from fused_tools import adapted_model
from transformers import AutoProcessor

from fvlm_core.decoding import decoding_report, enable_decoding
from fvlm_core.fused import fuse_model, unfuse_model

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
PROMPTS = ("what is the total of the receipt", "please read it", "and the number of the invoice on this page")
SIZES = ((64, 64), (56, 84), (84, 56))


def prompts(folder, images=(1,), device="cpu"):
    """Rows that end where an answer begins, one for each number of images, padded on the left."""
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    texts, nested = [], []
    for row, count in enumerate(images):
        turn = conversation(count, "")[:1]
        turn[0]["content"][-1]["text"] = PROMPTS[row % 3]
        texts.append(processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
        nested.append([picture(SIZES[(row + n) % 3], 10 * row + n) for n in range(count)])
    options = {"images": nested} if any(images) else {}
    batch = processor(text=texts, padding=True, return_tensors="pt", add_special_tokens=False, **options)
    return {name: value.to(device) for name, value in batch.items()}


def pair_on(device, folder):
    """The folder, a model that decodes by recordings, and one that does as transformers has it."""
    ours, stock = (adapted_model(folder, targets=("language",), device=device).eval() for _ in range(2))
    return folder, fast(ours), stock


def prompts_for(pair, images):
    return prompts(pair[0], images, pair[1].device)


def stock_answer(model, batch, **options):
    """What the same model says without fused layers and recordings."""
    unfuse_model(model)
    assert "generate" not in vars(model.get_base_model())
    return model.generate(**batch, **options)


def fast(model):
    fuse_model(model)
    assert enable_decoding(model, rehearse=model.device.type == "cpu") is None
    return model


GREEDY = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}


def same(pair, batch, **options):
    """Both answer alike, the one by recordings; return the rows."""
    _, ours, stock = pair
    before = decoding_report(ours).recorded
    found, wanted = (model.generate(**batch, **options) for model in (ours, stock))
    rows = [out if isinstance(out, torch.Tensor) else out.sequences for out in (found, wanted)]
    assert torch.equal(*rows)
    assert decoding_report(ours).recorded == before + 1, decoding_report(ours).summary
    return found, wanted
