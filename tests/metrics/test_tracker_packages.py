"""The tracker packages that the default environment may lack: MLflow's database, and Trackio."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mmscale.metrics.config import MetricsConfig
from mmscale.metrics.run_log import RunLog
from mmscale.metrics.sample_images import CaptionedImage
from mmscale.metrics.trackers import trackers as trackers_module
from mmscale.metrics.trackers.config import MlflowConfig, TrackerConfig, TrackioConfig
from mmscale.metrics.trackers.follow import FOLDER
from mmscale.metrics.trackers.trackers import RunFacts, Trackers
from tests.metrics.test_run_log import report, sums

pytestmark = pytest.mark.slow
COMMIT = "0123456789" * 4


def train(run_dir: Path, tracker: TrackerConfig, start: int, end: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """Log the steps after ``start`` up to ``end``, as one start of a run, and return what it printed."""
    monkeypatch.setattr(trackers_module, "FINISHED_SECONDS", 300.0)
    printed = io.StringIO()
    with Trackers(run_dir, (tracker,), 1) as trackers:
        config = MetricsConfig(tensorboard=False, images_every=2)
        log = RunLog(run_dir, config, start, end, Console(file=printed, width=500), trackers)
        facts = {"start": 1 + bool(start), "git_commit": COMMIT, "report": "report.html"}
        trackers.start(RunFacts("run ü", {"data.lanes": 4, "seed": 1 + start}, COMMIT, facts), log.print_line)
        for step in range(start + 1, end + 1):
            log.step(step, report(1 / step), sums(640))
            log.images(step, lambda limit: [CaptionedImage(np.full((8, 8, 3), 200, np.uint8), "a red balloon")])
        log.table(end, "heldout_results", ("set", "score"), [("emoji", 0.5), ("pages", None)])
        log.close()
        trackers.close(finished=True)
    return printed.getvalue()


def test_mlflow_without_a_server_keeps_a_database_in_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sqlalchemy")
    from mlflow import MlflowClient

    tracker = MlflowConfig(project="first day", tags=("a tag",))
    assert "not everything" not in train(tmp_path, tracker, 0, 5, monkeypatch)
    train(tmp_path, tracker, 3, 7, monkeypatch)
    folder = tmp_path / FOLDER / "mlflow"
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("first day").experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(step, 1 / step) for step in range(1, 8)]
    assert client.get_metric_history(run.info.run_id, "lr/vision")
    assert (run.info.run_name, run.info.status) == ("run ü", "FINISHED")
    assert run.data.params == {"data.lanes": "4", "seed": "1"}
    assert run.data.tags["mlflow.source.git.commit"] == COMMIT
    assert run.data.tags["a tag"] == "true"
    table = client.download_artifacts(run.info.run_id, "tables/heldout_results-step-00000007.json", str(tmp_path))
    assert json.loads(Path(table).read_text())["data"] == [["emoji", 0.5], ["pages", None]]
    images = [file.path for file in client.list_artifacts(run.info.run_id, "images") if file.path.endswith(".png")]
    assert sorted(name.split("+")[2] for name in images) == ["1", "2", "4", "6"]


def test_trackio_without_a_space_writes_its_local_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # Read by trackio when it is imported.
    pytest.importorskip("trackio")
    tracker = TrackioConfig(project="first-day", tags=("a tag",))
    printed = train(tmp_path / "run", tracker, 0, 5, monkeypatch)
    assert "not everything" not in printed
    assert "trackio show --project first-day" in printed
    train(tmp_path / "run", tracker, 3, 7, monkeypatch)

    from trackio.sqlite_storage import SQLiteStorage

    (name,) = SQLiteStorage.get_runs("first-day")
    logs = SQLiteStorage.get_logs("first-day", name)
    assert [(row["step"], row["loss"]) for row in logs if "loss" in row] == [(n, 1 / n) for n in range(1, 8)]
    assert [row["step"] for row in logs if "samples/0" in row] == [1, 2, 4, 6]
    assert next(row for row in logs if row["step"] == 2)["samples/0"]["caption"] == "a red balloon"
    (table,) = [row["heldout_results"] for row in logs if row["step"] == 7 and "heldout_results" in row]
    assert table["_value"] == [{"set": "emoji", "score": 0.5}, {"set": "pages", "score": None}]
    config = SQLiteStorage.get_run_config("first-day", name)
    assert (config["data.lanes"], config["git_commit"], config["tags"]) == (4, COMMIT, ["a tag"])
