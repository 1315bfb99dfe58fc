"""A run in Trackio, from the process that follows a training run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mmscale.metrics.trackers.messages import Record


class TrackioRun:
    """Implements ``follow.Tracker``. ``start`` is the content of ``start.json``.

    Trackio identifies a run by its name, so the name ends with a random part.
    """

    def __init__(self, start: dict[str, Any], folder: Path, run_id: str) -> None:
        for variable in ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(variable, "1")
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        tracker = start["tracker"]
        self.run_id = run_id or f"{start['name']}-{start['id'][:6]}"
        self._run = trackio.init(
            project=tracker["project"],
            name=self.run_id,
            space_id=tracker["space"],
            resume="allow",
            config={**start["config"], **start["facts"], "tags": list(tracker["tags"])},
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        space = tracker["space"] or os.environ.get("TRACKIO_SPACE_ID")
        self.last_step: int | None = None
        if not space:
            self.last_step = SQLiteStorage.get_max_step_for_run(tracker["project"], self.run_id) or 0
        self.place = (
            f"https://huggingface.co/spaces/{space}" if space else f"trackio show --project {tracker['project']}"
        )

    def send(self, records: list[Record]) -> None:
        """Log the records, one call of trackio for each step."""
        import trackio

        for record in records:
            self._run.log(record.values(trackio.Image, trackio.Table), step=record.step)

    def close(self, finished: bool) -> None:
        """Write what is buffered."""
        self._run.finish()
