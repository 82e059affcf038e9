"""``use_gradient_checkpointing="auto"`` where memory runs out in a layer: what is kept is given back, and nothing else
changes. Errors come from a counter here, and from a real limit in ``tests/test_replanning.py``.
"""

import pytest
import torch
from fused_tools import assert_equal_step, kept, make_batch, recorded, step, without_mask

from fvlm_core.graphs import layer as recorded_layer
from fvlm_core.graphs.room import Room


class Shortage:
    """Stands in for a function, and raises in its n-th call from when it is armed on, before or after the work."""

    def __init__(self, function, after=False):
        self.function, self.after, self.left, self.raised = function, after, 0, 0

    def arm(self, call):
        self.left, self.raised = call, 0

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0 and not self.after:
            self._fail()
        result = self.function(*args, **kwargs)
        if self.left == 0:
            self._fail()
        return result

    def _fail(self):
        self.raised += 1
        raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("call", [1, 3, 4, 5, 6, 8])
def test_a_replay_that_fails_is_computed_without_what_was_kept(model, monkeypatch, caplog, call, after):
    """There are four layers: calls 1 to 4 are forward passes, the others backward passes."""
    shortage = Shortage(recorded_layer._replay, after)
    monkeypatch.setattr(recorded_layer, "_replay", shortage)
    batch, other = (without_mask(make_batch(model.config, seed=seed)) for seed in (0, 1))
    graphs = recorded(model, "auto")
    for _ in range(3):
        expected = step(model, batch)
    following = step(model, other)
    assert kept(graphs) == (4, 4)
    shortage.arm(call)
    assert_equal_step(step(model, batch), expected)
    assert shortage.raised == 1
    assert len([r for r in caplog.records if "give it back" in r.message]) == 1
    for _ in range(2):
        assert_equal_step(step(model, other), following)
    assert kept(graphs) == (2, 4)  # half of what it was


def test_two_passes_are_due_when_memory_runs_out(model, monkeypatch):
    """Micro-batches whose backward passes come together: the older one has nothing kept, the newer one loses it."""
    shortage = Shortage(recorded_layer._replay)
    monkeypatch.setattr(recorded_layer, "_replay", shortage)
    batches = [without_mask(make_batch(model.config, seed=seed)) for seed in (0, 1)]
    recorded(model, "auto")
    results = []
    for turn in range(4):
        model.zero_grad()
        losses = [model(**batch).loss for batch in batches]
        if turn == 3:
            shortage.arm(2)
        sum(losses).backward()
        results.append(
            (sum(losses).detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
        )
    assert shortage.raised == 1
    assert_equal_step(results[3], results[2])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("call", [1, 2])
def test_a_layer_that_is_not_recorded_runs_again_with_the_same_dropout(model, monkeypatch, call, dropout):
    language = model.base_model.model.model.language_model.layers
    for name, module in language.named_modules():
        if name.endswith("lora_dropout"):
            module["default"] = torch.nn.Dropout(dropout)
    language[0].mlp.register_forward_hook(lambda *_: None)  # no recording would do what a hook does
    shortage = Shortage(language[0].mlp.forward, after=call == 1)
    vars(language[0].mlp)["forward"] = shortage
    graphs = recorded(model, "auto")
    graphs.unrecorded._room.most = 0  # else it would keep what it computes
    batch = without_mask(make_batch(model.config))

    def seeded():
        torch.manual_seed(7)
        return step(model, batch)

    for _ in range(3):
        expected = seeded()
    held = kept(graphs)[0]
    assert held == (3 if dropout == 0 else 2)
    torch.manual_seed(8)
    if dropout:
        assert not torch.equal(step(model, batch)[0], expected[0])
    if call == 1:
        shortage.arm(1)
        assert_equal_step(seeded(), expected)
        assert shortage.raised == 1
        assert kept(graphs)[0] <= held // 2
    else:
        shortage.arm(2)  # when it is computed again for its backward pass: autograd cannot go back
        with pytest.raises(torch.OutOfMemoryError):
            seeded()


@pytest.mark.parametrize("free", [0, 1 << 40])
def test_a_larger_batch_gets_its_room_before_it_runs(model, monkeypatch, caplog, free):
    """By what layers of its kind keep, here a MiB each for 64 tokens; nothing has to fail for it."""
    monkeypatch.setattr(Room, "free", lambda self, device: free)
    small, large = (without_mask(make_batch(model.config, lengths)) for lengths in ((24, 20), (300, 280)))
    expected = step(model, large)
    graphs = recorded(model, "auto")
    for _ in range(3):
        step(model, small)
    assert kept(graphs) == (4, 4)
    assert_equal_step(step(model, large), expected)
    assert graphs.holds == (free > 0)
    assert len([r for r in caplog.records if "give it back" in r.message]) == (free == 0)


def test_with_nothing_to_give_back_the_error_stands(model, monkeypatch):
    shortage = Shortage(recorded_layer._replay)
    monkeypatch.setattr(recorded_layer, "_replay", shortage)
    graphs = recorded(model, True)
    batch = without_mask(make_batch(model.config))
    for _ in range(2):
        step(model, batch)
    shortage.arm(5)  # the first of the backward passes
    with pytest.raises(torch.OutOfMemoryError):
        step(model, batch)
    assert not graphs.holds
    assert not graphs.give_back()


def test_the_log_says_why_nothing_is_kept(model, monkeypatch, caplog):
    caplog.set_level("INFO", logger="fvlm_core.graphs")
    graphs = recorded(model, "auto", memory_budget=0.0001)
    batch = without_mask(make_batch(model.config))
    for _ in range(2):
        step(model, batch)
    assert kept(graphs) == (0, 4)
    assert not graphs.holds
    said = [r.message for r in caplog.records if r.message.startswith("No room")]
    assert len(said) == 2  # one for each tower
    assert all(
        "more than 0 kept layers" in one and "(memory_budget=0.0001, 0.00 GiB are allocated)" in one for one in said
    )


def test_a_budget_that_is_used_up_with_nothing_kept_is_said_once(model, monkeypatch, caplog):
    monkeypatch.setattr(Room, "allocated", lambda self, device: 3 << 29)
    graphs = recorded(model, "auto", memory_budget=1.25)
    for lengths in ((24, 20), (100, 90)):
        for _ in range(2):
            step(model, without_mask(make_batch(model.config, lengths)))
    assert kept(graphs) == (0, 6)
    (said,) = [r.message for r in caplog.records if "memory_budget" in r.message]
    assert said.startswith("memory_budget=1.25 is exceeded while no layer keeps anything (1.50 GiB are allocated)")


def test_plans_are_lowered_a_few_times_and_then_nothing_is_kept():
    room, seen = Room(), []
    while room.most:
        room.kept_bytes = int(min(room.most, 1 << 30))
        room.lower()
        seen.append(room.most)
    assert seen == [1 << 29, 1 << 28, 1 << 27, 0]
    assert not room.has_for(1, torch.device("cpu"))
