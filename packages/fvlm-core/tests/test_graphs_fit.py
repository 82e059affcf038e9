"""Batches of ever new sizes run in few recordings, and compute what the layers themselves compute."""

import pytest
import torch
from family_tools import TRAINED, family_batch, picture
from fused_tools import QWEN, adapted_model, assert_same_step, make_batch, recorded, step, without_mask
from transformers import AutoProcessor

from fvlm_core import Precision
from fvlm_core.arch import facts_for, task_model
from fvlm_core.fused import fuse_model
from fvlm_core.graphs.fit import Fits, in_eighths

GRIDS = [[(4, 4), (6, 8)], [(8, 4), (4, 6)], [(10, 4), (2, 6)], [(6, 6), (4, 4)], [(4, 8), (8, 4)]]


def sized_batch(model, grids, seed=0, planned=True):
    """Rows of one image each, of the given heights and widths in patches."""
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    vision, merge = config.vision_config, config.vision_config.spatial_merge_size**2
    counts = [high * wide // merge for high, wide in grids]
    total = max(counts) + 20
    ids = torch.randint(300, 500, (len(grids), total), generator=generator)
    ids[:, 4] = config.vision_start_token_id
    for row, count in enumerate(counts):
        ids[row, 5 : 5 + count] = config.image_token_id
    labels = ids.masked_fill(ids == config.image_token_id, -100)
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    batch = {
        "input_ids": ids,
        "mm_token_type_ids": (ids == config.image_token_id).int(),
        "pixel_values": torch.randn(sum(high * wide for high, wide in grids), width, generator=generator),
        "image_grid_thw": torch.tensor([[1, high, wide] for high, wide in grids]),
        "labels": labels,
    }
    planner = facts_for(model).planner
    return batch | planner(model.get_base_model())(batch) if planned and planner is not None else batch


def stages_of(graphs, name):
    return [kind.stage for key, kind in graphs._stages.items() if name in key[0].__name__]


@pytest.mark.parametrize("number", [1, 63, 64, 65, 127, 500, 518, 576, 1000, 1025, 1947, 5120, 20480, 20481])
def test_lengths_are_rounded_to_eighths(number):
    found = in_eighths(number)
    assert number <= found < number + max(64, number / 8 + 1)
    assert found % 64 == 0
    assert in_eighths(found) == found


def test_there_are_eight_lengths_an_octave():
    assert len({in_eighths(number) for number in range(4097, 8193)}) == 8


@pytest.mark.parametrize("mode", [True, "offload", "auto"])
@pytest.mark.parametrize("family", QWEN)
def test_images_of_new_sizes_share_a_recording(tiny, family, mode):
    model = adapted_model(tiny(family))
    fuse_model(model)
    batches = [sized_batch(model, grids, seed) for seed, grids in enumerate(GRIDS)]
    expected = [step(model, batch) for batch in batches]
    graphs = recorded(model, mode)
    for batch, stock in zip(batches, expected, strict=True):  # no size comes twice
        assert_same_step(step(model, batch), stock)
    blocks = len(model.get_base_model().model.visual.blocks)
    assert graphs.replayed >= (len(GRIDS) - 2) * blocks
    kinds = len({len(stage.kwargs["cu_seqlens"]) for stage in stages_of(graphs, "VisionBlock")})
    assert len(stages_of(graphs, "VisionBlock")) == kinds <= 2  # whole images and windows; the first block as the rest


def test_a_layer_that_meets_many_sizes_is_recorded_at_first_sight(tiny):
    model = adapted_model(tiny("qwen2_vl"))
    fuse_model(model)
    blocks = len(model.get_base_model().model.visual.blocks)
    graphs = recorded(model)
    sizes = [[(4, 4), (6, 8)], [(8, 4), (4, 6)], [(8, 8), (6, 4)], [(10, 6), (4, 6)], [(12, 10), (6, 4)]]
    batches = [sized_batch(model, grids, seed) for seed, grids in enumerate(sizes)]
    for batch in batches[:4]:  # two longer recordings, each at second sight
        step(model, batch)
    before = graphs.replayed
    found = step(model, batches[4])  # 144 patches: a third one
    assert graphs.replayed >= before + blocks
    other = adapted_model(tiny("qwen2_vl"))
    fuse_model(other)
    assert_same_step(found, step(other, batches[4]))


def test_images_of_one_size_get_a_recording_of_their_own(tiny):
    model = adapted_model(tiny("qwen2_vl"))
    fuse_model(model)
    batch = sized_batch(model, GRIDS[0])
    expected = step(model, batch)
    graphs = recorded(model)
    for _ in range(3):
        assert_same_step(step(model, batch), expected)
    assert {stage.tokens for stage in stages_of(graphs, "VisionBlock")} == {64}  # 16 + 48 patches
    assert {len(stage.kwargs["cu_seqlens"]) for stage in stages_of(graphs, "VisionBlock")} == {3}


def test_a_size_that_comes_to_be_most_of_its_kind_gets_a_recording_of_its_own(tiny):
    model = adapted_model(tiny("qwen2_vl"))
    fuse_model(model)
    graphs = recorded(model)
    for seed, grids in enumerate(GRIDS[1:3]):
        step(model, sized_batch(model, grids, seed))
    usual = sized_batch(model, GRIDS[3])
    expected = step(model, usual)
    assert {stage.tokens for stage in stages_of(graphs, "VisionBlock")} == {64}
    for _ in range(12):
        assert_same_step(step(model, usual), expected)
    assert {stage.tokens for stage in stages_of(graphs, "VisionBlock")} == {52, 64}  # 36 + 16 patches


def test_the_count_of_shapes_stays_small(tiny, monkeypatch):
    """Sizes that never repeat run in longer recordings for as long as training lasts; each is counted."""
    monkeypatch.setattr("fvlm_core.graphs.sightings._MOST_SEEN", 4)
    model = adapted_model(tiny("qwen2_vl"))
    fuse_model(model)
    graphs = recorded(model)
    sizes = [[(4, 4), (6, 8)], [(8, 4), (4, 6)], *([(2, 2 * wide), (6, 6)] for wide in range(1, 8))]
    for seed, grids in enumerate(sizes):
        step(model, sized_batch(model, grids, seed))
    assert graphs.replayed > 0
    assert max(len(seen) for seen in graphs._sightings._seen.values()) <= 4 + 2


def test_text_of_new_lengths_shares_a_recording(tiny):
    model = adapted_model(tiny("qwen2_vl"))
    fuse_model(model)
    batches = [without_mask(make_batch(model.config, (length, length), length)) for length in (1030, 1100, 1050, 1120)]
    expected = [step(model, batch) for batch in batches]
    graphs = recorded(model)
    for batch, stock in zip(batches, expected, strict=True):
        assert_same_step(step(model, batch), stock)
    assert {stage.tokens for stage in stages_of(graphs, "Decoder")} == {1152}


def test_packed_rows_of_new_lengths_share_a_recording(tiny):
    model = adapted_model(tiny("qwen2_vl"))
    fuse_model(model)
    layers = model.get_base_model().model.language_model.layers
    width = layers[0].input_layernorm.weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    rotary = model.get_base_model().model.language_model.rotary_emb

    def passed(lengths):
        total = sum(lengths)
        hidden = torch.randn(1, total, width, generator=generator)
        positions = torch.cat([torch.arange(length) for length in lengths]).expand(3, 1, -1)
        segments = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        packed = {
            "packed_starts": segments,
            "packed_longest": max(lengths),
            "attention_mask": torch.full((1,) * 4, torch.nan),
        }
        hidden = hidden.requires_grad_()
        out = hidden
        for layer in layers:
            out = layer(out, position_embeddings=rotary(hidden, positions), **packed)
        (grad,) = torch.autograd.grad(out.square().sum(), hidden)
        return out.detach(), grad

    rows = [(20, 30, 14), (40, 9), (30, 30), (33, 20, 5)]
    generator.manual_seed(0)
    expected = [passed(lengths) for lengths in rows]
    graphs = recorded(model)
    generator.manual_seed(0)
    for lengths, wanted in zip(rows, expected, strict=True):
        for found, stock in zip(passed(lengths), wanted, strict=True):
            torch.testing.assert_close(found, stock, rtol=1e-4, atol=1e-5)
    assert {stage.tokens for stage in stages_of(graphs, "Decoder")} == {64}
    assert graphs.replayed >= (len(rows) - 2) * len(layers)


def test_pixtral_images_of_new_sizes_share_a_recording(tiny):
    model = adapted_model(tiny("pixtral"), targets=TRAINED)
    fuse_model(model)
    processor = AutoProcessor.from_pretrained(tiny("pixtral"))
    batches = []
    for seed, size in enumerate([(64, 64), (90, 40), (30, 75), (70, 50), (80, 60)]):
        content = [{"type": "image"}, {"type": "text", "text": "what is the total of the receipt"}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        batch = dict(processor(text=[text], images=[[picture(size, seed)]], return_tensors="pt"))
        batches.append(without_mask(batch) | {"labels": batch["input_ids"].clone()})
    expected = [step(model, batch) for batch in batches]
    graphs = recorded(model)
    for batch, stock in zip(batches, expected, strict=True):
        assert_same_step(step(model, batch), stock)
    assert 0 < len(stages_of(graphs, "PixtralAttentionLayer")) <= 2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_text_under_a_mask_of_new_lengths_shares_a_recording(tiny, attention):
    """Image tokens of Gemma 3 see each other; what a longer batch left in the recording's mask is seen by nobody."""
    model = adapted_model(tiny("gemma3"), targets=TRAINED)
    task_model(model).set_attn_implementation(attention)
    fuse_model(model)
    batches = []
    for number, length in enumerate((64, 64, 50, 61, 40, 64)):
        batch = family_batch(tiny("gemma3"), model, (1,), number)
        tokens = batch["input_ids"].shape[1]
        more = torch.randint(300, 500, (1, length - tokens), generator=torch.Generator().manual_seed(number))
        long = {name: torch.cat([batch[name], more], 1) for name in ("input_ids", "labels")}
        long["token_type_ids"] = torch.nn.functional.pad(batch["token_type_ids"], (0, length - tokens))
        batches.append({"pixel_values": batch["pixel_values"], **long})
    expected = [step(model, batch) for batch in batches]
    graphs = recorded(model)
    for batch, stock in zip(batches, expected, strict=True):
        assert_same_step(step(model, batch), stock)
    assert [stage.tokens for stage in stages_of(graphs, "Gemma3DecoderLayer")] == [64]
    layers = task_model(model).model.language_model.layers
    assert graphs.replayed >= 5 * len(layers)


def test_segments_behind_the_patches_are_no_longer_than_the_longest():
    segments = torch.tensor([0, 16, 64, 100], dtype=torch.int32)
    fits = Fits()
    padded = fits._with_rest(segments, 100, 128, 20)
    assert padded[:4].tolist() == segments.tolist()
    assert padded[-1] == 128
    assert padded.dtype == torch.int32
    assert padded.diff()[3:].max() <= 20
    assert padded.diff().min() >= 0
    assert len(padded) == 9
    assert fits._with_rest(segments, 100, 128, 20) is padded


def test_padded_segments_never_look_like_segments_of_one_length(tiny):
    """Eight segments of 16 in a row of 128 would be taken for one batch of eight."""
    model = adapted_model(tiny("qwen2_vl"))
    fuse_model(model)
    block = model.get_base_model().model.visual.blocks[0]
    kwargs = {"cu_seqlens": torch.tensor([0, 60, 100, 110], dtype=torch.int32), "max_seqlen": 16}
    *_, fit = Fits().of(block, torch.zeros(110, 64), kwargs, torch.float32)
    assert fit.tokens == 128
    assert (fit.kwargs["cu_seqlens"].numel() - 1) * fit.kwargs["max_seqlen"] != fit.tokens


def test_segments_padded_for_one_longest_are_not_handed_out_for_another():
    segments = torch.tensor([0, 16, 64, 100], dtype=torch.int32)
    fits = Fits()
    fits._with_rest(segments, 100, 512, 64)
    assert fits._with_rest(segments, 100, 512, 20).diff()[3:].max() <= 20


@pytest.mark.gpu
@pytest.mark.parametrize("family", QWEN)
def test_images_of_new_sizes_share_a_recording_on_a_gpu(tiny, family):
    model = adapted_model(tiny(family), Precision.NF4, dtype=torch.bfloat16, device="cuda")
    fuse_model(model)
    batches = [
        {name: value.to("cuda") if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        for batch in (sized_batch(model, grids, seed) for seed, grids in enumerate(GRIDS))
    ]
    with torch.autocast("cuda", torch.bfloat16):
        expected = [step(model, batch) for batch in batches]
        graphs = recorded(model, "offload")
        for batch, stock in zip(batches, expected, strict=True):
            assert_same_step(step(model, batch), stock, tolerance=3e-2)
    assert graphs.replayed >= (len(GRIDS) - 2) * len(model.get_base_model().model.visual.blocks)
