"""A FIFO instead of a file of a run folder is rejected with its name, without waiting for its other end."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data_pipeline.errors import DataPipelineError, FaultKind
from data_pipeline.history.sample_log import SampleLog
from data_pipeline.order.fault_policy import Action, Skipped
from mmscale.dist import World
from mmscale.engine.watchdog import Watchdog, WatchdogConfig
from mmscale.errors import MMScaleError
from mmscale.metrics.faults import FaultList
from mmscale.metrics.goodput import WallTime
from mmscale.metrics.run_log import JsonlSink
from mmscale.run.folder import hold_folder

ALONE = World(0, 1, 0, torch.device("cpu"))
SKIPPED = Skipped("set", 0, 1, 3, "a.tar", "000001", FaultKind.DECODE, "no image", 512, Action.QUARANTINE)


def list_faults(run: Path) -> None:
    book = FaultList(run / "none", ALONE, 0, print)
    book._path = run / "faults/rank-00000.jsonl"
    book.record(1, [SKIPPED])


def lock(run: Path) -> None:
    with hold_folder(run):
        pass


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("metrics.jsonl", lambda run: JsonlSink(run / "metrics.jsonl", 0)),
        ("goodput.jsonl", lambda run: WallTime(run, 0)),
        ("faults/rank-00000.jsonl", lambda run: FaultList(run / "faults", ALONE, 0, print)),
        ("faults/rank-00000.jsonl", list_faults),
        ("sample_log/steps-0000000001-0000000005.samples", lambda run: SampleLog(run / "sample_log").state(0)),
        ("lock/claim-00000001", lock),
        ("lock/kernel", lock),
    ],
)
def test_a_fifo_is_refused(tmp_path: Path, name: str, use: Callable[[Path], object]) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    with pytest.raises((MMScaleError, DataPipelineError)) as raised:
        use(tmp_path)
    assert str(path) in str(raised.value)
    assert "not a regular file" in str(raised.value)


@pytest.mark.timeout(20)
def test_the_watchdog_ends_a_process_although_a_fifo_is_in_the_place_of_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    watchdog = Watchdog(tmp_path, WatchdogConfig().limits(60.0), 0, 1)
    path = tmp_path / "logs/hang-rank-0.txt"
    path.parent.mkdir()
    os.mkfifo(path)
    watchdog._dump_stacks()
    assert f"{path}: the stacks cannot be written: not a regular file" in capsys.readouterr().err
    path.unlink()
    for _ in range(2):
        watchdog._dump_stacks()
    head, *stacks = path.read_text().splitlines()
    assert head.startswith("main thread: start of step 0, in no collective, at engine/watchdog.py:")
    assert sum("test_the_watchdog_ends" in line for line in stacks) == 1
