"""`fvlm estimate`: each part of the estimate against the real thing, as far as a CPU can tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from estimate_tools import config_of, opened_of, rows_of

from fvlm_cli.data.row import Row
from fvlm_cli.estimate.activations import Batch, activations
from fvlm_cli.estimate.gpus import GPUS, find_gpu
from fvlm_cli.estimate.memory import GIB, Way, optimizer, weights
from fvlm_cli.estimate.plan import estimate, shapes_of
from fvlm_cli.estimate.workload import Load, loads_of_rows
from fvlm_cli.quickstart.folders import shipped_checkpoint
from fvlm_cli.training.build import load as load_for_training
from fvlm_core.errors import ConfigError

LARGEST = ("working", "logits", "gathered", "joined")
NOT_SUMMED = (*LARGEST, "host", "peak", "needed")
FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mllama", "pixtral", "gemma3"]


class Saved:
    """Counts the bytes that a model's blocks save for backward, shared storages once, parameters not at all."""

    def __init__(self, model: Any, facts: Any) -> None:
        self.inside = 0
        self.bytes: dict[int, int] = {}
        self._keep: list[torch.Tensor] = []
        self._parameters = {parameter.data_ptr() for parameter in model.parameters()}
        base = model.get_base_model()
        for lists in facts.layers.values():
            for path in lists:
                for block in base.get_submodule(path):
                    block.register_forward_pre_hook(lambda *_: self._enter(1))
                    block.register_forward_hook(lambda *_: self._enter(-1))

    def _enter(self, step: int) -> None:
        self.inside += step

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if self.inside and storage.data_ptr() not in self._parameters:
            self.bytes[storage.data_ptr()] = storage.nbytes()
            self._keep.append(tensor)  # so that no other tensor gets its place
        return tensor


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_those_that_a_real_forward_saves(tmp_path: Path, family: str) -> None:
    from fvlm_cli.training.collate import build_collator
    from fvlm_core.testing import tiny_checkpoint

    base = tiny_checkpoint(family, tmp_path / "base")
    config = config_of(tmp_path, base, "lora.r=4")
    model, processor = load_for_training(config)
    opened = opened_of(config)
    shapes, _ = shapes_of(config, opened)
    assert shapes.trained == model.num_parameters(only_trainable=True)
    assert shapes.total == model.get_base_model().num_parameters() - shapes.trained

    collator = build_collator(config.data, model, processor)
    samples = rows_of(2, side=112, words=40)

    (load, _) = loads_of_rows(collator, [Row(sample, "here") for sample in samples], model.config)
    batch = collator(samples)
    assert 2 * load.tokens == batch["input_ids"].numel()
    counter = Saved(model, opened.facts)
    with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda tensor: tensor):
        model(**batch, use_cache=False)
    assert batch["pixel_values"].numel() > 0
    found = activations(shapes, Batch.of([load, load]), "none", fused=False, rank=4, itemsize=4)
    expected = found.kept
    measured = sum(counter.bytes.values())
    # Gemma 3's attention also copies keys and values to every head and keeps its mask, which are not counted.
    assert expected == pytest.approx(measured, rel=0.2 if family == "gemma3" else 0.05)


@pytest.mark.parametrize("tuned", ["finetune_vision_layers=true", "finetune_vision_layers=false"])
def test_operations_are_those_of_a_real_step(tmp_path: Path, tuned: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from fvlm_cli.estimate.time import step
    from fvlm_cli.training.collate import build_collator

    # The counter knows eager attention, which does not leave the masked half out.
    words = ("lora.r=4", f"lora.{tuned}", "model.attn_implementation=eager")
    config = config_of(tmp_path, shipped_checkpoint(), *words)
    model, processor = load_for_training(config)
    shapes, held = shapes_of(config, opened_of(config))
    collator = build_collator(config.data, model, processor)
    samples = rows_of(2, side=224, words=30)
    loads = loads_of_rows(collator, [Row(sample, "here") for sample in samples], model.config)
    with FlopCounterMode(display=False) as counter:
        model(**collator(samples), use_cache=False).loss.backward()
    found = step(shapes, loads, find_gpu("t4"), Way(held, "none", "adamw_torch", fused=False))
    masked = 3 * 2.0 * sum(load.tokens**2 for load in loads) * 4 * 192
    assert found.operations + masked == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_parts_are_those_of_a_loaded_and_trained_model(tmp_path: Path) -> None:
    config = config_of(tmp_path, shipped_checkpoint(), "lora.r=8", "model.precision=4bit")
    shapes, held = shapes_of(config, opened_of(config))
    model, _ = load_for_training(config)
    assert held == "4bit"
    from bitsandbytes.nn import Params4bit

    quantized = [p for p in model.parameters() if isinstance(p, Params4bit)]
    stored = sum(p.numel() * p.element_size() for p in quantized)
    for parameter in quantized:
        state = parameter.quant_state
        scales = (state.absmax, state.state2.absmax)
        stored += sum(scale.numel() * scale.element_size() for scale in scales)
    rest = [p for p in model.parameters() if not isinstance(p, Params4bit) and not p.requires_grad]
    stored += sum(p.numel() * p.element_size() for p in rest)
    assert weights(shapes, "4bit", itemsize=4) == pytest.approx(stored, rel=0.01)

    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    adamw = torch.optim.AdamW(trained)
    adamw.step()
    states = [value for state in adamw.state.values() for value in state.values() if value.ndim]
    assert optimizer(shapes, "adamw_torch", 4) == sum(value.numel() * value.element_size() for value in states)


def test_more_of_anything_needs_more_and_frozen_towers_keep_nothing(tmp_path: Path) -> None:
    def found(*words: str, load: Load | None = None) -> Any:
        config = config_of(tmp_path, shipped_checkpoint(), *words)
        row = load or Load(400, 100, 1024, 1024**2, 400_000, 260, 1)
        return estimate(config, opened_of(config), [row])

    base = found()
    parts = base.memory
    assert found("model.precision=4bit").memory.weights < found("model.precision=8bit").memory.weights < parts.weights
    assert parts.kept > 0
    assert found("model.gradient_checkpointing=true").memory.kept < parts.kept / 4
    offload = found("model.gradient_checkpointing=offload").memory
    assert offload.kept == 0
    assert offload.host == found("model.gradient_checkpointing=true").memory.kept
    auto = found("model.gradient_checkpointing=auto")
    assert auto.memory.kept > parts.kept  # outputs are kept too, and lengths are rounded up
    assert auto.least(2).kept == 0
    h200, most = find_gpu("h200"), auto.memory.peak - auto.memory.kept / 2
    bounded = found("model.gradient_checkpointing=auto", f"model.memory_budget={most / GIB}").memory_on(h200)
    assert bounded.kept == pytest.approx(auto.memory.kept / 2, rel=1e-3)
    assert auto.memory_on(h200).kept == auto.memory.kept
    wide = found("lora.r=64").memory.optimizer
    assert found("train.optim=adamw_8bit", "lora.r=64").memory.optimizer < wide / 3
    assert found("train.optim=sgd").memory.optimizer == parts.optimizer / 2
    language = found("lora.finetune_vision_layers=false")
    assert language.shapes.trainable["vision"] == 0
    assert language.memory.kept < parts.kept
    last = found("lora.finetune_last_n_layers=1", "lora.finetune_vision_layers=false").memory
    assert last.kept == pytest.approx(language.memory.kept / 4)
    assert base.memory_of(4).kept == pytest.approx(2 * parts.kept)
    full = found("model.precision=full").memory
    assert full.adapters == 0
    assert full.gradients == base.shapes.total * 2

    t4 = find_gpu("t4")
    batch = base.largest_batch(t4)
    assert base.memory_of(batch).needed <= t4.memory * GIB < base.memory_of(batch + 1).needed
    factor = base.largest_images(t4)
    assert factor is not None
    larger = base.memory_of(2, load=base.longest.scaled(factor + 0.02))
    assert base.memory_of(2, load=base.longest.scaled(factor)).needed <= t4.memory * GIB < larger.needed
    crowd = found("train.per_device_train_batch_size=4000")
    assert crowd.step_on(find_gpu("h200")).seconds < crowd.step_on(t4).seconds / 10
    assert (crowd.step_on(t4).bound, base.step_on(t4).bound) == ("compute", "launches")
    assert base.step_on(t4).operations < found("model.gradient_checkpointing=true").step_on(t4).operations


def test_the_command_says_what_fits_and_exits_by_it(fvlm, handwriting_run: Path) -> None:
    done = fvlm("estimate", "config.yaml", "--gpu", "t4", "--json", cwd=handwriting_run)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    run = json.loads((handwriting_run / "run/run.json").read_text())
    assert found["parameters"]["total"] == 3_038_592
    assert found["rows_looked_at"] == run["rows"]
    assert found["longest_row"]["patches"] == 64
    parts = found["memory_gib"]
    summed = sum(value for name, value in parts.items() if name not in NOT_SUMMED)
    assert parts["peak"] == pytest.approx(summed + max(parts[name] for name in LARGEST), abs=0.006)
    assert found["gpu"]["fits"]
    assert found["gpu"]["largest_batch"] > 100
    assert found["gpu"]["step_seconds"] > 0
    assert set(found["fits"]) == set(GPUS)


def test_an_adapter_is_counted_as_it_was_saved(handwriting_run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    adapter = handwriting_run / "run/adapter"
    stored = sum(tensor.numel() for tensor in load_file(adapter / "adapter_model.safetensors").values())
    shapes, _ = shapes_of(config := config_of(tmp_path, adapter, "lora.r=4"), opened_of(config))
    assert (shapes.trained, shapes.rank, shapes.total) == (stored, 16, 3_038_592)


def test_what_does_not_fit_is_told_by_the_exit_code(handwriting_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from fvlm_cli.main import app

    monkeypatch.chdir(handwriting_run)
    huge = ("train.per_device_train_batch_size=4000", "--image", "256x256", "--answer", "2000", "--gpu", "t4")
    done = CliRunner().invoke(app, ["estimate", "config.yaml", *huge])
    assert done.exit_code == 4, done.stderr
    assert "it does not fit" in done.stdout
    assert "largest batch" in done.stdout
    for words, part in ((("--gpu", "h20"), "did you mean h200?"), (("--image", "12"), "such as 1120x896")):
        wrong = CliRunner().invoke(app, ["estimate", "config.yaml", *words])
        assert wrong.exit_code == 2
        assert part in wrong.stderr


def test_a_card_that_is_not_there() -> None:
    if torch.cuda.is_available():
        assert find_gpu("here").memory > 0
    else:
        with pytest.raises(ConfigError, match="no GPU here"):
            find_gpu("here")
