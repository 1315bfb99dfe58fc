"""The sample log of a run: bytes per document, and look-ups at steps 1, 1,000 and 1,000,000.

    python -m benchmarks.sample_log --json

Sizes are those of a segment of 256 steps, 64 lanes and 8 documents per pack, drawn from three data sets of two billion
samples. The peer stores the same rows as plain columns. Look-ups use a folder of a million steps (2 lanes, 4 documents
per pack, one data set of a million samples, so that each is drawn eight times) and open the folder each time. Finding
the steps of a sample is compared with reading every segment.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.report import Case, best_seconds, main
from data_pipeline.config import DataConfig
from data_pipeline.history.sample_log import COLUMNS, LogSegment, SampleLog
from data_pipeline.history.sample_steps import SampleSteps
from data_pipeline.io.columns import Column
from data_pipeline.loader.sample_source import dataset_seed
from data_pipeline.order.lanes import LaneOrder
from data_pipeline.order.state import Cursor, LaneState, LoaderState, StreamPosition

EVERY = 256
STEPS = 10**6
LANES, DOCUMENTS, SAMPLES = 2, 4, 10**6
BLOCK_SIZE, WINDOW_BLOCKS, SEED = 16, 8, 1

LogRow = tuple[float, ...]


def _columns(rows: Sequence[LogRow]) -> dict[str, Column]:
    return {name: np.array(c, kind) for c, (name, kind) in zip(zip(*rows, strict=True), COLUMNS.items(), strict=True)}


def _size_cases() -> list[Case]:
    draw, lanes, samples = random.Random(0), 64, 2 * 10**9
    orders = [LaneOrder(samples, BLOCK_SIZE, WINDOW_BLOCKS, SEED, lane, lanes) for lane in range(lanes)]
    cursors = [Cursor(3, 40, 0)] * lanes
    rows: list[LogRow] = []
    for step in range(EVERY):
        for lane in range(lanes):
            for _ in range(8):
                place, cursors[lane] = orders[lane].resolve(cursors[lane])
                tokens, loss = int(draw.lognormvariate(5, 0.6)), draw.gauss(2, 1)
                rows.append((step, lane, draw.randrange(3), place.epoch, place.sample, 0, tokens, loss))
    columns = _columns(rows)
    plain = sum(column.itemsize for column in columns.values())
    cases = []
    for name, losses in (("with losses", columns["loss"]), ("without losses", np.full_like(columns["loss"], np.nan))):
        segment = LogSegment(1, EVERY, 0, LoaderState("", EVERY, {}, ("a", "b", "c")), columns | {"loss": losses})
        size = len(segment.to_bytes()) / len(rows)
        cases.append(Case(f"a document {name}", round(size, 2), {"plain columns": plain}, "bytes"))
    return cases


def _write(folder: Path) -> None:
    """Write the sample log of a million steps."""
    seed = dataset_seed(SEED, "one")
    orders = [LaneOrder(SAMPLES, BLOCK_SIZE, WINDOW_BLOCKS, seed, lane, LANES) for lane in range(LANES)]
    cursors = [Cursor()] * LANES
    for first in range(1, STEPS + 1, EVERY):
        rows: list[LogRow] = []
        last = min(STEPS, first + EVERY - 1)
        for step in range(last - first + 1):
            for lane in range(LANES):
                for _ in range(DOCUMENTS):
                    place, cursors[lane] = orders[lane].resolve(cursors[lane])
                    rows.append((step, lane, 0, place.epoch, place.sample, 0, 100, 2.0))
        lanes = {lane: LaneState(StreamPosition((last * DOCUMENTS,), (cursor,))) for lane, cursor in enumerate(cursors)}
        segment = LogSegment(first, last, 0, LoaderState("", last, lanes, ("one",)), _columns(rows))
        (folder / segment.name()).write_bytes(segment.to_bytes())


def _look_up(folder: Path, step: int) -> None:
    sample_log = SampleLog(folder)
    number = sample_log.number_of(step)
    assert number is not None
    assert len(sample_log.segment(number).rows_of_step(step)) == LANES * DOCUMENTS


def _steps_of(folder: Path, sample: int) -> list[int]:
    sample_log = SampleLog(folder)
    config = DataConfig.model_validate(
        {
            "tokenizer": {"kind": "tokenizers", "path": "unused"},
            "datasets": [{"name": "one", "manifest": "unused"}],
            "lanes": LANES,
            "packing": {"max_tokens": 1},
            "order": {"block_size": BLOCK_SIZE, "window_blocks": WINDOW_BLOCKS},
        }
    )
    steps = SampleSteps(config, SEED, "one", sample, {"one": SAMPLES})
    numbers = range(len(sample_log.step_ranges))
    return [row.step for epoch in steps.logged(sample_log, numbers) for row in epoch.rows]


def _scan(folder: Path, sample: int) -> list[int]:
    sample_log = SampleLog(folder)
    numbers = range(len(sample_log.step_ranges))
    return [row.step for number in numbers for row in sample_log.segment(number).rows_of_sample("one", sample)]


def measure() -> list[Case]:
    """Return all cases."""
    cases = _size_cases()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder)
        for step in (1, 1_000, STEPS):
            milliseconds = best_seconds(lambda step=step: _look_up(folder, step), 5) * 1e3  # type: ignore[misc]
            cases.append(Case(f"step {step:,} of {STEPS:,}", round(milliseconds, 2), {"limit": 100.0}, "ms"))
        sample = SAMPLES // 3
        found = _steps_of(folder, sample)
        assert found == _scan(folder, sample)
        ours = best_seconds(lambda: _steps_of(folder, sample), 3) * 1e3
        scan = best_seconds(lambda: _scan(folder, sample), 1) * 1e3
        cases.append(
            Case(f"the {len(found)} steps of a sample", round(ours, 1), {"reading every segment": round(scan, 1)}, "ms")
        )
    return cases


if __name__ == "__main__":
    main("sample_log", measure)
