"""``use_gradient_checkpointing="auto"`` where a batch comes that is larger than what layers keep leaves memory for."""

from __future__ import annotations

import gc

import pytest
import torch
from parity_tools import trainable
from trl import SFTConfig

from fvlm_core.checkpointing import graphs_of, use_graphs
from fvlm_core.graphs import LayerGraphs
from fvlm_core.graphs.room import Room
from fvlm_core.testing import tiny_checkpoint
from fvlm_vision import FastVisionModel, FastVisionTrainer

CASES = pytest.mark.parametrize(("repeat", "early"), [(True, True), (True, False), (False, True)])
"""Whether our trainer trains, or a loop of one's own; whether layers see it coming, or memory does run out."""


def text(lengths):
    """Batches of one row of tokens each, of whatever lengths."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(300, 500, (1, length), generator=generator) for length in lengths]


def adapted(folder, mode, device, **loading):
    """A model of fused layers, which are recorded also where there is no GPU, with an adapter; and its processor."""
    if device == "cpu":
        loading |= {"device_map": "cpu", "fused_layers": True}
    model, processor = FastVisionModel.from_pretrained(
        folder, load_in_16bit=True, use_gradient_checkpointing=mode, **loading
    )
    if device == "cpu":
        use_graphs(model, LayerGraphs(rehearse=True))
    return FastVisionModel.get_peft_model(model, r=4, lora_alpha=8, use_gradient_checkpointing=mode), processor


def own_loop(model, lengths, device):
    """Train on text; return the losses."""
    losses = []
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-3)
    model.train()
    for ids in text(lengths):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(input_ids=ids.to(device), labels=ids.to(device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trained(model, processor, out, lengths, device):
    """Train on text with our trainer; return the losses."""
    args = SFTConfig(
        output_dir=str(out),
        per_device_train_batch_size=1,
        max_steps=len(lengths),
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        optim="adamw_torch",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=device == "cuda",
        use_cpu=device == "cpu",
    )
    trainer = FastVisionTrainer(
        model=model,
        processing_class=processor,
        data_collator=lambda rows: {"input_ids": rows[0]["ids"], "labels": rows[0]["ids"]},
        train_dataset=[{"ids": ids} for ids in text(lengths)],
        args=args,
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def text_run(folder, out, lengths, mode, repeat, device, prepare=lambda model: None, **loading):
    """Train on text; return the losses and the layers' recordings."""
    model, processor = adapted(folder, mode, device, **loading)
    prepare(model)
    losses = trained(model, processor, out, lengths, device) if repeat else own_loop(model, lengths, device)
    return losses, graphs_of(model)


def lengths_of(unit, repeat):
    """Small batches of eight lengths, whose layers would keep much more in all than the large one needs to run.

    The large one comes again where our trainer trains. It is recorded then, and may keep so much that memory runs out
    in the loss, which is the caller's own to deal with elsewhere.
    """
    small = [length for length in range(8 * unit, 16 * unit, unit) for _ in range(3)]
    return [*small, 32 * unit, *small[:3], *([32 * unit] if repeat else [])]


@CASES
def test_a_larger_batch_comes_than_there_is_room_for(tmp_path, caplog, monkeypatch, repeat, early):
    """Where each layer counts for one MiB; memory runs out behind the layers while they keep anything."""
    monkeypatch.setattr("fvlm_core.graphs.room._FIRST_GUESS", 1 << 20)
    monkeypatch.setattr(Room, "free", lambda room, _: ((5 << 20) - room.kept_bytes) if early else float("inf"))
    lengths = lengths_of(16, repeat)
    holding = []

    def short(model):
        def run_out(_, args):
            if args[0].shape[1] == max(lengths):
                holding.append(graphs_of(model).holds)
                if holding[-1] and not early:
                    raise torch.OutOfMemoryError("CUDA out of memory.")

        model.get_base_model().model.language_model.norm.register_forward_pre_hook(run_out)

    folder = tiny_checkpoint("qwen2_vl", tmp_path / "tiny", dtype=torch.float32)
    expected, _ = text_run(folder, tmp_path, lengths, "offload", repeat, "cpu")
    losses, graphs = text_run(folder, tmp_path, lengths, "auto", repeat, "cpu", prepare=short)
    assert 1 <= len([r for r in caplog.records if "give it back" in r.message]) <= 4
    assert holding[0] != early
    assert graphs.replayed > graphs.recorded > 0
    assert losses == pytest.approx(expected, rel=1e-6)


@pytest.mark.gpu
@CASES
def test_a_larger_batch_comes_under_a_real_limit(tmp_path, caplog, monkeypatch, repeat, early):
    """The limit is what "offload" needs: without giving back the large batches could not run."""
    monkeypatch.setattr("fvlm_core.graphs.room._FIRST_GUESS", 1 << 24)  # the limit is far below what it is meant for
    if not early:
        monkeypatch.setattr(Room, "allows", lambda *_: True)
    folder = tiny_checkpoint("qwen2_vl", tmp_path / "tiny", dtype=torch.bfloat16)
    lengths = lengths_of(2048, repeat)
    text_run(folder, tmp_path, [1024] * 3, "offload", repeat, "cuda")  # what a first run leaves allocated for good
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    expected, _ = text_run(folder, tmp_path, lengths, "offload", repeat, "cuda")
    needed = torch.cuda.max_memory_reserved()
    gc.collect()
    torch.cuda.empty_cache()
    limit = needed + (64 << 20)
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    torch.cuda.reset_peak_memory_stats()
    try:
        losses, graphs = text_run(folder, tmp_path, lengths, "auto", repeat, "cuda", memory_budget=limit / 2**30)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    said = [r.message for r in caplog.records if "give it back" in r.message]
    print(
        f"needed {needed >> 20} MiB, limit {limit >> 20}, peak {torch.cuda.max_memory_reserved() >> 20}:",
        *said,
        sep="\n",
    )
    assert 1 <= len(said) <= 4
    assert torch.cuda.max_memory_reserved() <= limit
    assert graphs.replayed > graphs.recorded > 0
    assert losses == pytest.approx(expected, rel=2e-3)
