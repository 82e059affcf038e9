"""What `fvlm estimate` counts, worked out by hand for tiny models."""

from __future__ import annotations

from pathlib import Path

from estimate_tools import config_of, opened_of, rows_of

from fvlm_cli.data.row import Row
from fvlm_cli.estimate.activations import Batch, Mode, activations, recorded_sizes, saved
from fvlm_cli.estimate.memory import Way, memory
from fvlm_cli.estimate.plan import loads_of, shapes_of
from fvlm_cli.estimate.workload import Load
from fvlm_cli.quickstart.folders import shipped_checkpoint
from fvlm_core.testing import tiny_checkpoint


def test_a_block_by_hand(tmp_path: Path) -> None:
    config = config_of(tmp_path, shipped_checkpoint(), "lora.r=8")
    shapes, _ = shapes_of(config, opened_of(config))
    vision, language = shapes.blocks["vision"][0], shapes.blocks["language"][0]
    # hidden 192, three heads of 64 for queries, keys and values alike, a gated MLP of 512, seven adapters
    assert saved(language, 8, fused=True) == 4 * 192 + 4 * 192 + 2 * 512 + 7 * 8
    assert saved(language, 8, fused=False) == 4 * 192 + 4 * 192 + 4 * 512 + 7 * 8
    # hidden 128, one product for the three, rotated copies of two, a plain MLP of 512, four adapters
    assert saved(vision, 8, fused=True) == 4 * 128 + 4 * 128 + 2 * 128 + 512 + 4 * 8
    assert len(shapes.blocks["vision"]) == len(shapes.blocks["language"]) == 4


def test_recordings_are_counted_as_they_are_made() -> None:
    assert recorded_sizes([500], 64) == [512], "in the second round it comes again"
    assert recorded_sizes([1030, 1030, 1030, 1030], 64) == [1088], "one length has a recording of just its size"
    assert recorded_sizes([1030, 1100, 1150, 1040], 64) == [1152], "different ones share the next of eight an octave"
    assert recorded_sizes([1030, 1100, *[1040] * 9], 64) == [1088, 1152], "and the one that most are of gets its own"
    assert recorded_sizes([0, 0], 64) == []
    assert recorded_sizes([5000, 5001], 1) == [5120]


def test_what_a_backward_pass_holds_by_hand(tmp_path: Path) -> None:
    config = config_of(tmp_path, shipped_checkpoint(), "lora.r=8", "model.gradient_checkpointing=offload")
    shapes, _ = shapes_of(config, opened_of(config))
    for patches, kept in ((1024, 0), (4096, 1)):  # a patch of the larger image sees enough to keep what attention gave
        row = Load(500, 100, patches, patches**2, 400_000, 260, 1)
        found = activations(shapes, Batch.of([row]), "offload", fused=True, rank=8, itemsize=2)
        # saved, as above; dg, du, the gradients of the output and the MLP's input; three hidden states on their way
        saves, back = 4 * 192 + 4 * 192 + 2 * 512 + 7 * 8, 2 * 512 + 2 * 192
        assert found.working["language"] == 2 * 512 * (saves + back + 3 * 192) + found.between
        # in a plain MLP the activation's gradient becomes that of the pre-activation
        saves, back = 4 * 128 + 4 * 128 + 2 * 128 + 512 + 4 * 8, 512 + 2 * 128
        assert found.working["vision"] == 2 * patches * (saves + back + 3 * (1 + kept) * 128)
        assert found.stages == max(2 * 512 * 4 * 192, 2 * patches * (4 + kept) * 128)
        assert found.host == 4 * 2 * (512 * 192 + patches * (1 + kept) * 128)


def test_tiles_see_each_other_and_their_states_lie_side_by_side(tmp_path: Path) -> None:
    """Llama 3.2 Vision: four tiles of four patches, three states of 64 numbers, fp32 from layer to layer."""
    model = tiny_checkpoint("mllama", tmp_path / "mllama")
    config = config_of(tmp_path, model, "lora.r=8", "model.gradient_checkpointing=offload")
    opened = opened_of(config)
    rows = [Row(sample, "row") for sample in rows_of(2, 64, 6)]
    loads = loads_of(config, opened, rows)
    assert [(load.patches, load.spans) for load in loads] == [(16, 16**2)] * 2
    shapes, _ = shapes_of(config, opened)
    found = activations(shapes, Batch.of(loads), "offload", fused=True, rank=8, itemsize=2)
    assert shapes.joined == 3
    assert found.joined == 32 * 64 * ((3 + 2) * 4 + 2 * 3 * 2)
    language = 2 * 128 * 2 * max(load.tokens for load in loads)
    assert found.stages >= 4 * (32 * 64 * 4 + language), "fp32 and bf16 lie apart"
    assert activations(shapes, Batch.of(loads), "offload", fused=False, rank=8, itemsize=2).joined == 0


def test_a_flat_gradient_is_there_for_the_step_or_for_a_batch_that_is_done_again(tmp_path: Path) -> None:
    config = config_of(tmp_path, shipped_checkpoint(), "lora.r=8")
    opened = opened_of(config)
    shapes, _ = shapes_of(config, opened)
    batch = Batch.of(loads_of(config, opened, [Row(sample, "row") for sample in rows_of(1, 64, 6)]))
    once = 4.0 * shapes.trained

    def held(mode: Mode, accumulation: int, optim: str = "adamw_torch") -> tuple[float, float]:
        found = memory(shapes, batch, Way("16bit", mode, optim, True, accumulation))
        return found.gradients, found.gathered

    assert held("offload", 4) == held("auto", 1) == (once, once)
    assert held("auto", 4) == (2 * once, 0)
    assert held("auto", 4, "adafactor") == (once, 0)
