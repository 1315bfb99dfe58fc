"""Heartbeats, lock and logs of all ranks: the counted operations are those that happen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmscale.cli.run_file import load_run
from mmscale.engine.watchdog import HEARTBEATS, Limits, Watchdog
from mmscale.rehearse.report import Report
from mmscale.rehearse.run_files import FileOperations, rehearse_heartbeats, rehearse_lock, rehearse_logs


def test_operations_of_files_are_counted_while_the_block_runs(tmp_path: Path) -> None:
    with FileOperations() as counts:
        (tmp_path / "a").write_text("x")
        (tmp_path / "a").rename(tmp_path / "b")
        list(tmp_path.iterdir())
    (tmp_path / "c").write_text("x")
    assert counts == {"open": 1, "os.rename": 1, "os.listdir": 1}


def test_the_heartbeats_of_all_ranks_are_written_and_read(tmp_path: Path) -> None:
    report = Report()
    rehearse_heartbeats(report, tmp_path, Limits(300, 3600), 50, most_per_second=5)
    assert len(list((tmp_path / HEARTBEATS).iterdir())) == 50
    per_beat = report.value(HEARTBEATS, "file operations of a heartbeat")
    assert 3 <= per_beat <= 6
    assert report.value(HEARTBEATS, "file operations per second of all ranks") == pytest.approx(50 * per_beat / 5)
    assert [finding.name for finding in report.findings] == ["heartbeat-traffic", "hang-report-traffic"]
    silent = Report()
    (tmp_path / "off").mkdir()
    rehearse_heartbeats(silent, tmp_path / "off", Limits(None, 3600), 50, most_per_second=5)
    assert silent.findings == []


def test_another_process_sees_the_lock(tmp_path: Path) -> None:
    report = Report()
    rehearse_lock(report, tmp_path / "run")
    assert report.findings == []
    assert report.value("lock", "second process sees the holder") is True
    assert not (tmp_path / "run").exists()


def test_logs_per_day_follow_from_real_lines(tmp_path: Path) -> None:
    run = load_run(Path("configs/quickstart.yaml"), ["metrics.tensorboard=false"]).value
    report = Report()
    rehearse_logs(report, run, None, tmp_path, num_lanes=16, step_seconds=10, world_size=16, most_bytes_per_day=1e3)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert {"loss", "grad_norm", "dataset/emoji/tokens", "forward_seconds"} <= json.loads(lines[0]).keys()
    size = (tmp_path / "metrics.jsonl").stat().st_size
    assert report.value("logs", "bytes per day: metrics.jsonl") == pytest.approx(size / len(lines) * 8640, rel=1e-6)
    assert [finding.name for finding in report.findings] == ["log-volume"]


def test_few_ranks_read_all_heartbeats_of_a_large_run(tmp_path: Path) -> None:
    small, large = (Watchdog(tmp_path, Limits(300, 3600), 0, ranks) for ranks in (64, 8000))
    assert (small.every_seconds, large.every_seconds) == (5, 20)
    assert len(small.reporters) == len(large.reporters) == 16
    assert Watchdog(tmp_path, Limits(300, 3600), 0, 10).reporters == range(10)
    # A heartbeat never comes later than an eighth of the shortest limit.
    assert Watchdog(tmp_path, Limits(80, 3600), 0, 8000).every_seconds == 10
