"""Both sides of the comparisons of whole families: FVLM's model and a plain one, with the same adapter."""

from __future__ import annotations

import torch
from parity_tools import trainable
from PIL import Image

from fvlm_core.arch import facts_for
from fvlm_core.quantized import quantization
from fvlm_vision import FastVisionModel

LOADING = {"4bit": "load_in_4bit", "8bit": "load_in_8bit", "16bit": "load_in_16bit"}


def picture(seed, size=(60, 44)):
    """A picture whose pixels are all different."""
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8).numpy())


def sample(seed, images=1, answer="seven pages of blue paper"):
    """A conversation around pictures."""
    blocks = [{"type": "image", "image": picture(seed + number)} for number in range(images)]
    blocks.append({"type": "text", "text": f"what is {seed}"})
    return {"messages": [{"role": "user", "content": blocks}, {"role": "assistant", "content": answer}]}


def ours(folder, precision, **options):
    """FVLM's model with an adapter that matters, and its processor."""
    model, processor = FastVisionModel.from_pretrained(folder, **{LOADING[precision]: True})
    model = FastVisionModel.get_peft_model(model, **{"r": 4, "lora_alpha": 8, **options})
    return model, processor


def stock(folder, precision, model):
    """Plain transformers, bitsandbytes and PEFT with the adapter of ``model`` on the same modules."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    from fvlm_core.precision import Precision

    config = quantization(Precision(precision), torch.float32, _names(model))
    options = {} if config is None else {"quantization_config": config}
    base = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, **options)
    mine = model.peft_config["default"]
    settings = {
        name: getattr(mine, name) for name in ("r", "lora_alpha", "bias", "use_dora", "use_rslora", "modules_to_save")
    }
    return get_peft_model(base, LoraConfig(target_modules=list(model.fvlm_targets.modules), **settings))


def _names(model):
    return tuple(rf"{name}(\.|$)" for name in facts_for(model).unquantized)


def same_start(models, seed=1):
    """Give the adapters of both models the same values, none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    first, *others = [trainable(model) for model in models]
    with torch.no_grad():
        for parameter in first.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        for other in others:
            assert set(other) == set(first)
            for name, parameter in other.items():
                parameter.copy_(first[name])


def plain(batch, processor):
    """What of a batch stock makes itself."""
    kept = {name: value for name, value in batch.items() if name in processor.model_input_names}
    return {**kept, "labels": batch["labels"]}


def gradients(model, batch):
    """The loss and every gradient of one step."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected, tolerance=1e-5, floor=0.0):
    """Hold a loss and its gradients against those of stock; gradients that part by a norm of ``floor`` are equal."""
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=0)
    assert set(found[1]) == set(expected[1]) != set()
    for name, gradient in expected[1].items():
        error = (found[1][name] - gradient).norm()
        assert error <= floor or error < tolerance * gradient.norm().clamp(min=1e-12), (name, float(error))


def curve(model, batches):
    """Train on batches, one a step; return the losses."""
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=2e-3)
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
