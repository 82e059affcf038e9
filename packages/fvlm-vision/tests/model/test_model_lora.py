"""get_peft_model gives what plain PEFT gives on the chosen modules; every argument works or is refused."""

import copy
import logging

import peft
import pytest
import torch
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from fvlm_core import ConfigError, checkpointing_mode
from fvlm_vision import FastVisionModel

NF4 = {"load_in_4bit": True}
ATTENTION = {"vision": r"attn\.(qkv|proj)", "language": r"self_attn\.[qkvo]_proj"}
MLP = {"vision": r"mlp\.fc[12]", "language": r"mlp\.(gate|up|down)_proj"}
PREFIX = {"vision": r"model\.visual\.blocks\.\d+\.", "language": r"model\.language_model\.layers\.\d+\."}
EVERYTHING = "|".join(PREFIX[tower] + part[tower] for tower in PREFIX for part in (ATTENTION, MLP))


@pytest.fixture(scope="module")
def _loaded(folder):
    return FastVisionModel.from_pretrained(folder, load_in_16bit=True)[0]


@pytest.fixture
def base(_loaded):
    return copy.deepcopy(_loaded)


def plain_peft(folder, precision, **options):
    """The same model by transformers, bitsandbytes and PEFT alone."""
    quantized = {}
    if precision == NF4:
        quantized["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=["lm_head", "model.visual.merger"],
        )
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, **quantized)
    torch.manual_seed(3407)
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options)).train()


@pytest.mark.parametrize("precision", [NF4, {"load_in_16bit": True}], ids=["nf4", "fp32"])
@pytest.mark.parametrize("extra", [{}, {"use_rslora": True}, {"use_dora": True}, {"bias": "lora_only"}], ids=str)
def test_loss_and_gradients_equal_plain_peft(folder, batch, ask, adapted, precision, extra):
    ours = adapted(precision, **extra)
    stock = plain_peft(folder, precision, r=4, lora_alpha=8, target_modules=EVERYTHING, **extra)
    start, expected_start = ask.adapter(ours), ask.adapter(stock)
    assert start.keys() == expected_start.keys()
    assert all(torch.equal(start[name], expected_start[name]) for name in start)
    ask.train(ours)
    ask.train(stock)
    loss, found = ask.gradients(ours, batch)
    expected_loss, expected = ask.gradients(stock, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("tower", ["vision", "language"])
def test_a_tower_that_is_not_chosen_holds_nothing_trainable(base, tower):
    model = FastVisionModel.get_peft_model(base, **{f"finetune_{tower}_layers": False})
    path = {"vision": "model.visual.", "language": "model.language_model."}[tower]
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert not [name for name in trainable if path in name]


def test_a_frozen_tower_carries_no_gradient_though_checkpointing_was_on(folder, batch):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    model.gradient_checkpointing_enable()  # transformers' own, with hooks on every tower's input
    model = FastVisionModel.get_peft_model(model, finetune_vision_layers=False)
    carried = []
    tower = model.base_model.model.model.visual
    for module in tower.modules():
        module.register_forward_hook(lambda module, args, out: carried.append(getattr(out, "requires_grad", False)))
    model(**batch).loss.backward()
    assert carried
    assert not any(carried)


@pytest.mark.parametrize("mode", [False, True, "unsloth", "auto"])
@pytest.mark.parametrize("load", [NF4, {"load_in_8bit": True}, {"load_in_16bit": True}], ids=str)
def test_a_frozen_vision_tower_saves_nothing_for_backward(folder, batch, load, mode):
    saved = {}
    for vision in (False, True):
        model, _ = FastVisionModel.from_pretrained(folder, **load)
        model = FastVisionModel.get_peft_model(model, finetune_vision_layers=vision, use_gradient_checkpointing=mode)
        tower, numbers, inside = model.get_submodule("base_model.model.model.visual"), [], []
        own = {p.data_ptr() for p in model.parameters()}

        def pack(tensor, numbers=numbers, inside=inside, own=own):
            if inside and tensor.data_ptr() not in own:
                numbers.append(tensor.numel())
            return tensor

        tower.register_forward_pre_hook(lambda module, args, inside=inside: inside.append(True))
        tower.register_forward_hook(lambda module, args, out, inside=inside: inside.clear())
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(**batch).loss.backward()
        saved[vision] = sum(numbers)
    assert saved[False] == 0
    assert saved[True] > 0  # the measure sees what is there


@pytest.mark.parametrize("tower", ["vision", "language"])
def test_all_biases_means_those_of_the_chosen_towers(base, tower, tmp_path):
    model = FastVisionModel.get_peft_model(base, bias="all", r=2, **{f"finetune_{tower}_layers": False})
    path = {"vision": ".visual.", "language": ".language_model."}[tower]
    biases = [name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")]
    assert biases
    assert not [name for name in biases if path in name]
    model.save_pretrained(tmp_path)
    again, _ = FastVisionModel.from_pretrained(tmp_path, load_in_16bit=True)
    assert [n for n, p in again.named_parameters() if p.requires_grad and n.endswith("bias")] == biases


def test_the_seed_decides_the_start_and_the_global_state_is_left(base, ask):
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    first = FastVisionModel.get_peft_model(copy.deepcopy(base), random_state=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(12)
    again = FastVisionModel.get_peft_model(copy.deepcopy(base), random_state=1)
    other = FastVisionModel.get_peft_model(copy.deepcopy(base), random_state=2)
    start = ask.adapter(first)
    assert all(torch.equal(value, ask.adapter(again)[name]) for name, value in start.items())
    assert not any(torch.equal(value, ask.adapter(other)[n]) for n, value in start.items() if "lora_A" in n)


def test_no_seed_draws_from_the_global_state(base, ask):
    torch.manual_seed(5)
    first = FastVisionModel.get_peft_model(copy.deepcopy(base), random_state=None)
    torch.manual_seed(5)
    again = FastVisionModel.get_peft_model(copy.deepcopy(base), random_state=None)
    assert all(torch.equal(value, ask.adapter(again)[name]) for name, value in ask.adapter(first).items())


def test_adapters_of_a_half_precision_model_are_float32(folder, ask):
    model, _ = FastVisionModel.from_pretrained(folder, load_in_16bit=True, dtype="bf16")
    model = FastVisionModel.get_peft_model(model)
    assert {p.dtype for p in ask.adapter(model).values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_options_reach_peft(base):
    model = FastVisionModel.get_peft_model(
        base,
        r=8,
        lora_alpha=20,
        lora_dropout=0.25,
        use_rslora=True,
        target_modules=["q_proj", "v_proj"],
        finetune_vision_layers=False,
        finetune_last_n_layers=1,
        modules_to_save=["lm_head"],
        init_lora_weights="gaussian",
        rank_pattern={"v_proj": 2},
    )
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (8, 20, 0.25, True)
    assert config.init_lora_weights == "gaussian"
    last = len(base.model.language_model.layers) - 1
    layers = {f"model.language_model.layers.{last}.self_attn.{name}_proj" for name in "qv"}
    assert set(model.base_model.targeted_module_names) == layers == set(model.fvlm_targets.modules)
    attention = base.model.language_model.layers[last].self_attn
    assert (attention.q_proj.r, attention.v_proj.r) == ({"default": 8}, {"default": 2})
    assert any("lm_head.modules_to_save" in name for name, p in model.named_parameters() if p.requires_grad)


def test_the_projector_is_taken_when_it_is_asked_for(base):
    model = FastVisionModel.get_peft_model(base, finetune_projector_layers=True)
    assert "model.visual.merger.mlp.0" in model.base_model.targeted_module_names


def test_loftq_without_a_gpu_is_refused(base, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="LoftQ is computed on a GPU"):
        FastVisionModel.get_peft_model(base, loftq_config={"loftq_bits": 4})


@pytest.mark.gpu
def test_loftq_starts_from_quantized_weights(folder):
    pytest.importorskip("scipy", reason="PEFT's LoftQ needs it")
    model, _ = FastVisionModel.from_pretrained(folder, load_in_16bit=True, dtype=torch.float32)
    before = model.model.language_model.layers[0].self_attn.q_proj.weight.detach().clone()
    model = FastVisionModel.get_peft_model(model, loftq_config={"loftq_bits": 4, "loftq_iter": 1}, r=4, lora_alpha=4)
    layer = model.base_model.model.model.language_model.layers[0].self_attn.q_proj
    left = (layer.weight - before).norm()
    fitted = layer.weight + layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert 0 < (fitted - before).norm() < left


def test_the_table_is_logged_once_and_kept(base, caplog):
    with caplog.at_level(logging.INFO, logger="fvlm_vision"):
        model = FastVisionModel.get_peft_model(base, r=4)
    assert [record.message.count("vision") for record in caplog.records if "LoRA of rank 4" in record.message] != []
    assert sum(str(model.fvlm_targets.table) in record.message for record in caplog.records) == 1
    assert len(model.fvlm_targets.modules) == len(model.base_model.targeted_module_names)


def test_trainable_parameters_are_printed_tower_by_tower(base, tmp_path, capsys):
    model = FastVisionModel.get_peft_model(base, r=4, finetune_vision_layers=False, finetune_mlp_modules=False)
    model.save_pretrained(tmp_path)
    again, _ = FastVisionModel.from_pretrained(tmp_path, load_in_16bit=True)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for one in (model, again):
        one.print_trainable_parameters()
        printed = capsys.readouterr().out
        assert f"trainable params: {trained:,}" in printed
        assert str(model.fvlm_targets.table) in printed
    rows = [line.split()[:5] for line in printed.splitlines()]
    assert ["language", "attention", "8", "of", "8"] in rows
    assert ["vision", "attention", "0", "of", "4"] in rows


@pytest.mark.parametrize("mode", [False, True, "offload", "unsloth", "auto"])
def test_the_checkpointing_mode_is_applied(base, mode):
    model = FastVisionModel.get_peft_model(base, use_gradient_checkpointing=mode)
    assert checkpointing_mode(model) == (mode if isinstance(mode, bool) else "offload")
    assert model.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": -1}, "r=-1 is not a LoRA rank"),
        ({"r": 0}, "r=0"),
        ({"r": 2.5}, "r=2.5"),
        ({"r": True}, "r=True"),
        ({"lora_alpha": 0}, "lora_alpha=0"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan"),
        ({"lora_alpha": "16"}, "lora_alpha='16'"),
        ({"lora_dropout": 1}, "lora_dropout=1"),
        ({"lora_dropout": -0.1}, "lora_dropout=-0.1"),
        ({"bias": "some"}, "bias='some'"),
        ({"random_state": -3}, "random_state=-3"),
        ({"use_rslora": "yes"}, "use_rslora='yes'"),
        ({"use_gradient_checkpointing": "often"}, "use_gradient_checkpointing='often'"),
        ({"rnak_pattern": {}}, "'rnak_pattern' is not an option of get_peft_model: the nearest one is 'rank_pattern'."),
        ({"layers_to_transform": [0]}, "finetune_last_n_layers"),
        ({"loftq_config": {"loftq_bits": 4}, "init_lora_weights": "gaussian"}, "contradict each other"),
        ({"init_lora_weights": "magic"}, "PEFT refuses"),
        ({"finetune_vision_layers": False, "finetune_language_layers": False}, "finetune_vision_layers=False"),
        ({"finetune_attention_modules": False, "finetune_mlp_modules": False}, "finetune_attention_modules=False"),
        ({"target_modules": ["nothing_proj"]}, "nothing_proj"),
        ({"modules_to_save": ["nonsense"]}, "modules_to_save: 'nonsense' is the end of no module's name"),
        ({"modules_to_save": "lm_head"}, "modules_to_save='lm_head' is not a list"),  # PEFT takes its letters
        ({"rank_pattern": {"x_proj": 2}}, "rank_pattern: 'x_proj' matches none of the 22 modules"),
        ({"alpha_pattern": {"x_proj": 2}}, "alpha_pattern: 'x_proj' matches none"),
        ({"rank_pattern": {"(q_proj": 2}}, "rank_pattern: '(q_proj' is not a regular expression"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern=['q_proj'] is not a dictionary"),
        ({"use_dora": "yes"}, "use_dora='yes' is not a boolean"),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_refused(base, options, message):
    with pytest.raises(ConfigError) as caught:
        FastVisionModel.get_peft_model(base, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_loftq_on_quantized_weights_is_refused(folder):
    model, _ = FastVisionModel.from_pretrained(folder)
    with pytest.raises(ConfigError, match="load_in_16bit=True"):
        FastVisionModel.get_peft_model(model, loftq_config={"loftq_bits": 4})


def test_a_fully_finetuned_model_takes_no_adapter(folder):
    model, _ = FastVisionModel.from_pretrained(folder, full_finetuning=True)
    with pytest.raises(ConfigError, match="full_finetuning=True"):
        FastVisionModel.get_peft_model(model)


def test_a_second_adapter_is_refused(base):
    model = FastVisionModel.get_peft_model(base)
    with pytest.raises(ConfigError, match="has an adapter already"):
        FastVisionModel.get_peft_model(model)


def test_what_is_no_model_is_refused():
    with pytest.raises(ConfigError, match="model is a str"):
        FastVisionModel.get_peft_model("folder")
