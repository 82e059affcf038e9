"""Recorded layers: the same loss and gradients as the layers themselves, whatever changes between two replays.

Without a GPU the recordings run the layers' own code again over the shared memory, which tests all but CUDA itself.
"""

import copy

import pytest
import torch
from fused_tools import (
    QWEN,
    adapted_model,
    assert_equal_step,
    assert_same_step,
    gradients,
    kept,
    make_batch,
    recorded,
    step,
    without_mask,
)

from fvlm_core import Precision
from fvlm_core.checkpointing import (
    apply_checkpointing,
    graphs_of,
    resume_checkpointing,
    suspend_checkpointing,
    use_graphs,
)
from fvlm_core.fused import fuse_model

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def fused(tiny):
    model = adapted_model(tiny("qwen2_vl"))
    fuse_model(model)
    apply_checkpointing(model, True)
    return model


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", [True, "auto"])
@pytest.mark.parametrize("precision", [Precision.HALF, Precision.NF4], ids=str)
@pytest.mark.parametrize("family", QWEN)
def test_the_same_step_as_without_recordings(tiny, family, precision, mode, device):
    model = adapted_model(tiny(family), precision, device=device)
    fuse_model(model)
    batches = [make_batch(model.config, lengths, seed) for seed, lengths in enumerate([(24, 20), (30, 30), (9, 12)])]
    batches = [{name: value.to(device) for name, value in without_mask(batch).items()} for batch in batches]
    expected = [step(model, batch) for batch in batches]
    graphs = recorded(model, mode)
    for _ in range(3):
        for batch, wanted in zip(batches, expected, strict=True):
            assert_same_step(step(model, batch), wanted, tolerance=1e-5)
    layers = sum(len(blocks) for blocks in (model.base_model.model.model.visual.blocks,
                                            model.base_model.model.model.language_model.layers))  # fmt: skip
    assert graphs.recorded == layers  # three lengths, one recording
    assert graphs.replayed == 8 * layers  # the first batch of all came before the second sight
    assert kept(graphs) == (layers if mode == "auto" else 0, layers)


@pytest.mark.gpu
def test_bf16_under_autocast_equals_the_layers_themselves(tiny):
    model = adapted_model(tiny("qwen2_vl"), Precision.NF4, dtype=torch.bfloat16, device="cuda")
    fuse_model(model)
    batch = {name: value.cuda() for name, value in without_mask(make_batch(model.config, (64, 64))).items()}
    with torch.autocast("cuda", torch.bfloat16):
        expected = step(model, batch)
        graphs = recorded(model)
        for _ in range(3):
            assert_same_step(step(model, batch), expected, tolerance=2e-2)
    assert graphs.replayed > graphs.recorded > 0


def test_a_batch_with_a_mask_is_recorded(model):
    batch = make_batch(model.config)  # with a mask, since one row is padded
    expected = step(model, batch)
    graphs = recorded(model)
    for _ in range(3):
        assert_same_step(step(model, batch), expected)
    assert graphs.replayed == 2 * graphs.recorded > 0


@pytest.mark.parametrize("mode", [True, "auto"])
def test_parameters_may_change_in_place(model, mode):
    batch = without_mask(make_batch(model.config))
    recorded(model, mode)
    for _ in range(3):
        step(model, batch)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    ours = step(model, batch)
    use_graphs(model, None)
    assert_same_step(ours, step(model, batch))


@pytest.mark.parametrize("mode", [True, "auto"])
def test_gradients_add_up(model, mode):
    batches = [without_mask(make_batch(model.config, seed=seed)) for seed in range(3)]

    def accumulated():
        model.zero_grad()
        for batch in batches:
            (model(**batch).loss / len(batches)).backward()
        return gradients(model)

    expected = accumulated()
    recorded(model, mode)
    for _ in range(3):
        ours = accumulated()
    for name, gradient in expected.items():
        assert (ours[name] - gradient).norm() < 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("mode", [True, "auto"])
def test_two_forward_passes_before_the_backward_passes(model, mode):
    """A backward pass brings its own input and rotary tables back, whatever was loaded since, by other shapes too."""
    lengths = ((24, 24), (30, 11), (100, 90))
    batches = [without_mask(make_batch(model.config, rows, seed)) for seed, rows in enumerate(lengths)]
    expected = [step(model, batch) for batch in batches]
    recorded(model, mode)
    for _ in range(2):
        for batch in batches:
            step(model, batch)
    losses = [model(**batch).loss for batch in batches]
    for loss, wanted in zip(losses, expected, strict=True):
        model.zero_grad()
        loss.backward()
        assert_same_step((loss.detach(), gradients(model)), wanted)


def test_a_changed_adapter_is_noticed(model):
    batch = without_mask(make_batch(model.config))
    graphs = recorded(model)
    for _ in range(3):
        before = step(model, batch)
    with model.disable_adapter():
        disabled = model(**batch).loss
    assert disabled != before[0]
    use_graphs(model, None)
    with model.disable_adapter():
        torch.testing.assert_close(model(**batch).loss, disabled)
    use_graphs(model, graphs)
    q_proj = model.base_model.model.model.language_model.layers[0].self_attn.q_proj
    q_proj.scaling["default"] *= 3
    ours = step(model, batch)
    use_graphs(model, None)
    assert_same_step(ours, step(model, batch))
    assert ours[0] != before[0]


def test_a_parameter_that_moved_is_noticed(model):
    batch = without_mask(make_batch(model.config))
    recorded(model)
    for _ in range(3):
        step(model, batch)
    parameter = next(p for n, p in model.named_parameters() if "lora_B" in n and "language" in n)
    parameter.data = parameter.data * 2
    norm = model.base_model.model.model.language_model.layers[1].input_layernorm
    norm.weight.data = norm.weight.data * 2
    ours = step(model, batch)
    use_graphs(model, None)
    assert_same_step(ours, step(model, batch))


def test_a_frozen_parameter_gets_no_gradient_any_more(model):
    batch = without_mask(make_batch(model.config))
    recorded(model)
    for _ in range(3):
        step(model, batch)
    frozen = [name for name, p in model.named_parameters() if p.requires_grad and "layers.0" in name]
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
            parameter.grad = None
    ours = step(model, batch)
    assert frozen
    assert not set(frozen) & set(ours[1])
    use_graphs(model, None)
    assert_same_step(ours, step(model, batch))


def test_a_frozen_tower_is_replayed_too(tiny):
    model = adapted_model(tiny("qwen2_vl"), targets=("language",))
    fuse_model(model)
    batch = without_mask(make_batch(model.config))
    expected = step(model, batch)
    graphs = recorded(model)
    for _ in range(3):
        assert_same_step(step(model, batch), expected)
    assert graphs.recorded == 4


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}], ids=str)
def test_what_cannot_be_recorded_runs_as_it_is(tiny, options):
    model = adapted_model(tiny("qwen2_vl"), **options)
    fuse_model(model)
    batch = without_mask(make_batch(model.config))
    graphs = recorded(model)
    for _ in range(3):
        step(model, batch)
    assert graphs.recorded == 0


def test_inference_between_two_steps_changes_nothing(model):
    batch = without_mask(make_batch(model.config))
    recorded(model)
    for _ in range(3):
        before = step(model, batch)
    suspend_checkpointing(model.eval())
    with torch.no_grad():
        model(**batch)
    resume_checkpointing(model.train())
    assert_equal_step(step(model, batch), before)


def test_a_copied_model_records_anew(model):
    batch = without_mask(make_batch(model.config))
    graphs = recorded(model)
    for _ in range(2):
        expected = step(model, batch)
    other = copy.deepcopy(model)
    assert graphs_of(other) is not graphs
    for _ in range(3):
        assert_same_step(step(other, batch), expected)
    assert graphs_of(other).recorded == graphs.recorded


def test_the_oldest_shape_is_dropped(model, monkeypatch):
    monkeypatch.setattr("fvlm_core.graphs.runner.MOST_STAGES", 2)
    graphs = recorded(model)
    for length in (20, 100) * 5:
        step(model, without_mask(make_batch(model.config, (length, length))))
    assert len(graphs._stages) == 2
    assert graphs.recorded > 6


@pytest.mark.parametrize("mode", [True, "auto"])
def test_stages_of_all_shapes_share_the_memory_of_the_largest(model, mode):
    batches = [without_mask(make_batch(model.config, (length, length), length)) for length in (150, 20, 90)]
    expected = [step(model, batch) for batch in batches]
    graphs = recorded(model, mode)
    for _ in range(3):
        for batch, wanted in zip(batches, expected, strict=True):
            assert_same_step(step(model, batch), wanted)
    decoders = [kind.stage for key, kind in graphs._stages.items() if "Decoder" in key[0].__name__]
    assert len({stage.tokens for stage in decoders}) == 3
    for role in ("x", "y", "dy", "dx"):
        assert len({getattr(stage, role).data_ptr() for stage in decoders}) == 1, role
    assert len({stage.kwargs["position_embeddings"][0].data_ptr() for stage in decoders}) == 1
    assert len({flat.data_ptr() for stage in decoders for flat, _ in stage._gradients.values()}) == 1
