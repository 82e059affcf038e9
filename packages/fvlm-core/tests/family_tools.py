"""Batches of the families' real processors: conversations around pictures of several sizes."""

import torch
from PIL import Image
from transformers import AutoProcessor

from fvlm_core.arch import facts_for, media_token_ids, plain_modules
from fvlm_core.checkpointing import apply_checkpointing, use_graphs
from fvlm_core.fused import fusion_report
from fvlm_core.graphs import LayerGraphs

FAMILIES = ("mllama", "pixtral", "mistral3", "gemma3")
TRAINED = ("vision", "projector", "language")
SIZES = ((64, 64), (90, 40), (30, 75))


def picture(size, seed):
    """A picture whose pixels are all different, so that no two patches are alike."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def conversation(images, answer):
    blocks = [{"type": "image"}] * images + [{"type": "text", "text": "what is the total of the receipt"}]
    return [{"role": "user", "content": blocks}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]


def family_batch(folder, model, images=(2, 1), seed=0):
    """One row for each number of images, padded on the right; every text token but the first few is learned."""
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "right"
    answers = ["the price reads two", "it says invoice number of the page please"]
    texts = [
        processor.apply_chat_template(conversation(count, answers[row % 2]), tokenize=False)
        for row, count in enumerate(images)
    ]
    nested, number = [], 0
    for count in images:
        nested.append([picture(SIZES[(number + n) % 3], seed + number + n) for n in range(count)])
        number += count
    options = {"images": nested} if number else {}
    batch = dict(processor(text=texts, padding=True, return_tensors="pt", add_special_tokens=False, **options))
    media = media_token_ids(facts_for(model), model.config, processor).all
    ids = batch["input_ids"]
    hidden = torch.isin(ids, torch.tensor(sorted(media))) | (batch["attention_mask"] == 0)
    batch["labels"] = ids.masked_fill(hidden, -100)
    batch["labels"][:, :3] = -100
    return batch


def prompt_of(folder, model, images=2):
    """One row that ends where the answer would begin, without labels."""
    processor = AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template(conversation(images, "")[:1], tokenize=False, add_generation_prompt=True)
    pictures = [[picture(SIZES[n], n) for n in range(images)]]
    return dict(processor(text=[text], images=pictures, return_tensors="pt", add_special_tokens=False))


def without_padding_mask(batch):
    """As the collator may give it to a fused model: causal attention hides what is behind a row anyway."""
    return {name: value for name, value in batch.items() if name != "attention_mask"}


def modules_of(model, kind):
    named = dict(plain_modules(model))
    return [named[name] for name, found in fusion_report(model).fused.items() if found == kind]


def recorded(model):
    """Record a fused model's layers from now on, as a rehearsal; return what does it."""
    graphs = LayerGraphs(rehearse=True)
    use_graphs(model, graphs)
    apply_checkpointing(model, True)
    return graphs
