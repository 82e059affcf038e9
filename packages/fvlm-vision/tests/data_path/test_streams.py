"""Streams: rows know their number, epochs shuffle anew, and several processes end an epoch together."""

from __future__ import annotations

import datasets
import pytest
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from fvlm_core.errors import DataError
from fvlm_vision.rows import StreamedRows, training_rows
from fvlm_vision.trainer import FastVisionTrainer

SHARDS = (7, 3, 2)


def _numbers(places):
    for place in places:
        start = sum(SHARDS[:place])
        yield from ({"number": start + offset} for offset in range(SHARDS[place]))


@pytest.fixture
def stream():
    """Twelve rows in three shards of unequal length."""
    return datasets.IterableDataset.from_generator(_numbers, gen_kwargs={"places": list(range(len(SHARDS)))})


def batches(rows, process, processes, **options):
    loader = DataLoader(rows, batch_size=2, collate_fn=list, **options)
    prepared = prepare_data_loader(
        loader, num_processes=processes, process_index=process, dispatch_batches=False, put_on_device=False
    )
    return [[sample["number"] for sample in batch] for batch in prepared]


def test_processes_share_a_stream_evenly(stream):
    rows = training_rows(stream, "train_dataset")
    first, second = (batches(rows, process, 2) for process in range(2))
    assert first == [[0, 1], [4, 5], [8, 9]]
    assert second == [[2, 3], [6, 7], [10, 11]]
    # The stream itself is dealt out by shards, and one process is done before the other.
    assert [len(batches(stream, process, 2)) for process in range(2)] != [3, 3]


def test_workers_of_several_processes_read_every_row_once(stream):
    rows = training_rows(stream, "train_dataset")
    read = [batches(rows, process, 2, num_workers=2) for process in range(2)]
    assert len(read[0]) == len(read[1])
    assert {number for part in read for batch in part for number in batch} == set(range(12))


def test_rows_carry_their_number_where_it_is_known(stream):
    rows = training_rows(stream, "train_dataset")
    assert [sample.row for sample in rows] == list(range(12))
    loader = DataLoader(rows, batch_size=None, num_workers=2)
    assert not any(hasattr(sample, "row") for sample in loader)
    assert all(type(sample) is dict for sample in StreamedRows(stream, numbered=False))


def test_epochs_shuffle_anew(stream):
    rows = training_rows(stream.shuffle(seed=1, buffer_size=12), "train_dataset")
    orders = []
    for epoch in (0, 1, 0):
        rows.set_epoch(epoch)
        orders.append([sample["number"] for sample in rows])
    assert orders[0] != orders[1]
    assert orders[0] == orders[2]


def test_a_corrupt_row_of_a_stream_is_named(lora, processor, rows, arguments):
    rows[5]["messages"][0]["content"] = [{"type": "image", "image": b"broken"}]
    stream = datasets.IterableDataset.from_generator(lambda: iter(rows))
    trainer = FastVisionTrainer(model=lora(), tokenizer=processor, train_dataset=stream, args=arguments(max_steps=8))
    with pytest.raises(DataError, match="row 5: the image 6 bytes is corrupt"):
        trainer.train()
