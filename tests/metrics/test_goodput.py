"""The wall time of a run by use, with a fake clock."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmscale.errors import MMScaleError
from mmscale.metrics.goodput import GOODPUT_FILE, WallTime, read_goodput
from mmscale.metrics.run_log import JsonlSink


class Start:
    """One start of a run, which writes its two files like ``RunLog``."""

    def __init__(self, folder: Path, began: float, step: int) -> None:
        self.now, self.number = began, step
        self.account = WallTime(folder, step, lambda: self.now, began)
        self.lines = JsonlSink(folder / "metrics.jsonl", step)

    def spend(self, kind: str, seconds: float) -> None:
        self.now += seconds
        self.account.record_pause(kind, self.number)  # type: ignore[arg-type]

    def step(self, seconds: float, wait: float = 0.0) -> float:
        self.now += seconds
        self.number += 1
        metrics = self.account.step(seconds, wait)
        self.lines.write({"step": self.number, "seconds": seconds, "data_wait_seconds": wait, **metrics})
        return metrics["goodput"]


def test_every_second_of_a_run_that_was_killed_twice_has_its_place(tmp_path: Path) -> None:
    first = Start(tmp_path, 1_000.0, 0)
    first.spend("setup", 10)
    first.step(5, wait=1)
    first.step(5)
    first.spend("checkpoint", 3)  # At step 2.
    first.step(4)
    assert first.step(4, wait=2) == pytest.approx((4 + 5 + 4 + 2) / 31)
    # Killed half a second into step 5. The next start is 20 s after the last line.
    second = Start(tmp_path, first.now + 20, 2)
    second.spend("setup", 7)
    second.step(6)
    # Killed. The third start is killed before it removes the second start's line of step 3.
    WallTime(tmp_path, 2, lambda: second.now + 9, second.now + 8)
    third = Start(tmp_path, second.now + 30, 2)
    third.spend("setup", 11)
    third.step(4)
    third.step(4, wait=1)
    third.spend("checkpoint", 2)
    third.spend("evaluation", 8)
    third.now += 1
    third.spend("other", 0)
    found = read_goodput(tmp_path)
    assert found is not None
    assert (found.training, found.data) == (4 + 5 + 4 + 3, 1 + 1)
    assert found.repeated == 4 + 4 + 6
    assert (found.setup, found.checkpoint, found.evaluation) == (10 + 7 + 11, 3 + 2, 8)
    assert (found.down, found.other, found.starts) == (20 + 30, 1, 4)
    assert found.wall == third.now - 1_000
    parts = ("training", "data", "repeated", "setup", "checkpoint", "evaluation", "down", "other")
    assert sum(getattr(found, part) for part in parts) == pytest.approx(found.wall)
    assert found.share == found.training / found.wall


def test_a_torn_line_and_an_old_run_do_no_harm(tmp_path: Path) -> None:
    assert read_goodput(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "seconds": 9.0, "data_wait_seconds": 0.0}) + "\n")
    assert read_goodput(tmp_path) is None
    start = Start(tmp_path, 50.0, 1)
    start.spend("setup", 2)
    with (tmp_path / GOODPUT_FILE).open("a") as file:
        file.write('{"time": 99, "kind": "che')
    found = read_goodput(tmp_path)
    assert found is not None
    assert (found.wall, found.setup, found.training, found.starts) == (2, 2, 0, 1)
    # A new start ends the incomplete line before it writes its own.
    again = Start(tmp_path, 60.0, 1)
    again.spend("setup", 1)
    found = read_goodput(tmp_path)
    assert found is not None
    assert (found.down, found.setup, found.starts) == (8, 3, 2)


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(MMScaleError, match="goodput cannot be recorded"):
        WallTime(tmp_path / "missing", 0)
