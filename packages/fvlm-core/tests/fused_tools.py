"""Adapted tiny models, batches with images, and steps, for the tests of fused and recorded layers."""

import torch
from peft import LoraConfig, get_peft_model

from fvlm_core import Precision, load_model
from fvlm_core.arch import facts_for, linear_modules
from fvlm_core.checkpointing import apply_checkpointing, use_graphs
from fvlm_core.graphs import LayerGraphs

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def make_batch(config, lengths=(24, 20), seed=0):
    """Rows of text around the four tokens of one image each, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    rows, total = len(lengths), max(lengths)
    ids = torch.randint(300, 500, (rows, total), generator=generator)
    ids[:, 4], ids[:, 5:9] = config.vision_start_token_id, config.image_token_id
    mask = torch.arange(total)[None, :] < torch.tensor(lengths)[:, None]
    vision = config.vision_config
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    labels = ids.masked_fill(~mask | (ids == config.image_token_id), -100)
    labels[:, :10] = -100
    return {
        "input_ids": ids,
        "attention_mask": mask.long(),
        "mm_token_type_ids": (ids == config.image_token_id).int(),
        "pixel_values": torch.randn(16 * rows, width, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * rows),
        "labels": labels,
    }


def adapted_model(
    folder, precision=Precision.HALF, *, seed=1, dtype=None, targets=("vision", "language"), device="cpu", **options
):
    """A model with LoRA on its towers, whose B is not zero, in training mode."""
    model = load_model(folder, precision=precision, dtype=dtype or torch.float32, device_map=device, fused_layers=False)
    names = [linear.name for linear in linear_modules(model, facts_for(model)) if linear.tower in targets]
    model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": names, **options}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.train()


def step(model, batch, **options):
    """Return the loss and every gradient of one forward and backward pass."""
    model.zero_grad()
    loss = model(**batch, **options).loss
    loss.backward()
    return loss.detach(), gradients(model)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(ours, stock, tolerance=1e-5):
    torch.testing.assert_close(ours[0], stock[0], rtol=tolerance, atol=0)
    assert set(ours[1]) == set(stock[1]) != set()
    for name, expected in stock[1].items():
        assert expected.abs().max() > 0, name
        error = (ours[1][name] - expected).norm() / expected.norm()
        assert error < tolerance, (name, float(error))


def assert_equal_step(ours, other):
    assert torch.equal(ours[0], other[0])
    assert set(ours[1]) == set(other[1]) != set()
    for name, expected in other[1].items():
        assert torch.equal(ours[1][name], expected), name


def without_mask(batch):
    """As the collator gives it to a fused model: causal attention hides what is behind a row anyway."""
    return {name: value for name, value in batch.items() if name != "attention_mask"}


def recorded(model, mode=True, **options):
    """Record a fused model's layers from now on; return what does it."""
    graphs = LayerGraphs(rehearse=model.device.type == "cpu", **options)
    use_graphs(model, graphs)
    assert apply_checkpointing(model, mode) == mode
    return graphs


def kept(graphs):
    """How many recorded layers keep what they compute, and how many there are."""
    layers = [layer for kind in graphs._stages.values() for layer in kind.layers.values()]
    return sum(layer.kept for layer in layers), len(layers)
