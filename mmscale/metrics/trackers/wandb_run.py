"""A run in Weights & Biases, from the process that follows a training run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mmscale.metrics.trackers.messages import Record

_INIT_SECONDS = 60.0


class WandbRun:
    """Implements ``follow.Tracker``. ``start`` is the content of ``start.json``.

    The package captures no output, records no code and reads no git repository.
    """

    def __init__(self, start: dict[str, Any], folder: Path, run_id: str) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        tracker = start["tracker"]
        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            git_commit=start["commit"],
            init_timeout=_INIT_SECONDS,
        )
        self.run_id = run_id or start["id"]
        try:
            self._run = wandb.init(
                project=tracker["project"],
                entity=tracker["entity"],
                name=start["name"],
                tags=tracker["tags"],
                id=self.run_id,
                resume="allow",
                mode=tracker["mode"],
                dir=folder,
                config={**start["config"], **start["facts"]},
                settings=settings,
                allow_val_change=True,
            )
        except Exception:
            wandb.teardown(exit_code=1)  # Its service would refuse the same run id at the next attempt.
            raise
        is_offline = self._run.settings.mode == "offline"
        self.last_step = None if is_offline or not self._run.starting_step else self._run.starting_step - 1
        self.place = f"send it with: wandb sync '{self._run.settings.sync_dir}'" if is_offline else str(self._run.url)
        self._step = self._run.starting_step

    def send(self, records: list[Record]) -> None:
        """Log the records; one call of wandb for each step, whose steps must ascend."""
        import wandb

        for record in records:
            # Values that arrive after their step get the current step: wandb drops earlier ones.
            self._step = max(self._step, record.step)
            self._run.log(record.values(wandb.Image, wandb.Table), step=self._step)

    def close(self, finished: bool) -> None:
        """Wait until wandb has sent or written everything. An unfinished run is marked as one that may resume."""
        self._run.finish(exit_code=0 if finished else 1)
