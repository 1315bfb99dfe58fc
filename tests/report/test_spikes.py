"""Loss spikes, the history of starts and the scales of charts in the report."""

from __future__ import annotations

import json
import math
import random
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mmscale.evaluate.result import ChoiceResult, SetResult
from mmscale.report.build import build_report
from mmscale.report.spikes import MOST_SPIKES, WINDOW_STEPS, Spike, find_spikes
from mmscale.report.starts import StartRecord, add_start, changes_of
from tests.report.pages import HOSTILE, Page
from tests.report.test_build import _result


def records(losses: list[float | None]) -> list[dict[str, Any]]:
    return [
        {"step": step, "stage": "all", "loss": loss, "tokens": 8, "samples": 1, "seconds": 0.5, "lr": 1e-3}
        for step, loss in enumerate(losses, start=1)
    ]


def write(run: Path, losses: list[float | None]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records(losses)))


def falling(steps: int, noise: float = 0.02) -> list[float | None]:
    rng = random.Random(0)
    return [5 / step**0.3 * (1 + noise * rng.gauss(0, 1)) for step in range(1, steps + 1)]


def test_a_spike_is_far_above_the_steps_before_by_the_definition() -> None:
    losses = falling(300)
    losses[99], losses[199], losses[249] = 9.0, None, 4.0
    spikes = find_spikes(records(losses))
    assert [(spike.step, spike.loss) for spike in spikes] == [(100, 9.0), (200, None), (250, 4.0)]
    before = [float(loss) for loss in losses[99 - WINDOW_STEPS : 99] if loss is not None]
    middle = statistics.median(before)
    scale = 1.4826 * statistics.median(abs(loss - middle) for loss in before)
    assert spikes[0].before == pytest.approx(middle)
    assert spikes[0].deviations == pytest.approx((9.0 - middle) / scale)
    assert math.isinf(spikes[1].deviations)
    assert spikes[0].page == "report/steps/step-00000100.html"


def test_noise_a_new_level_and_short_runs_are_no_spikes_and_neighbours_are_one() -> None:
    assert find_spikes(records(falling(400))) == []
    assert find_spikes(records([1.0, 9.0])) == []
    assert find_spikes(records([2.0] * 50 + [2.1] * 50)) == []
    losses = falling(60)
    losses[40:43] = [6.0, 9.0, 8.0]
    assert [spike.step for spike in find_spikes(records(losses))] == [42]
    many = falling(40 * (MOST_SPIKES + 3))
    for number in range(MOST_SPIKES + 3):
        many[40 * number + 35] = 10.0 + number
    assert len(find_spikes(records(many))) == MOST_SPIKES


def test_the_report_links_to_the_page_of_a_spike_or_gives_the_command(tmp_path: Path) -> None:
    losses = falling(120)
    losses[59], losses[99] = 9.0, 9.5
    write(tmp_path, losses)
    page = tmp_path / Spike(60, 9.0, 1.0, 9.0).page
    page.parent.mkdir(parents=True)
    page.touch()
    report = build_report(tmp_path)
    read = Page(report.read_text())
    links = [attributes["href"] for tag, attributes in read.tags if tag == "a"]
    assert links == ["report/steps/step-00000060.html"]
    assert (report.parent / str(links[0])).is_file()
    assert "mmscale data trace RUN --step 100 --html step.html" in read.text
    assert read.charts[0]["links"] == [[60, links[0]], [100, ""]]
    assert read.runs_its_own_script_alone()


def test_the_scripts_draw_scales_labels_and_links(tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node runs the page's script")
    losses = falling(200)
    losses[119] = 9.0
    write(tmp_path, losses)
    page = tmp_path / Spike(120, 9.0, 1.0, 9.0).page
    page.parent.mkdir(parents=True)
    page.touch()
    script = Path(__file__).with_name("browser.js")
    done = subprocess.run(
        [node, script, build_report(tmp_path)], capture_output=True, text=True, timeout=120, check=True
    )
    drawn = json.loads(done.stdout)
    assert drawn["buttons"][0] == ["log step", "log y"]
    assert {"step", "100", "200"} <= set(drawn["texts"])
    assert drawn["dots"] == 1
    assert drawn["opened"] == "report/steps/step-00000120.html"
    assert {"1", "10", "100"} <= set(drawn["after"]["texts"])
    assert all(state == "true" for row in drawn["after"]["pressed"] for state in row)


def start(number: int, **changes: Any) -> StartRecord:
    values: dict[str, Any] = {
        "start": number, "time": "2026-01-01 00:00:00", "step": 10 * (number - 1), "world_size": 1,
        "config": "starts/config-0001.yaml", "changed": {}, "versions": {"mmscale": "0.1.0", "torch": "2.6.0"},
        "code": "a" * 64, "commit": "b" * 40, "commit_changed": False, "host": "node1", "pid": 1,
    }  # fmt: skip
    return StartRecord(**{**values, **changes})


def test_the_history_names_what_each_start_changed(tmp_path: Path) -> None:
    write(tmp_path, falling(4))
    starts = [
        start(1),
        start(2),
        start(3, world_size=2, commit="c" * 40, versions={"mmscale": "0.1.0", "torch": "2.7.0"}),
        start(4, world_size=2, commit="c" * 40, commit_changed=True, changed={"seed": ("1", HOSTILE)}, host="node2"),
    ]
    for one in starts:
        add_start(tmp_path, one)
    assert changes_of(None, starts[0]) == []
    assert changes_of(starts[1], starts[2]) == [
        ("ranks", "1", "2"), ("code", "b" * 10, "c" * 10), ("torch", "2.6.0", "2.7.0")
    ]  # fmt: skip
    page = Page(build_report(tmp_path).read_text())
    assert "first start" in page.text
    assert "nothing" in page.text
    assert "ranks: 1 → 2; code: bbbbbbbbbb → cccccccccc; torch: 2.6.0 → 2.7.0" in page.text
    assert f"seed: 1 → {' '.join(HOSTILE.split())}" in page.text
    assert page.runs_its_own_script_alone()


def test_all_scores_have_one_axis(tmp_path: Path) -> None:
    write(tmp_path, falling(6))
    _result(
        tmp_path,
        {
            "style": SetResult(0.5, 0.02, 0.02, 200, "name among 50", 0.035, 0.01),
            "quiz": ChoiceResult(1.0, 0.25, 10, "right choice among 4", 0.1, {"none": 1.0}),
        },
    )
    page = Page(build_report(tmp_path).read_text())
    widths = [a["style"] for _, a in page.tags if str(a.get("class", "")).startswith("bar-fill")]
    assert widths == [f"width:{value}%" for value in ("50.0", "2.0", "2.0", "100.0", "25.0")]
    assert page.text.count("0 50 100%") == 2
    whiskers = [a["style"] for _, a in page.tags if a.get("class") == "whisker"]
    assert whiskers[-1] == "left:90.0%;right:0.0%"


@pytest.mark.parametrize(
    ("sets", "finished", "said"),
    [
        ("[]", True, "This run has no held-out sets: evaluation.sets is empty."),
        ("[{name: a}]", True, "No scores are recorded."),
        ("[{name: a}]", False, "Scored at the end of the run."),
    ],
)
def test_a_run_without_scores_says_why(tmp_path: Path, sets: str, finished: bool, said: str) -> None:
    write(tmp_path, falling(3))
    (tmp_path / "config.yaml").write_text(f"evaluation:\n  sets: {sets}\n  captions: null\n")
    if finished:
        _result(tmp_path, {})
    assert said in Page(build_report(tmp_path).read_text()).text
