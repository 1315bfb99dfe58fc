"""Reading ahead: a lane's documents, positions and faults do not depend on the depth of the queue or on threads."""

from __future__ import annotations

import hashlib
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.config import DataConfig
from data_pipeline.document import Document
from data_pipeline.errors import FaultKind, StorageError
from data_pipeline.loader.lane_packs import LaneStream
from data_pipeline.loader.sample_source import OpenDataset
from data_pipeline.media_spec import MediaSpec
from data_pipeline.order.fault_lists import RunFaults
from data_pipeline.order.lanes import LaneSequence, Schedule
from data_pipeline.order.state import Drawn, LaneState, StreamPosition
from data_pipeline.packing.packer import Budget
from data_pipeline.packing.synthetic_documents import dummy_document
from data_pipeline.storage.storage import Storage
from data_pipeline.text.tokenizer import load_tokenizer
from tests.data_pipeline.conftest import WriteSet, page, plain_text
from tests.data_pipeline.loader.test_damaged_data import SHARD_SAMPLES, damaged_samples, fragile_tokenizer, lose, rot

pytestmark = pytest.mark.fault
__all__ = ["fragile_tokenizer"]  # Used by the test here.

TURNS = 260
SCHEDULE = Schedule((0, 9, 21), ((3.0, 1.0, 1.0), (1.0, 2.0, 0.0), (2.0, 1.0, 1.0)))
"""The weights change while samples are in the queue."""


@pytest.fixture
def config(mixture_config: DataConfig, write_set: WriteSet, tmp_path: Path) -> DataConfig:
    """Damaged captions with a lost shard, texts with ``max_epochs``, and pages from plain tars."""
    damaged, wrong = damaged_samples()
    only = write_set("only", damaged)
    text = write_set("text", [plain_text(number) for number in range(17)])
    pages = write_set("pages", [page(number) for number in range(31)])
    transforms = {"kind": "fixed", "augment": {"shift": 0.1, "flip": 0.5}}
    tars = sorted(str(path) for path in pages.parent.glob("*.tar"))
    changes = {
        "datasets": [
            {"name": "only", "manifest": only, "transforms": transforms},
            {"name": "text", "manifest": text, "template": {"kind": "text"}, "max_epochs": 2},
            {"name": "pages", "shards": tars, "template": {"kind": "interleaved"}},
        ],
        "lanes": 1,
        "packing": {"max_tokens": 200, "too_long": "split"},
        "faults": {"on_error": "quarantine", "shard": "skip", "max_share": 0.9},
    }
    made = DataConfig.model_validate(mixture_config.model_dump() | changes)
    rot(made, [number for number in range(0, len(damaged), 11) if number not in wrong])
    lose(only.parent / "part-00004.tar")
    assert len(damaged) > 5 * SHARD_SAMPLES
    return made


def digest(document: Document) -> str:
    parts = [document.token_ids, document.labels, *(item.values for item in document.items)]
    return hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()


def stream_of(config: DataConfig, spec: MediaSpec, threads: Executor | None = None) -> LaneStream:
    tokenizer, faults = load_tokenizer(config.tokenizer), RunFaults.load(config.faults, ())
    budget = Budget(config.packing, spec, dummy_document(spec, tokenizer.pad_id))
    datasets = [OpenDataset.open(config, each, 1, tokenizer, spec, faults, Storage()) for each in config.datasets]
    start = LaneState(StreamPosition.start(len(datasets)))
    return LaneStream(config, datasets, SCHEDULE, 0, budget, start, threads)


def record(config: DataConfig, spec: MediaSpec, ahead: int, threads: int) -> list[object]:
    """Return the observable results of a lane after each sample; a step has several samples."""
    seen: list[object] = []
    with ThreadPoolExecutor(max(1, threads)) as pool:
        stream = stream_of(config, spec, pool if threads else None)
        for turn in range(TURNS):
            stream.ahead.depth, stream.step = (ahead, turn // 7)
            made = stream.make()
            assert made is not None
            seen.append([(each.drawn, digest(each.document)) for each in made])
            seen.append((stream.position, stream.policy.state(), [each.record() for each in stream.skipped]))
            stream.skipped.clear()
    return seen


@pytest.mark.parametrize(("ahead", "threads"), [(2, 0), (4, 0), (9, 0), (2, 1), (5, 2)])
def test_nothing_depends_on_what_is_decoded_ahead(
    config: DataConfig, hybrid_spec: MediaSpec, ahead: int, threads: int
) -> None:
    one_by_one = record(config, hybrid_spec, 1, 0)
    kinds = {skip["kind"] for turn in one_by_one[1::2] for skip in turn[2]}  # type: ignore[index]
    assert kinds > {kind.value for kind in (FaultKind.CHECKSUM, FaultKind.SHARD, FaultKind.DECODE, FaultKind.TEXT)}
    assert record(config, hybrid_spec, ahead, threads) == one_by_one


@pytest.mark.parametrize(("ahead", "threads"), [(1, 0), (4, 0), (5, 2)])
def test_an_error_of_the_order_itself_comes_when_it_is_its_turn(
    config: DataConfig, hybrid_spec: MediaSpec, monkeypatch: pytest.MonkeyPatch, ahead: int, threads: int
) -> None:
    draw, last = LaneSequence.draw, 9

    def failing(sequence: LaneSequence, position: StreamPosition, step: int) -> tuple[Drawn | None, StreamPosition]:
        if sum(position.draws) == last:
            raise StorageError("the server is gone")
        return draw(sequence, position, step)

    monkeypatch.setattr(LaneSequence, "draw", failing)
    with ThreadPoolExecutor(max(1, threads)) as pool:
        stream = stream_of(config, hybrid_spec, pool if threads else None)
        stream.ahead.depth = ahead
        for turn in range(last):
            assert stream.make() is not None
            assert sum(stream.position.draws) == turn + 1
        with pytest.raises(StorageError, match="gone"):
            stream.make()
