"""Between training and inference, and back to exactly what was."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

from fvlm_core import ConfigError, checkpointing_mode
from fvlm_core.checkpointing import use_graphs
from fvlm_core.graphs import LayerGraphs
from fvlm_vision import FastVisionModel


def state(model):
    """Everything that the two switches touch."""
    text = model.config.get_text_config()
    return (
        {name: module.training for name, module in model.named_modules()},
        checkpointing_mode(model),
        text.use_cache,
        model.generation_config.use_cache,
    )


@pytest.mark.parametrize("mode", [False, True, "offload"])
def test_inference_in_between_changes_nothing(batch, prompt, ask, adapted, mode):
    model = adapted(use_gradient_checkpointing=mode)
    ask.train(model)
    FastVisionModel.for_training(model)
    before, (loss, expected) = state(model), ask.gradients(model, batch)

    FastVisionModel.for_inference(model)
    assert checkpointing_mode(model) is False
    assert not any(module.training for module in model.modules())
    assert model.config.get_text_config().use_cache is True
    model.generate(**prompt, max_new_tokens=2)

    FastVisionModel.for_training(model)
    assert state(model) == before
    assert before[1:] == (mode, False, False)
    again, found = ask.gradients(model, batch)
    assert again == loss
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_budget_for_another_mode_is_refused_before_anything_is_done(folder, tmp_path):
    said = r"^memory_budget=2 is for what layers keep, .*'unsloth' nothing is chosen by it: pass 'auto'"
    with pytest.raises(ConfigError, match=said):
        FastVisionModel.from_pretrained(tmp_path / "nothing there", memory_budget=2)
    model, _ = FastVisionModel.from_pretrained(folder, load_in_16bit=True, fused_layers=True)
    use_graphs(model, LayerGraphs(rehearse=True, memory_budget=2))
    with pytest.raises(ConfigError, match=said):
        FastVisionModel.get_peft_model(model)
    adapted = FastVisionModel.get_peft_model(model, use_gradient_checkpointing="auto")
    assert checkpointing_mode(adapted) == "auto"


def test_generation_equals_stock(folder, prompt):
    stock = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    model, _ = FastVisionModel.from_pretrained(folder, load_in_16bit=True)
    FastVisionModel.for_training(model)
    FastVisionModel.for_inference(model)
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**prompt, **options), stock.generate(**prompt, **options))


def test_a_fully_finetuned_model_switches_too(folder, batch, ask):
    model, _ = FastVisionModel.from_pretrained(folder, full_finetuning=True, use_gradient_checkpointing=True)
    FastVisionModel.for_training(model)
    assert (model.training, checkpointing_mode(model)) == (True, True)
    _, found = ask.gradients(model, batch)
    assert found.keys() == dict(model.named_parameters()).keys()
    FastVisionModel.for_inference(model)
    assert (model.training, checkpointing_mode(model)) == (False, False)


def test_evaluation_during_training_uses_no_cache(batch, adapted):
    model = adapted()
    model.eval()
    with torch.no_grad():
        assert model(**batch).past_key_values is None
    FastVisionModel.for_inference(model)
    with torch.no_grad():
        assert model(**batch).past_key_values is not None


def test_training_undoes_recorded_decoding(adapted, prompt):
    from fvlm_core.decoding import decoding_report, enable_decoding
    from fvlm_core.fused import fuse_model

    model = adapted()
    fuse_model(model)
    FastVisionModel.for_inference(model)
    inner = model.get_base_model()
    assert ("generate" in vars(inner)) is (model.device.type == "cuda")
    enable_decoding(model, rehearse=True)
    model.generate(**prompt, max_new_tokens=2)
    assert decoding_report(model).recorded == 1
    FastVisionModel.for_training(model)
    assert "generate" not in vars(inner)
    assert decoding_report(model).recorded == 0


@pytest.mark.parametrize("switch", [FastVisionModel.for_training, FastVisionModel.for_inference])
def test_what_is_no_model_is_refused(switch):
    with pytest.raises(ConfigError, match="model is a str: pass the model that from_pretrained returned"):
        switch("folder")


@pytest.mark.gpu
def test_inference_on_a_gpu_decodes_by_recordings(folder, prompt):
    from fvlm_core.decoding import decoding_report

    model, _ = FastVisionModel.from_pretrained(folder, load_in_4bit=True)
    model = FastVisionModel.get_peft_model(model)
    FastVisionModel.for_inference(model)
    asked = {name: value.to(model.device) for name, value in prompt.items()}
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        rows = model.generate(**asked, max_new_tokens=9, min_new_tokens=9, do_sample=False, use_cache=True)
    assert rows.shape[1] == asked["input_ids"].shape[1] + 9
    assert decoding_report(model).recorded == 1, decoding_report(model).summary
