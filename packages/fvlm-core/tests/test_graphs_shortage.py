"""Memory runs out, or a layer does what cannot be recorded, while layers are being recorded: the values stay."""

import gc
import weakref

import pytest
import torch
from fused_tools import assert_same_step, kept, make_batch, recorded, step, without_mask

from fvlm_core.graphs.stage import Arena, Stage
from fvlm_core.graphs.tape import CudaRecorder, PlainRecorder, _Again


@pytest.fixture
def batch(model):
    return without_mask(make_batch(model.config))


class Failing:
    """Stands in for `PlainRecorder.record`, and raises in the calls of some numbers, counted from 1."""

    def __init__(self, monkeypatch, error, *calls):
        self.error, self.failing, self.calls = error, calls, 0
        monkeypatch.setattr(PlainRecorder, "record", lambda recorder, work: self(recorder, work))

    def __call__(self, recorder, work):
        self.calls += 1
        if self.calls in self.failing:
            raise self.error("said by the test")
        return _Again(work)


@pytest.mark.parametrize("call", range(1, 9))
def test_a_shape_that_memory_does_not_suffice_to_record_runs_as_it_is(model, batch, monkeypatch, caplog, call):
    """Two vision blocks and two text layers have two recordings each; what was recorded before is freed."""
    expected = step(model, batch)
    failing = Failing(monkeypatch, torch.OutOfMemoryError, call)
    graphs = recorded(model)
    for _ in range(4):
        assert_same_step(step(model, batch), expected)
    assert not graphs._off
    assert [r.message for r in caplog.records if "No memory to record" in r.message and "shape" in r.message]
    assert kept(graphs) == (0, 2)  # the other kind of layers
    assert failing.calls <= call + 2 * 4  # it was not tried again
    assert graphs.replayed > 0


def test_larger_shapes_are_not_tried_either_and_smaller_ones_are(model, batch, monkeypatch):
    long, longer, short = (
        without_mask(make_batch(model.config, (length, length), length)) for length in (200, 300, 100)
    )
    expected = [step(model, one) for one in (long, longer, short)]
    failing = Failing(monkeypatch, torch.OutOfMemoryError, 5)
    graphs = recorded(model)
    for _ in range(3):
        for one, wanted in zip((long, longer, short), expected, strict=True):
            assert_same_step(step(model, one), wanted)
    assert failing.calls > 5
    decoders = {kind.stage.tokens for key, kind in graphs._stages.items() if "Decoder" in key[0].__name__}
    assert decoders == {128}
    rooms = {role: room.numel() for (role, *_), room in graphs._arena._largest.items()}
    assert rooms["x"] == max(kind.stage.x.numel() for kind in graphs._stages.values())


def test_memory_that_does_not_suffice_without_recording_either_is_the_callers_to_know(model, batch, monkeypatch):
    language = model.base_model.model.model.language_model.layers
    graphs = recorded(model)
    step(model, batch)

    def short(*args, **kwargs):
        raise torch.OutOfMemoryError("as it is")

    monkeypatch.setitem(vars(language[0].mlp), "forward", short)
    with pytest.raises(torch.OutOfMemoryError, match="as it is"):
        step(model, batch)
    assert len(graphs._too_large) == 1
    assert not graphs._off


@pytest.mark.parametrize("call", [1, 2, 5, 8])
def test_a_layer_that_cannot_keep_after_all_is_recorded_without(model, batch, monkeypatch, caplog, call):
    caplog.set_level("INFO", logger="fvlm_core")
    expected = step(model, batch)
    Failing(monkeypatch, torch.OutOfMemoryError, call)
    graphs = recorded(model, "auto")
    for _ in range(3):
        assert_same_step(step(model, batch), expected)
    before = (call - 1) // 2  # layers that were recorded by then; none keeps anything from there on
    assert kept(graphs) == (before, 4)
    assert graphs._room.most == before << 20
    assert any(f"No room for more than {before % 2} kept layers" in r.message for r in caplog.records)


@pytest.mark.parametrize("mode", [True, "auto"])
@pytest.mark.parametrize("call", [1, 4, 5, 7, 8])
def test_what_cannot_be_recorded_leaves_no_memory_held(model, batch, monkeypatch, caplog, mode, call):
    """Layers that were replayed in the same step give up what they keep before their backward passes."""
    expected = step(model, batch)
    Failing(monkeypatch, RuntimeError, call)
    made, init = [], Stage.__init__
    monkeypatch.setattr(Stage, "__init__", lambda stage, *args: made.append(weakref.ref(stage)) or init(stage, *args))
    graphs = recorded(model, mode)
    for _ in range(3):
        assert_same_step(step(model, batch), expected)
    assert graphs._off
    assert not graphs.holds
    gc.collect()
    assert not [one for one in made if one() is not None]
    assert any("cannot be recorded as a CUDA graph (said by the test)" in r.message for r in caplog.records)


def test_arguments_that_were_copied_in_part_are_not_taken_for_those_before_them():
    hidden, kwargs = torch.zeros(1, 4, 8), {"position_ids": torch.zeros(1, 4), "other": torch.zeros(3)}
    stage = Stage(hidden, kwargs, 4, needs_dx=False, arena=Arena())
    given = torch.ones(1, 4), torch.ones(3)
    stage.load_arguments(given)
    with pytest.raises(RuntimeError):
        stage.load_arguments((torch.full((1, 4), 2.0), torch.full((5,), 2.0)))
    stage.load_arguments(given)
    assert torch.equal(stage.kwargs["position_ids"], given[0])


@pytest.mark.gpu
def test_an_error_in_a_recording_is_the_one_that_is_raised():
    recorder, room = CudaRecorder(torch.device("cuda")), torch.zeros(4, device="cuda")

    def short():
        room.add_(1)
        raise torch.OutOfMemoryError("in the middle")

    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError, match="in the middle"):
            recorder.record(short)
    tape = recorder.record(lambda: room.add_(1))
    tape.replay()
    assert room.tolist() == [1.0] * 4  # and nothing of what was given up
