"""The list of skipped samples: written at once, cut back at a resume, and read by the loader."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data_pipeline.errors import FaultKind, TooManyFaultsError
from data_pipeline.loader.loader import StepBatch
from data_pipeline.order.fault_policy import Action, FaultConfig, Skipped
from mmscale.dist import World
from mmscale.errors import MMScaleError
from mmscale.metrics.faults import FaultList, fault_lists, quarantine_lists
from mmscale.metrics.run_log import NullLog
from mmscale.run.train import _next_batch

pytestmark = pytest.mark.fault


def world(rank: int = 0) -> World:
    return World(rank, 1, rank, torch.device("cpu"), 10.0)


def skip(index: int, kind: FaultKind = FaultKind.DECODE) -> Skipped:
    return Skipped("set", 0, index, 3, "a/b.tar", f"{index:06d}", kind, "no image é \ud800", 512, Action.QUARANTINE)


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_says_where_what_and_when(tmp_path: Path) -> None:
    FaultList(tmp_path / "faults", world(), 0, print).record(7, [skip(5)])
    (record,) = lines(tmp_path / "faults" / "rank-00000.jsonl")
    place = {"dataset": "set", "epoch": 0, "index": 5, "lane": 3, "shard": "a/b.tar", "key": "000005", "offset": 512}
    reason = {"kind": "decode", "reason": "no image é \ud800", "action": "quarantine"}
    assert record == {"step": 7, **place, **reason}


def test_a_resume_removes_later_lines_and_torn_ones_of_every_rank(tmp_path: Path) -> None:
    book = FaultList(tmp_path, world(), 0, print)
    for step in (1, 2, 2, 3):
        book.record(step, [skip(step)])
    shutil.copy(tmp_path / "rank-00000.jsonl", tmp_path / "rank-00001.jsonl")
    with (tmp_path / "rank-00001.jsonl").open("a") as file:
        file.write('{"step": 2, "torn')
    FaultList(tmp_path, world(), 2, print)
    assert [[line["step"] for line in lines(path)] for path in fault_lists(tmp_path)] == [[1, 2, 2]] * 2
    FaultList(tmp_path, world(), 0, print)
    assert [lines(path) for path in fault_lists(tmp_path)] == [[], []]


def test_what_a_list_excludes_is_counted_and_not_listed_again(tmp_path: Path) -> None:
    skipped = [skip(1, FaultKind.EXCLUDED), skip(2, FaultKind.CHECKSUM), skip(3, FaultKind.EXCLUDED)]
    FaultList(tmp_path, world(), 0, print).record(1, skipped)
    assert [line["index"] for line in lines(tmp_path / "rank-00000.jsonl")] == [2]


def test_the_terminal_gets_each_reason_once_and_then_its_count(tmp_path: Path) -> None:
    said: list[str] = []
    book = FaultList(tmp_path, world(), 0, said.append)
    for step in range(1, 100):
        missing = replace(skip(step, FaultKind.TEXT), reason=f"field 'f{step}' is missing; 1a2b3c{step:02d} of {step}")
        book.record(step, [skip(step), missing])
    book.record(100, [skip(100)])
    assert [line.partition(":")[0] for line in said] == [
        "skipped a/b.tar/000001",
        "skipped a/b.tar/000001",
        "skipped 10 samples for this reason so far",
        "skipped 10 samples for this reason so far",
        "skipped 100 samples for this reason so far",
    ]
    assert "no image" in said[-1]
    assert str(tmp_path) in said[-1]
    assert len(lines(tmp_path / "rank-00000.jsonl")) == 199

    said.clear()
    words = [chr(97 + number) for number in range(26)]
    book.record(101, [replace(skip(number), reason=f"is {word}") for number, word in enumerate(words)])
    assert len(said) == 19  # Twenty reasons, two of them printed before, and a line about further ones.
    assert said[-1].startswith("skipped samples with further reasons are listed in")


def gives_up(error: TooManyFaultsError) -> Iterator[StepBatch]:
    """A loader whose fault policy ends the run at the next step."""
    yield from ()
    raise error


def test_what_a_run_left_out_before_it_gave_up_is_listed(tmp_path: Path) -> None:
    book = FaultList(tmp_path, world(), 0, print)
    error = TooManyFaultsError("3 in a row")
    error.skipped = (skip(1), skip(2))
    run = SimpleNamespace(log=NullLog(), faults=book)
    with pytest.raises(TooManyFaultsError):
        _next_batch(run, gives_up(error), 4)  # type: ignore[arg-type]
    assert [(line["step"], line["index"]) for line in lines(tmp_path / "rank-00000.jsonl")] == [(4, 1), (4, 2)]


def test_lists_are_read_again_only_where_something_is_quarantined(tmp_path: Path) -> None:
    FaultList(tmp_path, world(), 0, print).record(1, [skip(1)])
    assert quarantine_lists(tmp_path, FaultConfig()) == []
    assert quarantine_lists(tmp_path, FaultConfig(decode=Action.QUARANTINE)) == fault_lists(tmp_path)
    assert quarantine_lists(tmp_path, FaultConfig(text=Action.QUARANTINE)) == [], "these are tried again all the same"


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "faults").write_text("a file")
    with pytest.raises(MMScaleError, match="the list of faults cannot be written"):
        FaultList(tmp_path / "faults", world(), 0, print)
