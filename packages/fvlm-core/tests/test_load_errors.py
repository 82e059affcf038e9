"""What cannot be loaded gets one sentence that names it, and no library's internals."""

import json
import shutil
import traceback

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from fvlm_core import CheckpointError, ConfigError, Precision, load_model
from fvlm_core.errors import MissingExtraError
from fvlm_core.fused import fusion_report


@pytest.fixture
def copy(tiny, tmp_path):
    return shutil.copytree(tiny("qwen2_vl"), tmp_path / "copy")


def refused(error, folder, **options):
    """The message of the error that loading raises; it must be one sentence's line without a chain of causes."""
    with pytest.raises(error) as caught:
        load_model(folder, **{"precision": Precision.HALF, **options})
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    text = "".join(traceback.format_exception(caught.value))
    assert "During handling" not in text
    assert "direct cause" not in text
    return message


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "a/b/c"])
def test_a_missing_folder(name):
    assert name in refused(CheckpointError, name)


@pytest.mark.parametrize("name", ["", " ", None, 3])
def test_no_name(name):
    assert refused(ConfigError, name).startswith(f"model_name={name!r}")


def test_a_file(copy):
    assert "is a file" in refused(CheckpointError, copy / "config.json")


def test_a_folder_that_is_no_checkpoint(tmp_path):
    assert "has no config.json" in refused(CheckpointError, tmp_path)


def test_a_torn_config(copy):
    (copy / "config.json").write_text('{"model_type": "qwen2_vl", ')
    assert "config.json is not valid JSON" in refused(CheckpointError, copy)


def test_a_config_that_is_a_list(copy):
    (copy / "config.json").write_text("[]")
    assert "holds no JSON object" in refused(CheckpointError, copy)


@pytest.mark.parametrize(
    ("content", "message"), [(b"[]", "holds no JSON object"), (b'{"a": "\xff', "is not valid JSON")]
)
def test_a_generation_config_that_is_none(copy, content, message):
    """transformers takes anything for it, and fails when the model first generates."""
    (copy / "generation_config.json").write_bytes(content)
    assert f"generation_config.json {message}" in refused(CheckpointError, copy)


def test_a_config_without_a_type(copy):
    edit_config(copy, model_type=None)
    assert "names no model_type" in refused(CheckpointError, copy)


def test_an_unknown_type(copy):
    edit_config(copy, model_type="qwen9_vl")
    assert "'qwen9_vl'" in refused(CheckpointError, copy)


def test_a_config_with_a_value_of_the_wrong_kind(copy):
    config = json.loads((copy / "config.json").read_text())
    edit_config(copy, text_config={**config["text_config"], "hidden_size": "many"})
    assert "config.json of" in refused(CheckpointError, copy)


def test_code_that_nobody_said_to_trust(copy):
    edit_config(copy, model_type="own", auto_map={"AutoConfig": "own.Config"})
    (copy / "own.py").write_text("raise SystemExit('this code must not run')")
    assert "trust_remote_code=True" in refused(CheckpointError, copy)


def test_a_text_model(tmp_path):
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert "'llama'" in refused(CheckpointError, tmp_path)


def test_missing_weights(copy):
    (copy / "model.safetensors").unlink()
    assert "weights are missing" in refused(CheckpointError, copy)


def test_pickled_weights(copy):
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    message = refused(CheckpointError, copy)
    assert "pytorch_model.bin" in message
    assert "safetensors" in message


def test_torn_weights(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "model.safetensors is damaged" in refused(CheckpointError, copy)


def test_a_missing_shard(copy):
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:5]}, copy / "model-00001-of-00002.safetensors", {"format": "pt"})
    where = {name: f"model-0000{1 if name in names[:5] else 2}-of-00002.safetensors" for name in names}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert "model-00002-of-00002.safetensors is missing" in refused(CheckpointError, copy)


def test_an_index_without_a_map(copy):
    (copy / "model.safetensors").rename(copy / "model-00001-of-00001.safetensors")
    (copy / "model.safetensors.index.json").write_text("{}")
    assert "holds no weight_map" in refused(CheckpointError, copy)


def test_weights_that_lack_a_tensor(copy):
    tensors = load_file(copy / "model.safetensors")
    gone = next(name for name in tensors if name.endswith("q_proj.weight"))
    save_file({n: t for n, t in tensors.items() if n != gone}, copy / "model.safetensors", {"format": "pt"})
    message = refused(CheckpointError, copy)
    assert "lacks 1 of the weights" in message
    assert "q_proj.weight" in message


def test_weights_of_another_size(copy):
    tensors = load_file(copy / "model.safetensors")
    odd = next(name for name in tensors if name.endswith("q_proj.weight"))
    save_file({**tensors, odd: torch.zeros(3, 5)}, copy / "model.safetensors", {"format": "pt"})
    message = refused(CheckpointError, copy)
    assert "shape (3, 5)" in message
    assert "q_proj.weight" in message


def test_a_quantization_that_is_not_bitsandbytes(copy):
    edit_config(copy, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "'gptq'" in refused(CheckpointError, copy, precision=None)


def test_a_quantized_config_over_plain_weights(copy):
    edit_config(copy, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert "no stored weight is quantized" in refused(CheckpointError, copy, precision=None)


def test_an_unknown_option_names_the_nearest(copy):
    assert "the nearest one is 'attn_implementation'." in refused(ConfigError, copy, attn_implementaton="sdpa")
    assert "known options are attn_implementation" in refused(ConfigError, copy, zzz=1)


def test_an_attention_that_cannot_be_had(copy):
    message = refused(ConfigError, copy, attn_implementation="fast")
    assert "attn_implementation='fast' is none that a qwen2_vl model can have" in message
    assert "install it" in refused(MissingExtraError, copy, attn_implementation="flash_attention_2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trust_remote_code": "no"}, "trust_remote_code='no' is not a boolean"),  # any text would be taken for True
        ({"fused_layers": "yes"}, "fused_layers='yes' is not a boolean"),
        ({"revision": 5}, "revision=5 is not a branch"),
        ({"token": 5}, "token is of type int"),
    ],
)
def test_a_value_that_would_be_taken_for_another(copy, options, message):
    assert message in refused(ConfigError, copy, **options)


def test_places_name_parts_of_the_model_and_all_of_it(copy):
    """transformers takes such a dictionary without a word, and leaves what has no place on the CPU."""
    message = refused(ConfigError, copy, device_map={"modle.visual": "cpu", "": "cpu"})
    assert "places 'modle.visual', which the model does not have: the nearest name is 'model.visual'" in message
    message = refused(ConfigError, copy, device_map={"model.visual": "cpu", "lm_head": "cpu"})
    assert "has no place for 'model.language_model.embed_tokens.weight'" in message
    places = {"model.visual": "cpu", "model.language_model": "cpu", "lm_head": "cpu"}
    assert load_model(copy, precision=Precision.HALF, device_map=places).device.type == "cpu"
    assert load_model(copy, precision=Precision.HALF, device_map={"lm_head": "cpu", "": "cpu"}).device.type == "cpu"


@pytest.mark.parametrize("device_map", ["warp", "meta", "cuda:99", {}, {"": "cuda:99"}, 99, True, 1.5])
def test_a_device_that_is_not_there(copy, device_map):
    assert "device_map=" in refused(ConfigError, copy, device_map=device_map)


@pytest.mark.parametrize(
    "device_map", ["sequential", "auto", "balanced", "cpu", {"": "cpu"}, None, torch.device("cpu")]
)
def test_every_map_means_the_cpu_where_there_is_no_gpu(copy, device_map, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = load_model(copy, precision=Precision.HALF, device_map=device_map)
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_under_torchrun_each_process_gets_its_own_gpu(monkeypatch):
    from fvlm_core.placement import choose_device_map

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device_map("sequential") == {"": 1}
    assert choose_device_map("cuda") == {"": torch.device("cuda", 1)}
    assert choose_device_map("cuda:0") == {"": torch.device("cuda", 0)}
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="LOCAL_RANK='2'"):
        choose_device_map("auto")


def test_under_torchrun_each_process_enters_its_gpu_and_says_so(monkeypatch, caplog):
    from fvlm_core.placement import enter_device

    entered = []
    monkeypatch.setattr(torch.cuda, "set_device", entered.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    enter_device({"": 1})
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with caplog.at_level("INFO", "fvlm_core.placement"):
        for placed in ({"": "cpu"}, {"": torch.device("cpu")}, {"model": 0, "lm_head": 1}, "sequential"):
            enter_device(placed)
        assert entered == []
        assert caplog.messages == []
        enter_device({"": 1})
        enter_device({"": torch.device("cuda", 1)})
    assert entered == [1, 1]
    assert caplog.messages == ["Process 3 of 4: the whole model goes to cuda:1."] * 2


def test_a_model_on_several_devices_is_not_fused_and_says_so(copy, tmp_path, caplog):
    modules = load_model(copy, precision=Precision.HALF).model.language_model._modules
    places = {"model.visual": "disk", "lm_head": "cpu", **{f"model.language_model.{name}": "cpu" for name in modules}}
    options = {"precision": Precision.HALF, "device_map": places, "offload_folder": tmp_path / "offloaded"}
    with caplog.at_level("INFO", "fvlm_core.load"):
        model = load_model(copy, **options)
    assert "The model lies on cpu, meta: its layers are neither fused nor CUDA graphs." in caplog.messages
    assert fusion_report(model).fused == {}
    with pytest.raises(ConfigError, match="fused_layers=True cannot be had for a model that lies on cpu, meta"):
        load_model(copy, fused_layers=True, **options)
    with pytest.raises(ConfigError, match="memory_budget=2 has nothing to plan"):
        load_model(copy, memory_budget=2, **options)


def test_an_id_that_the_hub_does_not_give(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = refused(CheckpointError, "nobody/nothing", revision="v9", local_files_only=True)
    assert "'nobody/nothing'" in message
    assert "'v9'" in message
