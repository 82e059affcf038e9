"""Every checkpointing mode gives the gradients of none, and keeps no more than it says."""

import copy
import logging
from types import SimpleNamespace

import peft
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForImageTextToText

from fvlm_core import ConfigError, apply_checkpointing, checkpointing_mode, remove_checkpointing
from fvlm_core.checkpointing import resume_checkpointing, suspend_checkpointing
from fvlm_core.testing import tiny_checkpoint

MODES = [False, True, "offload", "unsloth", "auto"]
VISION = r"model\.visual\.blocks\..*\.(qkv|proj|fc1|fc2)"
LANGUAGE = r"model\.language_model\..*_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoint("qwen2_vl", tmp_path_factory.mktemp("checkpointing") / "base")


@pytest.fixture(scope="module")
def loaded(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def model(loaded):
    return copy.deepcopy(loaded)


@pytest.fixture(scope="module")
def batch(loaded):
    """One row: four text tokens, the four tokens of one 8 × 8 patch image and four text tokens."""
    config = loaded.config
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(300, 500, (1, 24), generator=generator)
    ids[0, 4] = config.vision_start_token_id
    ids[0, 5:9] = config.image_token_id
    vision = config.vision_config
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    labels = ids.clone()
    labels[0, 4:9] = -100
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == config.image_token_id).int(),
        "pixel_values": torch.randn(16, width, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "labels": labels,
    }


def with_lora(model, pattern):
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=pattern, init_lora_weights=False))
    return adapted.train()


def gradients(model, batch):
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("pattern", [VISION, LANGUAGE, f"{VISION}|{LANGUAGE}"], ids=["vision", "language", "both"])
@pytest.mark.parametrize("mode", MODES[1:])
def test_gradients_equal_those_without_checkpointing(model, batch, pattern, mode):
    model = with_lora(model, pattern)
    loss, expected = gradients(model, batch)
    assert expected
    assert all(gradient.abs().max() > 0 for name, gradient in expected.items() if "lora_B" in name)
    assert sum("lora_B" in name for name in expected) == sum("lora_B" in name for name, _ in model.named_parameters())

    assert apply_checkpointing(model, mode) == (True if mode is True else "offload")
    again, found = gradients(model, batch)
    assert again == loss
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("mode", MODES[1:])
def test_full_finetuning_gradients_equal_those_without_checkpointing(model, batch, mode):
    model.train()
    loss, expected = gradients(model, batch)
    apply_checkpointing(model, mode)
    again, found = gradients(model, batch)
    assert again == loss
    assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, msg=name)


def test_dropout_draws_the_same_in_the_recomputation(model, batch):
    config = peft.LoraConfig(r=4, target_modules=LANGUAGE, lora_dropout=0.5, init_lora_weights=False)
    model = peft.get_peft_model(model, config).train()
    results = []
    for mode in (False, True, "offload"):
        apply_checkpointing(model, mode)
        torch.manual_seed(7)
        results.append(gradients(model, batch))
    for loss, found in results[1:]:
        assert loss == results[0][0]
        assert all(torch.equal(found[name], gradient) for name, gradient in results[0][1].items())


def saved_numbers(model, batch, part):
    """How many numbers autograd saves while ``part`` runs forward, and how often its layers run in a step."""
    count = SimpleNamespace(saved=0, runs=0, inside=False)
    weights = {parameter.data_ptr() for parameter in model.parameters()}

    def pack(tensor):
        if count.inside and tensor.data_ptr() not in weights:  # activations only
            count.saved += tensor.numel()
        return tensor

    def count_run(module, args):
        count.runs += 1

    def enter(module, args):
        count.inside = True

    def leave(module, args, output):
        count.inside = False

    hooks = [
        part.register_forward_pre_hook(enter),
        part.register_forward_hook(leave),
        *(block.attn.register_forward_pre_hook(count_run) for block in part.blocks),
    ]
    model.zero_grad()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch, use_cache=False).loss
    loss.backward()
    for hook in hooks:
        hook.remove()
    return count


@pytest.mark.parametrize("mode", MODES)
def test_a_frozen_vision_tower_keeps_nothing_and_runs_once(model, batch, mode):
    tower = model.model.visual
    model = with_lora(model, LANGUAGE)
    apply_checkpointing(model, mode)
    count = saved_numbers(model, batch, tower)
    assert count.saved == 0
    assert count.runs == len(tower.blocks)


def test_the_count_of_saved_numbers_sees_a_trained_tower(model, batch):
    """The measure of the test above: nothing saved must not come from a measure that sees nothing."""
    tower = model.model.visual
    model = with_lora(model, VISION)
    without = saved_numbers(model, batch, tower)
    apply_checkpointing(model, True)
    recomputed = saved_numbers(model, batch, tower)
    assert without.saved > 2 * recomputed.saved > 0
    assert (without.runs, recomputed.runs) == (len(tower.blocks), 2 * len(tower.blocks))


@pytest.mark.parametrize("mode", [None, 1, "gpu", "True", 0.5])
def test_a_mode_that_is_none_is_refused(model, mode):
    with pytest.raises(ConfigError, match="use_gradient_checkpointing"):
        apply_checkpointing(model, mode)


def test_the_mode_can_be_asked_for(model):
    assert checkpointing_mode(model) is False
    model.gradient_checkpointing_enable()
    assert checkpointing_mode(model) is True
    for mode, expected in zip(MODES, [False, True, "offload", "offload", "offload"], strict=True):
        assert apply_checkpointing(model, mode) == expected
        assert checkpointing_mode(model) == expected


def test_auto_says_what_it_is(model, caplog):
    with caplog.at_level(logging.INFO, logger="fvlm_core"):
        apply_checkpointing(model, "auto")
    assert [record.message for record in caplog.records] == [
        "use_gradient_checkpointing='auto' is 'offload' here: the model does not lie on one GPU with fused layers."
    ]


@pytest.mark.parametrize("mode", [False, True, "offload"])
def test_a_trainers_own_setting_keeps_the_chosen_mode(model, batch, mode):
    model = with_lora(model, LANGUAGE)
    model.gradient_checkpointing_enable()  # transformers' own, whose hooks make every tower's input want a gradient
    assert saved_numbers(model, batch, model.base_model.model.model.visual).saved > 0
    apply_checkpointing(model, mode)
    model.gradient_checkpointing_disable()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    assert checkpointing_mode(model) == mode
    assert saved_numbers(model, batch, model.base_model.model.model.visual).saved == 0


def test_suspending_and_resuming_restores_the_mode(model):
    apply_checkpointing(model, "offload")
    suspend_checkpointing(model)
    assert checkpointing_mode(model) is False
    resume_checkpointing(model)
    assert checkpointing_mode(model) == "offload"


def test_resuming_a_model_that_was_given_no_mode_changes_nothing(model):
    resume_checkpointing(model)
    assert checkpointing_mode(model) is False


def test_removing_leaves_the_instance_as_it_was(model):
    model.disable_input_require_grads()
    before = set(vars(model))
    apply_checkpointing(model, "offload")
    remove_checkpointing(model)
    assert set(vars(model)) == before
    assert checkpointing_mode(model) is False
    model.gradient_checkpointing_enable()
    assert model.enable_input_require_grads.__func__ is type(model).enable_input_require_grads
    assert checkpointing_mode(model) is True


def test_another_instance_is_not_touched(model, loaded):
    apply_checkpointing(model, "offload")
    assert "gradient_checkpointing_enable" not in vars(loaded)
    assert checkpointing_mode(loaded) is False


def test_a_copy_keeps_its_own_mode(model):
    apply_checkpointing(model, "offload")
    other = copy.deepcopy(model)
    other.gradient_checkpointing_disable()
    other.gradient_checkpointing_enable()
    assert checkpointing_mode(other) == "offload"
    suspend_checkpointing(model)
    assert checkpointing_mode(other) == "offload"


def test_a_class_without_support_says_so_and_stays_off(model, caplog):
    model.supports_gradient_checkpointing = False
    assert apply_checkpointing(model, "offload") is False
    assert "does not support gradient checkpointing" in caplog.text
