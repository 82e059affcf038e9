"""Without flash attention on a GPU, segments of several lengths are read on the host: those layers run as they are."""

import pytest
import torch
from fused_tools import adapted_model, assert_same_step, recorded, step
from test_graphs_fit import GRIDS, sized_batch, stages_of

from fvlm_core.fused import fuse_model
from fvlm_core.graphs.fit import Fits


def fits_on_a_gpu_without_flash(module, kwargs, tokens):
    """What a call in fp32 fits, which no flash attention takes; a tensor that says it is there stands in."""

    class OnGpu(torch.Tensor):
        is_cuda = True

    hidden = torch.zeros(tokens, 64).as_subclass(OnGpu)
    return list(Fits().of(module, hidden, kwargs, torch.float32))


def test_without_flash_attention_only_segments_of_one_length_are_recorded(tiny):
    model = adapted_model(tiny("qwen2_vl"))
    fuse_model(model)
    block = model.get_base_model().model.visual.blocks[0]
    ragged = {"cu_seqlens": torch.tensor([0, 16, 64], dtype=torch.int32), "max_seqlen": 48}
    even = {"cu_seqlens": torch.tensor([0, 32, 64], dtype=torch.int32), "max_seqlen": 32}
    assert fits_on_a_gpu_without_flash(block, ragged, 64) == []
    assert fits_on_a_gpu_without_flash(block, {**even, "max_seqlen": None}, 64) == []
    assert [fit.tokens for fit in fits_on_a_gpu_without_flash(block, even, 64)] == [64]
    layer = model.get_base_model().model.language_model.layers[0]
    packed = {"packed_starts": even["cu_seqlens"], "packed_longest": 32}
    assert fits_on_a_gpu_without_flash(layer, packed, 64) == []


def test_a_tower_left_on_sdpa_fits_no_recording_by_segments(tiny):
    """It splits by lengths that it reads on the host, be they equal or not."""
    model = adapted_model(tiny("qwen2_vl"))
    fuse_model(model)
    block = model.get_base_model().model.visual.blocks[0]
    block.attn.config._attn_implementation = "sdpa"
    even = {"cu_seqlens": torch.tensor([0, 32, 64], dtype=torch.int32), "max_seqlen": 32}
    assert list(Fits().of(block, torch.zeros(64, 64), even, torch.float32)) == []


@pytest.mark.gpu
def test_ragged_images_in_fp32_leave_recording_on(tiny):
    model = adapted_model(tiny("qwen2_vl"), device="cuda")
    fuse_model(model)
    batch = {
        name: value.to("cuda") if isinstance(value, torch.Tensor) else value
        for name, value in sized_batch(model, GRIDS[0]).items()
    }
    expected = step(model, batch)
    graphs = recorded(model)
    for _ in range(3):
        assert_same_step(step(model, batch), expected)
    assert not graphs._off
    assert stages_of(graphs, "VisionBlock") == []
    assert graphs.replayed > 0  # the text layers
