"""Traces of real runs, read as a viewer reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.profiler import record_function

from mmscale.errors import MMScaleError
from mmscale.metrics.config import MetricsConfig
from mmscale.metrics.profiler import profile_steps

CONFIG = MetricsConfig(profile_after_steps=2, profile_steps=3)


def ranges(path: Path, name: str) -> int:
    events = json.loads(path.read_text())["traceEvents"]
    return sum(event.get("name") == name and event.get("ph") == "X" for event in events)


def steps(folder: Path, count: int, enabled: bool = True) -> list[str]:
    said: list[str] = []
    with profile_steps(folder, CONFIG, 1, 10, said.append, enabled=enabled) as profiler:
        for number in range(11, 11 + count):
            with record_function(f"number {number}"):
                torch.ones(2).sum()
            if profiler is not None:
                profiler.step()
    return said


def test_exactly_the_stated_steps_are_in_it(tmp_path: Path) -> None:
    said = steps(tmp_path, 8)
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "rank-00001-steps-13-15.json"
    assert [number for number in range(11, 19) if ranges(path, f"number {number}")] == [13, 14, 15]
    assert len(said) == 1
    assert str(path) in said[0]


def test_a_run_that_ends_early_leaves_what_there_is_and_says_so(tmp_path: Path) -> None:
    steps(tmp_path, 3)
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["rank-00001-steps-13-13.json"]
    for count in (0, 1, 2):
        said = steps(tmp_path / str(count), count)
        assert "before step 13" in said[0]
        assert not (tmp_path / str(count)).exists()


def test_unasked_nothing_is_recorded(tmp_path: Path) -> None:
    assert steps(tmp_path, 8, enabled=False) == []
    assert not list(tmp_path.iterdir())


def test_a_disk_that_refuses_is_said(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("a file")
    with pytest.raises(MMScaleError, match="trace cannot be written"):
        steps(tmp_path, 8)
