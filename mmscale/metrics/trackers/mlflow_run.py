"""A run in MLflow, from the process that follows a training run."""

from __future__ import annotations

import io
import os
import re
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mmscale.metrics.trackers.messages import Record

_MOST_METRICS = 1000
"""MLflow's limit of metrics in one request."""
_MOST_PARAMS = 100
_LONGEST_PARAM = 6000


class MlflowRun:
    """Implements ``follow.Tracker``. ``start`` is the content of ``start.json``.

    Parameters of an MLflow run cannot change, so a resumed run keeps those of its first start; the artifacts
    ``config/start-N.json`` have the configuration of each start.
    """

    def __init__(self, start: dict[str, Any], folder: Path, run_id: str) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        from mlflow import MlflowClient
        from mlflow.entities import Param, RunTag

        tracker = start["tracker"]
        uri = tracker["tracking_uri"] or os.environ.get("MLFLOW_TRACKING_URI")
        local = None if uri else folder / "mlflow.db"
        self._client = MlflowClient(uri or f"sqlite:///{local}")
        # A folder of files cannot hold the metrics "lr" and "lr/vision": one is a file, the other a folder.
        self._slash = "." if uri and urlsplit(uri).scheme in ("", "file") else "/"
        if not run_id:
            experiment = self._client.get_experiment_by_name(tracker["project"])
            artifacts = (folder / "artifacts").as_uri() if local else None
            experiment_id = (
                self._client.create_experiment(tracker["project"], artifact_location=artifacts)
                if experiment is None
                else experiment.experiment_id
            )
            run_id = self._client.create_run(experiment_id, run_name=start["name"]).info.run_id
        self.run_id = run_id
        self._client.update_run(run_id, status="RUNNING")
        known = self._client.get_run(run_id).data.params
        params = [
            Param(_key(key), str(value)[:_LONGEST_PARAM])
            for key, value in start["config"].items()
            if _key(key) not in known
        ]
        for first in range(0, len(params), _MOST_PARAMS):
            self._client.log_batch(run_id, params=params[first : first + _MOST_PARAMS])
        tags = {**start["facts"], **dict.fromkeys(tracker["tags"], "true")}
        if start["commit"]:
            tags["mlflow.source.git.commit"] = start["commit"]
        self._client.log_batch(run_id, tags=[RunTag(_key(key), str(value)) for key, value in tags.items()])
        self._client.log_dict(run_id, start["config"], f"config/start-{start['facts']['start']}.json")
        history = self._client.get_metric_history(run_id, "loss")
        self.last_step: int | None = max((metric.step for metric in history), default=0)
        self.place = f"mlflow ui --backend-store-uri 'sqlite:///{local}'" if local else str(uri)

    def send(self, records: list[Record]) -> None:
        """Log the metrics of all records in few requests, and images and tables as artifacts."""
        from mlflow.entities import Metric
        from PIL import Image

        now = int(time.time() * 1000)
        metrics = [
            Metric(_key(name).replace("/", self._slash), value, now, record.step)
            for record in records
            for name, value in record.scalars.items()
        ]
        for first in range(0, len(metrics), _MOST_METRICS):
            self._client.log_batch(self.run_id, metrics=metrics[first : first + _MOST_METRICS])
        for record in records:
            for name, image in record.images.items():
                picture = Image.open(io.BytesIO(image.png))
                self._client.log_image(self.run_id, picture, key=_key(name), step=record.step)
            for name, table in record.tables.items():
                content = {"columns": list(table.columns), "data": [list(row) for row in table.rows]}
                self._client.log_dict(self.run_id, content, f"tables/{_key(name)}-step-{record.step:08d}.json")

    def close(self, finished: bool) -> None:
        """Set the status of the run: finished, or killed until it resumes."""
        self._client.set_terminated(self.run_id, "FINISHED" if finished else "KILLED")


def _key(name: str) -> str:
    """Return a name with the characters that MLflow allows."""
    return re.sub(r"[^\w\-. /]", "_", name)[:250]
