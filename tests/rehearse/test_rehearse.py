"""The whole rehearsal from the command line, and its findings."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mmscale.cli.main import main
from mmscale.cli.run_file import load_run
from mmscale.plan.checkpoints import LLAMA_3
from mmscale.rehearse.rehearse import FAILURES, BigRun, Limits, _rehearse_failures, hazards_of, value_text, write_page
from mmscale.rehearse.report import Basis, Report
from mmscale.run.config import RunConfig


def cluster(**changes: float) -> BigRun:
    values = {
        "nodes": 1000,
        "gpus_per_node": 8,
        "preset": LLAMA_3,
        "failures_per_node_day": None,
        "preemptions_per_day": 0.0,
        "grace_seconds": 0.0,
        "restart_seconds": 600.0,
        "storage_bytes_per_second": 1e11,
        "copy_bytes_per_second": 5e9,
        "step_seconds": 10.0,
        "days": 30.0,
    }
    return BigRun(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def run() -> RunConfig:
    return load_run(Path("configs/quickstart.yaml"), ["checkpoint.background=false"]).value


def failures_of(run: RunConfig, checkpoint_bytes: float, **changes: float) -> Report:
    report = Report()
    report.add("checkpoint", "bytes of a checkpoint", checkpoint_bytes, "bytes")
    _rehearse_failures(report, run, cluster(**changes), 0, Limits())
    return report


def test_a_save_blocks_for_its_write_or_for_its_copy() -> None:
    direct = hazards_of(cluster(), 8e12, background=False)
    assert (direct.blocked, direct.written) == (80, 0)
    behind = hazards_of(cluster(), 8e12, background=True)
    assert (behind.blocked, behind.written) == (pytest.approx(0.2), 80)
    assert direct.mtbf / 3600 == pytest.approx(54 * 24 / 419 * 2.048)
    assert hazards_of(cluster(failures_per_node_day=0), 1, background=True).rate == 0


def test_an_interval_far_from_the_optimum_is_a_finding(run: RunConfig) -> None:
    often = failures_of(
        run.model_copy(update={"checkpoint": run.checkpoint.model_copy(update={"every_steps": 5})}), 2e12
    )
    assert "checkpoint-interval" in {finding.name for finding in often.findings}
    optimum = often.value(FAILURES, "Daly's optimum")
    steps = round(optimum / 10)
    well = run.model_copy(update={"checkpoint": run.checkpoint.model_copy(update={"every_steps": steps})})
    report = failures_of(well, 2e12)
    assert "checkpoint-interval" not in {finding.name for finding in report.findings}
    assert report.value(FAILURES, "best interval of the table") == pytest.approx(optimum, rel=0.5)
    assert all(figure.basis is Basis.SIMULATED for figure in report.figures[1:])


def test_failures_that_leave_no_time_are_a_finding(run: RunConfig) -> None:
    report = failures_of(run, 2e12, failures_per_node_day=0.2)
    assert "goodput" in {finding.name for finding in report.findings}


def test_the_page_holds_every_figure_and_escapes_text(run: RunConfig, tmp_path: Path) -> None:
    report = Report()
    report.add("checkpoint", "bytes of a checkpoint", 10**12, "bytes")
    rows = _rehearse_failures(report, run, cluster(), 0, Limits())
    report.add("data order", "a <b> name", "text & more")
    report.limit("too-many", 2, 1, "a <sentence>")
    write_page(tmp_path / "page.html", "a run", report, rows)
    text = (tmp_path / "page.html").read_text()
    assert "a &lt;b&gt; name" in text
    assert "a &lt;sentence&gt;" in text
    assert len(re.findall(r"<tr><td>", text)) >= len(report.figures) + len(rows)


def test_values_are_readable() -> None:
    assert [value_text(value) for value in (True, 12_345, 0.123456, 2.0, 1234.5, "x", float("inf"))] == [
        "yes",
        "12,345",
        "0.1235",
        "2",
        "1,234",
        "x",
        "inf",
    ]


@pytest.mark.slow
def test_the_command_rehearses_and_exits_by_its_findings(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["launch", "rehearse", "configs/quickstart.yaml", "--nodes", "3", "--gpus-per-node", "2", "--json"]
    assert main([*words, "--lanes", "12"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["ranks"] == 6
    assert printed["findings"] == []
    assert {figure["basis"] for figure in printed["figures"]} == {"real", "scaled", "simulated"}
    assert len(printed["intervals"]) > 10
    assert main(words) == 1
    printed = json.loads(capsys.readouterr().out)
    assert [finding["name"] for finding in printed["findings"]] == ["lanes-below-ranks"]
    assert main([*words, "--failures", "none"]) == 2
