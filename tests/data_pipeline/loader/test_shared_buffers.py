"""Shared buffers: never reused while a batch uses them, and reused afterwards."""

from __future__ import annotations

import gc
import os
from collections import deque
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.batch import MediaBlock, MultimodalBatch, Segments
from data_pipeline.errors import WorkerError
from data_pipeline.loader.shared_buffers import BatchMessage, BatchReceiver, BatchSender

COLUMNS = 48


def _batch(values: torch.Tensor, mark: int) -> MultimodalBatch:
    count = len(values)
    nothing = torch.empty(0, dtype=torch.int64)
    one = Segments.from_lengths([count])
    media = MediaBlock(
        values, torch.tensor([[1, 1, count]]), ((1, 1, count),), one, nothing, nothing, nothing, one, one
    )
    numbers = torch.full((7,), mark)
    return MultimodalBatch(
        numbers, numbers.clone(), numbers.float(), numbers.clone(), one, numbers > 0, media={"image": media}
    )


def _send(sender: BatchSender, rows: int, mark: int, pieces: int = 3) -> BatchMessage:
    arrays = [np.full((rows, COLUMNS), mark % 251, np.uint8) for _ in range(pieces)]
    return sender.encode((_batch(sender.join(arrays), mark),))


def _holds(batch: MultimodalBatch, mark: int) -> bool:
    values = batch.media["image"].values
    return bool((values == mark % 251).all()) and batch.token_ids.tolist() == [mark] * 7


def test_floats_of_another_modality_travel_beside_pixels() -> None:
    sender, receiver = BatchSender(), BatchReceiver()
    frames = [np.linspace(-1, 1, rows * 5, dtype=np.float32).reshape(rows, 5) for rows in (3, 0, 7)]
    batch = _batch(sender.join([np.full((4, COLUMNS), 9, np.uint8)]), 9)
    audio = _batch(sender.join(frames), 9).media["image"]
    (found,) = receiver.decode(sender.encode((replace(batch, media={**batch.media, "audio": audio}),)))
    assert _holds(found, 9)
    assert found.media["audio"].values.dtype == torch.float32
    assert torch.equal(found.media["audio"].values, torch.from_numpy(np.concatenate(frames)))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 4)), min_size=1, max_size=40))
def test_a_batch_keeps_its_bytes_as_long_as_anybody_holds_it(sends: list[tuple[int, int]]) -> None:
    """Batches of random sizes, of which a varying number is alive."""
    sender, receiver = BatchSender(), BatchReceiver()
    alive: deque[tuple[int, MultimodalBatch]] = deque()
    for mark, (rows, keep) in enumerate(sends, start=1):
        (batch,) = receiver.decode(_send(sender, rows, mark))
        alive.append((mark, batch))
        del batch
        while len(alive) > keep:
            alive.popleft()
        assert all(_holds(kept, number) for number, kept in alive)


def test_memory_goes_round_and_does_not_grow() -> None:
    sender, receiver, seen = BatchSender(), BatchReceiver(), set()
    held: deque[MultimodalBatch] = deque(maxlen=2)
    for mark in range(1, 200):
        message = _send(sender, 300 + mark % 40, mark)
        seen |= message.new.keys()
        held.append(receiver.decode(message)[0])
    assert len(seen) <= 6, "two batches are alive, and the sizes differ little"
    for mark in range(200, 240):
        message = _send(sender, 300 + mark % 40, mark)
        assert not message.new
        held.append(receiver.decode(message)[0])


def test_what_many_batches_took_is_given_back() -> None:
    sender, receiver, living = BatchSender(), BatchReceiver(), set()

    def send(mark: int) -> MultimodalBatch:
        message = _send(sender, 100, mark)
        living.update(message.new)
        living.difference_update(message.removed)
        return receiver.decode(message)[0]

    held = [send(mark) for mark in range(1, 60)]
    assert len(living) == 59
    held.clear()
    for mark in range(60, 70):
        send(mark)
    assert len(living) < 12


def test_joined_arrays_are_not_copied_again() -> None:
    sender, receiver = BatchSender(), BatchReceiver()
    joined = sender.join([np.full((100, COLUMNS), 5, np.uint8), np.full((20, COLUMNS), 6, np.uint8)])
    message = sender.encode((_batch(joined, 3),))
    joined[110:] = 77  # The tensor and the message share memory.
    (batch,) = receiver.decode(message)
    assert batch.media["image"].values[:100].eq(5).all()
    assert batch.media["image"].values[110:].eq(77).all()


def test_a_view_of_one_tensor_keeps_the_whole_batch() -> None:
    sender, receiver = BatchSender(), BatchReceiver()
    (batch,) = receiver.decode(_send(sender, 100, 5))
    row = batch.media["image"].values[3, 10:20]
    del batch
    gc.collect()
    for mark in range(6, 12):
        receiver.decode(_send(sender, 100, mark))
    assert row.eq(5).all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_that_drops_its_copy_frees_nothing() -> None:
    sender, receiver = BatchSender(), BatchReceiver()
    (batch,) = receiver.decode(_send(sender, 100, 5))
    child = os.fork()
    if child == 0:
        del batch
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    for mark in range(6, 12):
        receiver.decode(_send(sender, 100, mark))
    assert _holds(batch, 5)


def test_tensors_of_a_message_do_not_overlap() -> None:
    sender, receiver = BatchSender(), BatchReceiver()
    rng = np.random.default_rng(0)
    for _ in range(3):
        made = [rng.integers(0, 256, (size, COLUMNS), dtype=np.uint8) for size in (0, 1, 7, 900)]
        sent = sender.encode(tuple(_batch(sender.join([array]), 9) for array in made))
        for array, batch in zip(made, receiver.decode(sent), strict=True):
            np.testing.assert_array_equal(batch.media["image"].values.numpy(), array)
            assert batch.token_ids.tolist() == [9] * 7


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux")
def test_shared_buffers_take_nothing_of_dev_shm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Docker's /dev/shm has 64 MiB, which one or two batches fill."""
    before = Path("/proc/self/maps").read_text().count("/dev/shm/torch")  # Left by earlier tests.
    sender, receiver = BatchSender(), BatchReceiver()
    (batch,) = receiver.decode(_send(sender, 100, 3))
    assert _holds(batch, 3)
    places = Path("/proc/self/maps").read_text()
    assert "/memfd:mmscale-batch" in places
    assert places.count("/dev/shm/torch") <= before
    monkeypatch.setattr(os, "truncate", lambda handle, size: os.close(-1))
    with pytest.raises(WorkerError, match=r"could not allocate \d+ bytes of shared memory .*; lower data\.workers"):
        _send(BatchSender(), 100, 3)
