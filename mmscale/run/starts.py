"""Compare the configuration of a start with that of the previous start, and record each start.

RUN/config.yaml                 the previous configuration; differences are printed, or rejected for a finished run
RUN/starts/starts.jsonl         one line for each start: time, step, code, changed values
RUN/starts/config-0001.yaml     the configuration of start 1, and of the next starts if their values are equal
RUN/starts/environment-0001.json  machines, modules, variables and packages of start 1
"""

from __future__ import annotations

import json
import os
import socket
import sys
import warnings
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from data_pipeline.io.atomic import write_whole
from mmscale.config import DroppedKeyWarning, Loaded, dump, leaves, load, shorten
from mmscale.dist import World, any_rank, raise_on_any_rank
from mmscale.errors import ConfigError, MMScaleError
from mmscale.io.software import git_commit, source_digest, versions
from mmscale.report.build import REPORT_FILE
from mmscale.report.configuration import save_origins
from mmscale.report.starts import StartRecord, add_start, read_starts
from mmscale.run.config import RunConfig
from mmscale.run.environment import write_environment
from mmscale.run.folder import CONFIG, finished_steps

_MOST_LISTED = 12
_WITHOUT_EFFECT = (
    "max_steps",
    "engine",
    "checkpoint",
    "metrics",
    "sample_log",
    "data.workers",
    "data.prefetch",
    "data.storage",
    "data.cache",
)
"""Keys that set how, where and how long a run trains. A change affects no finished step, except by rounding."""

Changes = dict[str, tuple[Any, Any]]
"""Old and new value by dotted key."""


def differences(old: BaseModel, new: BaseModel) -> Changes:
    """Return the values that differ between two run configurations. A missing key counts as null.

    ``run_dir`` is not compared: one folder has many paths.
    """
    before, after = dict(leaves(old)), dict(leaves(new))
    return {
        ".".join(key): (before.get(key), after.get(key))
        for key in {**before, **after}
        if before.get(key) != after.get(key) and key != ("run_dir",)
    }


def describe(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """Return ``key: old -> new`` for the first changes, and the number of further ones."""
    first = list(changes.items())[:_MOST_LISTED]
    listed = "; ".join(f"{key}: {_text(old)} -> {_text(new)}" for key, (old, new) in first)
    return listed + (f"; and {len(changes) - _MOST_LISTED} more" if len(changes) > _MOST_LISTED else "")


def _text(value: Any) -> str:
    return shorten(json.dumps(value, ensure_ascii=False, default=str))


def recorded_config(run_dir: Path) -> RunConfig | None:
    """Return the configuration of the newest recorded start, or None.

    Raises:
        ConfigError: ``config.yaml`` is damaged, or was written by a version with other keys.
    """
    path = run_dir / CONFIG
    if not path.is_file():
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DroppedKeyWarning)
        return load(path, [], RunConfig).value


def reject_or_report_finished(config: RunConfig, world: World) -> bool:
    """Return whether the run folder holds a finished run, and print that. All ranks must call.

    Raises:
        ConfigError: the configuration differs from that of the finished run in a key that changes the result, or the
            old configuration cannot be read; every rank raises. The message lists the keys with both values, and what
            the user can do.
        MMScaleError: ``result.json`` is damaged; every rank raises.
    """
    steps = message = rejection = None
    if world.is_main:
        try:
            steps = finished_steps(config)
        except MMScaleError as error:
            message = str(error)
    raise_on_any_rank(world, message, MMScaleError)
    if steps is not None:
        rejection = _judge_finished(config, steps)
    raise_on_any_rank(world, rejection, ConfigError)
    return any_rank(world, steps is not None)


def _judge_finished(config: RunConfig, steps: int) -> str | None:
    """Return why a start of a finished run is rejected. Otherwise print that there is nothing to do and return None."""
    where = f"run_dir={config.run_dir} holds a finished run of {steps} steps"
    anew = "To train anew, give another run_dir or remove the folder"
    longer = "To train this run longer, raise max_steps or stages.*.steps"
    if steps < config.total_steps:
        where += ", which ended early (evaluation.best.stop_after)"
        longer = "To train this run longer, raise evaluation.best.stop_after, or set it to null"
    try:
        old = recorded_config(config.run_dir)
    except ConfigError as error:
        return f"{where}, but its configuration cannot be compared. {anew}. ({error})"
    changes = {} if old is None else differences(old, config)
    rejected = {key: values for key, values in changes.items() if not _keeps_the_result(key)}
    if rejected:
        is_scored = any(key.startswith("evaluation.") for key in rejected)
        scores = " To score the trained model in another way, use `mmscale eval`." if is_scored else ""
        return (
            f"{where} that had another configuration; nothing was changed. {anew}. {longer} and put the other values "
            f"back.{scores} Different: {describe(rejected)}"
        )
    unused = f" Changed values without effect: {describe(changes)}." if changes else ""
    report = config.run_dir / REPORT_FILE
    print(
        f"mmscale: {where}: nothing to do. Its report is {report}.{unused} {longer}. {anew}.",
        file=sys.stderr,
        flush=True,
    )
    return None


def _keeps_the_result(key: str) -> bool:
    """Return whether a changed value leaves the result of a finished run as it is."""
    if key.startswith("stages.") and ".data." in key:
        key = "data." + key.partition(".data.")[2]
    return key != "engine.precision" and any(key == block or key.startswith(f"{block}.") for block in _WITHOUT_EFFECT)


class Start:
    """The current start of a run, on one rank.

    Args:
        loaded: The configuration, and the origin of each value.
        world: This rank.

    Attributes:
        config: The configuration.
        message: On rank 0 a sentence with the changes since the previous start, or with the reason why the previous
            configuration cannot be read. None on other ranks, at the first start, and without changes.
    """

    def __init__(self, loaded: Loaded[RunConfig], world: World) -> None:
        self.config = loaded.value
        self._loaded, self._world = loaded, world
        self._changes: Changes = {}
        self._is_recorded = self._is_same = False
        self.message: str | None = None
        if not world.is_main:
            return
        try:
            old = recorded_config(self.config.run_dir)
        except ConfigError as error:
            self.message = f"the configuration of the previous start cannot be compared: {error}"
            return
        self._changes = {} if old is None else differences(old, self.config)
        self._is_same = old is not None and not self._changes
        if self._changes:
            self.message = f"changed since the last start: {describe(self._changes)}"

    def record(self, step: int) -> None:
        """Record this start and write its configuration to ``RUN/config.yaml``. A second call does nothing.

        Call it after the model is resumed: a start that fails earlier must not replace ``config.yaml``. All ranks must
        call.

        Args:
            step: Finished steps of the run.

        Raises:
            MMScaleError: the folder cannot be written; every rank raises.
        """
        if self._is_recorded:
            return
        self._is_recorded = True
        message = None
        number = 0
        if self._world.is_main:
            try:
                number = self._write(step)
            except OSError as error:
                message = f"run_dir={self.config.run_dir}: {error.strerror}"
        raise_on_any_rank(self._world, message, MMScaleError)
        write_environment(self.config.run_dir / f"starts/environment-{number:04d}.json", self._world)

    def _write(self, step: int) -> int:
        """Write the files of this start and return its number."""
        folder = self.config.run_dir
        before = read_starts(folder)
        number = before[-1].start + 1 if before else 1
        text = dump(self.config).encode()
        name = before[-1].config if before and self._is_same else f"starts/config-{number:04d}.yaml"
        if not (folder / name).is_file():
            write_whole(folder / name, text, parents=True)
        write_whole(folder / CONFIG, text, parents=True)
        save_origins(folder, self._loaded.origins)
        commit = git_commit()
        record = StartRecord(
            start=number,
            time=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S"),
            step=step,
            world_size=self._world.world_size,
            config=name,
            changed={key: (_text(old), _text(new)) for key, (old, new) in self._changes.items()},
            versions=versions(),
            code=source_digest(),
            commit=commit[0] if commit else None,
            commit_changed=commit[1] if commit else None,
            host=socket.gethostname(),
            pid=os.getpid(),
        )
        add_start(folder, record)
        return number
