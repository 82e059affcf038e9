"""What is over `max_seq_length` is counted across dataloader workers and told once an epoch."""

from __future__ import annotations

import logging
import pickle

import pytest
from torch.utils.data import DataLoader

from fvlm_vision import FastVisionTrainer
from fvlm_vision.collator import FastVisionDataCollator
from fvlm_vision.overflow import OverflowCounts
from fvlm_vision.rows import NumberedRows


@pytest.fixture
def mixed(ask):
    """Sixteen rows: 3 and 12 have more images than fit, 5 a longer answer."""
    rows = [ask(images=0, seed=n, answer="x") for n in range(16)]
    rows[3] = rows[12] = ask(images=9)
    rows[5] = ask(images=0, answer="word " * 40)
    return rows


@pytest.mark.parametrize(("start", "workers", "epochs"), [("fork", 2, 2), ("spawn", 1, 1)])
def test_workers_count_together(start, workers, epochs, mixed, shared_model_of, processor_of):
    collator = FastVisionDataCollator(shared_model_of("qwen2_vl"), processor_of("qwen2_vl"), max_seq_length=40)
    loader = DataLoader(
        NumberedRows(mixed), batch_size=4, num_workers=workers, collate_fn=collator, multiprocessing_context=start
    )
    for epoch in range(1, epochs + 1):
        assert sum(len(batch["input_ids"]) for batch in loader) == 14
        assert (collator.overflow_counts.truncated, collator.overflow_counts.skipped) == (epoch, 2 * epoch)
        counts, first = collator.overflow_counts.take()
        assert counts.tolist() == [1, 2]
        assert first == [[5], [3, 12]]


def test_the_first_rows_are_kept_and_a_copy_counts_alone():
    counts = OverflowCounts()
    for row in range(8):
        counts.note(True, row, 0, 9, log=False)
    counts.note(False, None, 2, 9, log=False)
    copied = pickle.loads(pickle.dumps(counts))
    copied.note(True, 99, 0, 9, log=False)
    assert counts.take()[1] == [[-3], [0, 1, 2, 3, 4]]
    assert (counts.truncated, counts.skipped) == (1, 8)
    assert counts.take()[0].tolist() == [0, 0]
    assert copied.skipped == 9


@pytest.mark.parametrize("workers", [0, 2])
def test_the_trainer_tells_once_an_epoch(workers, mixed, lora, processor, arguments, trained, caplog):
    trainer = FastVisionTrainer(
        model=lora(),
        args=arguments(max_steps=-1, num_train_epochs=2, dataloader_num_workers=workers),
        data_collator=FastVisionDataCollator(lora(), processor, max_seq_length=40),
        train_dataset=mixed,
        processing_class=processor,
    )
    with caplog.at_level(logging.WARNING, logger="fvlm_vision"):
        trained(trainer)
    told = [record.message for record in caplog.records if "max_seq_length" in record.message]
    lines = [
        "This epoch 1 sample was cut to max_seq_length=40 tokens; first: row 5.",
        "This epoch 2 samples were left out for being over max_seq_length=40 tokens; first: row 3, row 12.",
    ]
    assert told == lines * 2
