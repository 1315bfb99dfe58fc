"""The sample log and the replay, compared with the batches that the loader yielded."""

from __future__ import annotations

import contextlib
import itertools
import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.config import DataConfig
from data_pipeline.errors import ManifestError, SampleLogError, StateError
from data_pipeline.history.replay import Replay
from data_pipeline.history.sample_log import LogSegment, SampleLog, cut_back, write_segment
from data_pipeline.io.atomic import partial_path
from data_pipeline.loader.loader import Loader, StepBatch
from data_pipeline.media_spec import MediaSpec
from data_pipeline.order.state import Drawn, LoaderState
from mmscale.metrics.sample_log import StepRecorder
from mmscale.metrics.step_counts import document_stats
from tests.data_pipeline.conftest import WriteSet, captioned, picture
from tests.data_pipeline.lane_states import toy_lane

STEPS = 24
EVERY = 5

Steps = list[list[StepBatch]]
"""For each step the batch of each rank."""


def load(
    config: DataConfig, spec: MediaSpec, world_size: int = 1, steps: int = STEPS, state: LoaderState | None = None
) -> Steps:
    ranks = range(world_size)
    loaders = [Loader(config, spec, seed=1, rank=r, world_size=world_size, micro_lanes=2, state=state) for r in ranks]
    try:
        return [[next(loader) for loader in loaders] for _ in range(steps)]
    finally:
        for loader in loaders:
            loader.close()


def truth(steps: Steps) -> list[list[tuple[str, int, int]]]:
    """Return the provenance in the batches of each step, in the order of the ranks' microbatches."""
    return [
        [
            (origin.dataset, origin.epoch, origin.index)
            for batch in ranks
            for micro in batch.microbatches
            for origin in micro.provenance
            if origin is not None
        ]
        for ranks in steps
    ]


def record(folder: Path, steps: Steps, done: int = 0, every: int = EVERY) -> None:
    """Record steps as ``train`` does, with a loss that encodes rank, microbatch and document."""
    recorders = [StepRecorder(done, stage=0) for _ in steps[0]]
    for number, ranks in enumerate(steps, done + 1):
        for rank, (recorder, batch) in enumerate(zip(recorders, ranks, strict=True)):
            recorder.add(batch, document_stats(batch, losses_of(batch, rank)))
        if number % every == 0:
            write_segment(folder, LogSegment.merge([recorder.pop_segment() for recorder in recorders]))


def losses_of(batch: StepBatch, rank: int) -> list[list[float]]:
    return [[100 * rank + 10 * m + s for s in range(micro.segments.num)] for m, micro in enumerate(batch.microbatches)]


def damaged_config(config: DataConfig, write_set: WriteSet) -> DataConfig:
    """The mixture with a fourth data set, in which one of six samples cannot be decoded."""
    samples = [{**captioned(i), "png": b"junk" if i % 6 == 0 else picture(i)} for i in range(37)]
    damaged = config.datasets[0].model_copy(
        update={"name": "damaged", "manifest": write_set("damaged", samples), "weight": 1.5}
    )
    return config.model_copy(update={"datasets": (*config.datasets, damaged)})


@pytest.fixture
def config(mixture_config: DataConfig, write_set: WriteSet) -> DataConfig:
    return damaged_config(mixture_config, write_set)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 2), (3, 0)])
def test_every_step_is_what_the_loader_yielded(
    config: DataConfig, hybrid_spec: MediaSpec, tmp_path: Path, world_size: int, workers: int
) -> None:
    config = config.model_copy(update={"workers": workers})
    steps = load(config, hybrid_spec, world_size)
    record(tmp_path / "sample_log", steps)
    sample_log = SampleLog(tmp_path / "sample_log")
    assert sample_log.last_step == STEPS - STEPS % EVERY
    names = [dataset.name for dataset in config.datasets]
    for step in range(1, sample_log.last_step + 1):
        number = sample_log.number_of(step)
        assert number is not None
        rows = sample_log.segment(number).rows_of_step(step)
        assert [(row.lane, row.place) for row in rows] == sorted((row.lane, row.place) for row in rows)
        # A rank has every W-th lane.
        by_rank = sorted(rows, key=lambda row: (row.lane % world_size, row.lane))
        assert [(row.dataset, row.epoch, row.sample) for row in by_rank] == truth(steps)[step - 1]
        for rank, batch in enumerate(steps[step - 1]):
            assert batch.drawn == {
                lane: tuple(
                    Drawn(names.index(row.dataset), row.epoch, row.sample, row.part) for row in rows if row.lane == lane
                )
                for lane in range(rank, config.lanes, world_size)
            }
            mine = [row for row in rows if row.lane % world_size == rank]
            expected = _measures(batch, rank)
            assert [row.tokens for row in mine] == [tokens for tokens, _ in expected]
            np.testing.assert_allclose([row.loss for row in mine], [loss for _, loss in expected], rtol=1e-6)


def _measures(batch: StepBatch, rank: int) -> list[tuple[int, float]]:
    found = []
    for number, micro in enumerate(batch.microbatches):
        for segment, origin in enumerate(micro.provenance):
            start, end = micro.segments.bounds[segment : segment + 2]
            if origin is not None:
                weight = float(micro.loss_weights[start:end].sum())
                found.append((end - start, losses_of(batch, rank)[number][segment] / weight))
    return found


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.long
def test_a_replay_from_any_snapshot_is_what_the_loader_yielded(
    config: DataConfig, hybrid_spec: MediaSpec, tmp_path: Path, world_size: int
) -> None:
    steps = load(config, hybrid_spec, world_size)
    expected = [{lane: pack for batch in ranks for lane, pack in batch.drawn.items()} for ranks in steps]
    skips = {(s.dataset, s.epoch, s.index): s.reason for ranks in steps for batch in ranks for s in batch.skipped}
    assert len(skips) > 5
    for start in (0, 1, 7, 16):
        state = LoaderState.merge([batch.state for batch in steps[start - 1]]) if start else None
        replay = Replay(config, hybrid_spec, 1, state, skipped=skips)
        assert [replay.next_step() for _ in range(STEPS - start)] == expected[start:]
        lane = Replay(config, hybrid_spec, 1, state, lanes=[3], skipped=skips)
        assert [lane.next_step() for _ in range(4)] == [{3: step[3]} for step in expected[start : start + 4]]


def test_a_replay_is_exact_for_documents_of_every_kind(
    mixture_config: DataConfig, hybrid_spec: MediaSpec, write_set: WriteSet
) -> None:
    """Branches, dialogues, dropped texts, tiles, split documents, a data set with ``max_epochs``, one without an
    index."""
    asked = [{"question": f"what {i}?", "answer": "a " * (i % 7 + 1)} for i in range(40)]
    talk = [{"role": "user", "content": "<image> what?"}, {"role": "assistant", "content": "a thing " * 3}]
    annotated = [
        {"png": picture(i, 20 + i, 30), "json": json.dumps({"annotations": asked[i : i + i % 4 + 1]}).encode()}
        for i in range(23)
    ]
    dialogues = [{"png": picture(i), "json": json.dumps({"messages": talk * (i % 3 + 1)}).encode()} for i in range(19)]
    captions, text, pages = mixture_config.datasets
    tiles = {"kind": "tiles", "tiling": {"kind": "internvl", "max_tiles": 4}}
    changes = [
        captions.model_dump() | {"template": {"kind": "caption", "text_dropout": 0.3}, "max_epochs": 1},
        text.model_dump() | {"manifest": None, "shards": [str(Path(text.indexed).parent / "part-{00000..00001}.tar")]},
        pages.model_dump(),
        {"name": "annotated", "manifest": write_set("annotated", annotated), "transforms": tiles}
        | {"template": {"kind": "annotations", "max_annotations": 3}},
        {"name": "dialogues", "manifest": write_set("dialogues", dialogues), "template": {"kind": "dialogue"}},
    ]
    packing = {"max_tokens": 60, "strategy": "first_fit", "look_ahead": 5, "too_long": "split"}
    config = DataConfig.model_validate(mixture_config.model_dump() | {"datasets": changes, "packing": packing})
    steps = load(config, hybrid_spec)
    assert {name for step in truth(steps) for name, *_ in step} == {d.name for d in config.datasets}
    assert any(drawn.part for (batch,) in steps for pack in batch.drawn.values() for drawn in pack)
    for start in (0, 9, 17):
        state = steps[start - 1][0].state if start else None
        replay = Replay(config, hybrid_spec, 1, state)
        assert [replay.next_step() for _ in range(STEPS - start)] == [batch.drawn for (batch,) in steps[start:]]


def test_a_replayed_document_is_the_one_that_was_packed(mixture_config: DataConfig, hybrid_spec: MediaSpec) -> None:
    replay = Replay(mixture_config, hybrid_spec, 1)
    for (batch,) in load(mixture_config, hybrid_spec, steps=5):
        places = [drawn for pack in batch.drawn.values() for drawn in pack]
        ids = [
            micro.token_ids[slice(*micro.segments.bounds[i : i + 2])].tolist()
            for micro in batch.microbatches
            for i, origin in enumerate(micro.provenance)
            if origin is not None
        ]
        documents = [replay.document(drawn) for drawn in places]
        assert [document.token_ids.tolist() for document in documents] == ids


def test_a_replay_that_lacks_a_shard_says_which(mixture_config: DataConfig, hybrid_spec: MediaSpec) -> None:
    shard = next(Path(mixture_config.datasets[0].manifest).parent.glob("*.tar"))
    shard.write_bytes(b"")
    replay = iter(Replay(mixture_config, hybrid_spec, 1))
    with pytest.raises(ManifestError, match=f"{shard.name}: truncated"):
        list(itertools.islice(replay, 20))


def test_a_replay_refuses_a_state_of_another_seed(mixture_config: DataConfig, hybrid_spec: MediaSpec) -> None:
    (batch,) = load(mixture_config, hybrid_spec, steps=1)[0]
    with pytest.raises(StateError, match="changed since: seed"):
        Replay(mixture_config, hybrid_spec, 2, batch.state)


@pytest.mark.long
def test_a_resume_at_another_world_size_continues_the_sample_log(
    config: DataConfig, hybrid_spec: MediaSpec, tmp_path: Path
) -> None:
    whole = load(config, hybrid_spec)
    record(tmp_path / "whole", whole[:20])
    record(tmp_path / "moved", load(config, hybrid_spec, 2, steps=13))  # Killed after 13; the snapshot is of 10.
    state = LoaderState.merge([batch.state for batch in load(config, hybrid_spec, 2, steps=10)[-1]])
    cut_back(tmp_path / "moved", 10)
    record(tmp_path / "moved", load(config, hybrid_spec, 3, steps=10, state=state), done=10)
    mine, theirs = SampleLog(tmp_path / "moved"), SampleLog(tmp_path / "whole")
    assert mine.step_ranges == theirs.step_ranges == [(1, 5), (6, 10), (11, 15), (16, 20)]
    for number, (first, last) in enumerate(mine.step_ranges):
        for step in range(first, last + 1):
            places = [
                [row._replace(loss=None) for row in one.segment(number).rows_of_step(step)] for one in (mine, theirs)
            ]
            assert places[0] == places[1]
        assert mine.segment(number).skipped == theirs.segment(number).skipped
        assert mine.segment(number).state == theirs.segment(number).state


def test_steps_that_are_done_again_are_cut(config: DataConfig, hybrid_spec: MediaSpec, tmp_path: Path) -> None:
    folder = tmp_path / "sample_log"
    record(folder, load(config, hybrid_spec, steps=15))
    partial_path(folder / "steps-0000000016-0000000020.samples").write_bytes(b"half a segm")
    cut_back(folder, 10)
    assert SampleLog(folder).step_ranges == [(1, 5), (6, 10)]
    assert len(list(folder.iterdir())) == 2
    cut_back(folder, 8)
    assert SampleLog(folder).step_ranges == [(1, 5)]
    cut_back(tmp_path / "absent", 0)


def test_a_million_segments_are_searched_by_name(tmp_path: Path) -> None:
    sample_log = SampleLog(tmp_path)
    sample_log.step_ranges = [(first, first + 199) for first in range(1, 200_000_000, 200)]
    assert sample_log.number_of(1) == 0
    assert sample_log.number_of(199_999_999) == len(sample_log.step_ranges) - 1
    assert sample_log.number_of(200_000_001) is None
    assert sample_log.number_of(0) is None


def segment_of(rows: Sequence[tuple[int, int, int, int, int, int, int, float]], state: LoaderState) -> LogSegment:
    recorder = StepRecorder(0, stage=2)
    recorder._rows = sorted(rows, key=lambda row: row[:2])  # type: ignore[assignment]
    recorder._state, recorder.step = state, 10
    return recorder.pop_segment()


rows_strategy = st.lists(
    st.tuples(
        st.integers(0, 9),
        st.integers(0, 3),
        st.integers(0, 2),
        st.integers(0, 2**32 - 1),
        st.integers(0, 2**62),
        st.integers(0, 300),
        st.integers(0, 2**31),
        st.floats(width=32, allow_nan=False),
    ),
    max_size=30,
)
STATE = LoaderState("a:b", 10, {0: toy_lane(1, 2, datasets=3)}, ("x", "y", "z"))


@given(rows=rows_strategy)
def test_a_segment_survives_its_file(rows: list[tuple[int, int, int, int, int, int, int, float]]) -> None:
    segment = segment_of(rows, STATE)
    back = LogSegment.from_bytes(segment.to_bytes())
    assert (back.first, back.last, back.stage, back.state) == (1, 10, 2, STATE)
    for step in range(1, 11):
        assert back.rows_of_step(step) == segment.rows_of_step(step)
    assert sum(len(back.rows_of_step(step)) for step in range(1, 11)) == len(rows)


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_damaged_segment_is_refused_or_read_as_it_was(data: st.DataObject) -> None:
    rows = [(step, lane, 1, 0, 7 * step + lane, 0, 9, 0.5) for step in range(10) for lane in range(3)]
    whole = segment_of(rows, STATE).to_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    broken = bytearray(whole)
    broken[place] ^= data.draw(st.integers(1, 255))
    cut = bytes(broken)[: data.draw(st.integers(0, len(whole)))]
    for damaged in (bytes(broken), cut):
        with contextlib.suppress(SampleLogError):
            # A changed stage or step in the header may stay undetected; changed rows must not.
            assert LogSegment.from_bytes(damaged).rows["sample"].tolist() == [row[4] for row in rows]


def test_a_bomb_is_not_inflated(tmp_path: Path) -> None:
    whole = segment_of([], STATE).to_bytes()
    magic, header, _ = whole.split(b"\n", 2)
    bomb = zlib.compress(bytes(1 << 24))
    fields = json.loads(header) | {"sections": [["state", 100, len(bomb), zlib.crc32(bomb)]]}
    with pytest.raises(SampleLogError, match="state does not have the expected 100 bytes"):
        LogSegment.from_bytes(b"\n".join([magic, json.dumps(fields).encode(), bomb]))
