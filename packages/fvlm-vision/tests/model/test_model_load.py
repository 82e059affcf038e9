"""from_pretrained: precisions, adapters, processors, lengths, engines, and what it refuses."""

import json
import logging
import shutil
import subprocess
import sys

import peft
import pytest
import torch
from transformers import AutoModelForImageTextToText, Qwen2VLProcessor

from fvlm_core import CheckpointError, ConfigError, Precision, checkpointing_mode, origin_of
from fvlm_vision import FastVisionModel


@pytest.mark.parametrize(
    ("arguments", "precision"),
    [
        ({}, Precision.NF4),
        ({"load_in_4bit": True}, Precision.NF4),
        ({"load_in_8bit": True}, Precision.INT8),
        ({"load_in_4bit": False, "load_in_16bit": True}, Precision.HALF),
        ({"load_in_4bit": False}, Precision.HALF),
        ({"full_finetuning": True}, Precision.FULL),
    ],
    ids=str,
)
def test_the_arguments_decide_the_precision(folder, arguments, precision):
    model, processor = FastVisionModel.from_pretrained(folder, max_seq_length=128, **arguments)
    assert origin_of(model).precision is precision
    assert origin_of(model).source == str(folder)
    assert isinstance(processor, Qwen2VLProcessor)
    assert model.max_seq_length == 128
    assert checkpointing_mode(model) == "offload"


def test_a_contradiction_is_refused_before_anything_is_read():
    with pytest.raises(ConfigError, match="load_in_4bit=True and full_finetuning=True"):
        FastVisionModel.from_pretrained("/no/such/folder", load_in_4bit=True, full_finetuning=True)


@pytest.mark.parametrize("precision", [{}, {"load_in_8bit": True}, {"load_in_16bit": True}], ids=str)
def test_an_adapter_folder_reloads_to_equal_logits(folder, batch, ask, adapted, tmp_path, precision):
    model = adapted(precision)
    ask.train(model)
    expected = ask.logits(model, batch)
    model.save_pretrained(tmp_path)
    again, processor = FastVisionModel.from_pretrained(tmp_path, max_seq_length=64, **precision)
    assert isinstance(again, peft.PeftModel)
    assert torch.equal(ask.logits(again, batch), expected)
    assert isinstance(processor, Qwen2VLProcessor)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == set(ask.adapter(again))
    assert again.max_seq_length == 64
    assert origin_of(again).source == str(folder)
    assert checkpointing_mode(again) == "offload"


def test_plain_peft_reloads_the_adapter_to_equal_logits(folder, batch, ask, adapted, tmp_path):
    model = adapted()
    ask.train(model)
    model.save_pretrained(tmp_path)
    stock = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    stock = peft.PeftModel.from_pretrained(stock, tmp_path)
    torch.testing.assert_close(ask.logits(stock, batch), ask.logits(model, batch), rtol=1e-5, atol=1e-6)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder)


def test_a_reloaded_adapter_trains_on(batch, ask, adapted, tmp_path):
    model = adapted()
    ask.train(model)
    _, expected = ask.gradients(model, batch)
    model.save_pretrained(tmp_path)
    again, _ = FastVisionModel.from_pretrained(tmp_path, load_in_16bit=True)
    FastVisionModel.for_training(again)
    _, found = ask.gradients(again, batch)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_adapters_own_processor_is_taken(folder, adapted, tmp_path):
    model = adapted()
    _, processor = FastVisionModel.from_pretrained(folder, load_in_16bit=True)
    processor.chat_template = "{{ 'its own' }}"
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    _, found = FastVisionModel.from_pretrained(tmp_path, load_in_16bit=True)
    assert found.chat_template == "{{ 'its own' }}"


def test_an_adapter_is_not_saved_into_a_file(adapted, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="is a file: name a folder"):
        adapted().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_methods_are_bound_to_the_instance(folder, adapted):
    model = adapted()
    full, _ = FastVisionModel.from_pretrained(folder, full_finetuning=True)
    for one in (model, full):
        assert one.save_pretrained_merged.args == (one,)
        assert one.push_to_hub_merged.args == (one,)
        assert not hasattr(type(one), "save_pretrained_merged")


def test_a_model_stored_as_a_whole_has_its_methods(batch, ask, adapted, tmp_path):
    model = adapted()
    torch.save(model, tmp_path / "model.pt")
    other = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(ask.logits(other, batch), ask.logits(model, batch))
    for name, of in (("lora", model), ("of_stored", other)):
        of.save_pretrained(tmp_path / name)
    files = sorted(file.name for file in (tmp_path / "lora").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "of_stored").iterdir())
    other.save_pretrained_merged(tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(ask.logits(merged, batch), ask.logits(other, batch), rtol=1e-4, atol=1e-5)


def test_a_merged_model_reloads_by_plain_transformers(folder, batch, ask, adapted, tmp_path):
    model = adapted()
    _, processor = FastVisionModel.from_pretrained(folder, load_in_16bit=True)
    ask.train(model)
    model.save_pretrained_merged(tmp_path / "merged", processor)
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(ask.logits(stock, batch), ask.logits(model, batch), rtol=1e-4, atol=1e-5)


def test_a_fully_finetuned_model_saves_what_it_learned(folder, batch, ask, tmp_path, capsys):
    model, processor = FastVisionModel.from_pretrained(folder, full_finetuning=True)
    model.print_trainable_parameters()
    assert "trainable%: 100.0000" in capsys.readouterr().out
    ask.train(model)
    model.save_pretrained_merged(tmp_path / "merged", processor)
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(ask.logits(stock, batch), ask.logits(model, batch), rtol=1e-5, atol=1e-6)


def copied_adapter(adapted, tmp_path, **changes):
    adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_name_or_path": "/gone/base"}, "'/gone/base', and there is no such folder"),
        ({"base_model_name_or_path": None}, "names no base_model_name_or_path"),
        ({"peft_type": "IA3"}, "of type 'IA3'"),
        ({"r": 16}, "does not fit its base"),
    ],
    ids=str,
)
def test_an_adapter_that_cannot_be_loaded(adapted, tmp_path, changes, message):
    with pytest.raises(CheckpointError) as caught:
        FastVisionModel.from_pretrained(copied_adapter(adapted, tmp_path, **changes), load_in_16bit=True)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_adapter_with_a_tensor_that_has_no_place(adapted, tmp_path):
    from safetensors.torch import load_file, save_file

    copied_adapter(adapted, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = next(name for name in tensors if "q_proj" in name)
    tensors[name.replace("q_proj", "x_proj")] = tensors.pop(name)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="disagree in 2 tensors"):
        FastVisionModel.from_pretrained(tmp_path, load_in_16bit=True)


def test_an_adapter_without_safetensors(adapted, tmp_path):
    copied_adapter(adapted, tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors"):
        FastVisionModel.from_pretrained(tmp_path, load_in_16bit=True)


def test_full_finetuning_of_an_adapter_is_refused(adapted, tmp_path):
    with pytest.raises(ConfigError, match="which is an adapter"):
        FastVisionModel.from_pretrained(copied_adapter(adapted, tmp_path), full_finetuning=True)


@pytest.mark.parametrize("removed", ["*processor*", "*token*"])
def test_a_checkpoint_without_its_processor(folder, tmp_path, removed):
    target = shutil.copytree(folder, tmp_path / "copy")
    for path in target.glob(removed):
        path.unlink()
    with pytest.raises(CheckpointError, match="processor") as caught:
        FastVisionModel.from_pretrained(target, load_in_16bit=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [0, -5, 2.5, "2048", None, True])
def test_a_length_that_is_none_is_refused(folder, length):
    with pytest.raises(ConfigError, match="max_seq_length"):
        FastVisionModel.from_pretrained(folder, max_seq_length=length)


def test_a_length_above_the_models_positions_is_warned_of(folder, caplog):
    with caplog.at_level(logging.WARNING, logger="fvlm_vision"):
        model, _ = FastVisionModel.from_pretrained(folder, load_in_16bit=True, max_seq_length=10**7)
    assert "max_seq_length=10000000 is above the" in caplog.text
    assert model.max_seq_length == 10**7


@pytest.mark.parametrize(
    "options",
    [
        {"use_gradient_checkpointing": "some"},
        {"gpu_memory_utilization": 1.5},
        {"gpu_memory_utilization": 0},
        {"gpu_memory_utilization": "half"},
        {"fast_inference": "yes"},
        {"max_seq_len": 5},
        {"load_in_4bit": "yes"},
        {"dtype": "int4"},
        {"trust_remote_code": 1},
        {"device_map": "warp"},
        {"revision": "v2"},
        {"max_lora_rank": 0},
    ],
    ids=str,
)
def test_arguments_that_cannot_be_used_are_refused(folder, options):
    with pytest.raises(ConfigError) as caught:
        FastVisionModel.from_pretrained(folder, **options)
    assert next(iter(options)) in str(caught.value)


def test_the_token_is_in_nothing_that_is_returned_or_saved(folder, tmp_path):
    token = "hf_tokenthatmustnotleak"
    model, processor = FastVisionModel.from_pretrained(folder, load_in_16bit=True, token=token)
    model = FastVisionModel.get_peft_model(model)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model.save_pretrained_merged(tmp_path / "merged", processor)
    assert token not in repr(processor)
    saved = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(saved) > 5
    assert not [path for path in saved if token.encode() in path.read_bytes()]


def test_importing_is_quick_and_loads_nothing_heavy():
    code = (
        "import sys, time; t = time.perf_counter(); import fvlm_vision, fvlm_core;"
        "print(time.perf_counter() - t, {'torch', 'transformers', 'peft', 'trl'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    seconds, loaded = out.split(" ", 1)
    assert float(seconds) < 1
    assert loaded.strip() == "set()"
