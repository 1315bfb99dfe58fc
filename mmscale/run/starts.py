"""What a start of a run changes: compares the configuration with that of the start before, and records both.

RUN/config.yaml (start before)  --differences-->  said at a resume; refused where the run is finished
RUN/starts/starts.jsonl         one line for each start: time, step, code, what changed
RUN/starts/config-0001.yaml     the configuration of start 1, and of those after it with equal values
"""

from __future__ import annotations

import json
import os
import socket
import sys
import warnings
from collections.abc import Mapping
from datetime import datetime, timezone
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
from mmscale.run.folder import CONFIG, finished_steps

_SHOWN = 12
_WITHOUT_EFFECT = (
    "max_steps",
    "engine",
    "checkpoint",
    "metrics",
    "ledger",
    "data.workers",
    "data.prefetch",
    "data.storage",
    "data.cache",
)
"""Keys that say how, where and until when a run trains. Another value changes no step that was made, up to rounding."""

Changes = dict[str, tuple[Any, Any]]
"""Old and new value by dotted key."""


def differences(old: BaseModel, new: BaseModel) -> Changes:
    """The values that two configurations of runs do not share; an absent key counts as null.

    ``run_dir`` is left out: one folder has many paths.
    """
    before, after = dict(leaves(old)), dict(leaves(new))
    return {
        ".".join(key): (before.get(key), after.get(key))
        for key in {**before, **after}
        if before.get(key) != after.get(key) and key != ("run_dir",)
    }


def describe(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """``key: old -> new`` for the first changes, and how many more there are."""
    shown = "; ".join(f"{key}: {_text(old)} -> {_text(new)}" for key, (old, new) in list(changes.items())[:_SHOWN])
    return shown + (f"; and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else "")


def _text(value: Any) -> str:
    return shorten(json.dumps(value, ensure_ascii=False, default=str))


def recorded_config(run_dir: Path) -> RunConfig | None:
    """The configuration of the newest start; None if there was none.

    Raises:
        ConfigError: ``config.yaml`` is damaged, or of a version with other keys.
    """
    path = run_dir / CONFIG
    if not path.is_file():
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DroppedKeyWarning)
        return load(path, [], RunConfig).value


def refuse_or_report_finished(config: RunConfig, world: World) -> bool:
    """Whether the run folder holds a finished run, which is said then. All ranks must call.

    Raises:
        ConfigError: it does, and the configuration asks for another result; every rank raises. The message has the keys
            with both values and the ways to go on.
        MMScaleError: ``result.json`` is damaged.
    """
    steps = complaint = refusal = None
    if world.is_main:
        try:
            steps = finished_steps(config)
        except MMScaleError as error:
            complaint = str(error)
    raise_on_any_rank(world, complaint, MMScaleError)
    if steps is not None:
        refusal = _judge_finished(config, steps)
    raise_on_any_rank(world, refusal, ConfigError)
    return any_rank(world, steps is not None)


def _judge_finished(config: RunConfig, steps: int) -> str | None:
    """Why a start of a finished run is refused; None after printing that there is nothing to do."""
    where = f"run_dir={config.run_dir} holds a finished run of {steps} steps"
    anew = "To train anew, give another run_dir or remove the folder"
    longer = "To train this run longer, raise max_steps or stages.*.steps"
    try:
        old = recorded_config(config.run_dir)
    except ConfigError as error:
        return f"{where}, but its configuration cannot be compared. {anew}. ({error})"
    changes = {} if old is None else differences(old, config)
    refused = {key: values for key, values in changes.items() if not _keeps_the_result(key)}
    if refused:
        is_scored = any(key.startswith("evaluation.") for key in refused)
        scores = " To score the trained model in another way, use `mmscale eval`." if is_scored else ""
        return (
            f"{where} that had another configuration; nothing was changed. {anew}. {longer} and put the other values "
            f"back.{scores} Different: {describe(refused)}"
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
    """Whether a finished run may ignore another value: ``max_steps`` ends a run and changes no step before."""
    if key.startswith("stages.") and ".data." in key:
        key = "data." + key.partition(".data.")[2]
    return key != "engine.precision" and any(key == block or key.startswith(f"{block}.") for block in _WITHOUT_EFFECT)


class Start:
    """This start of a run, on one rank.

    Args:
        loaded: The run.
        world: This rank.

    Attributes:
        config: The configuration.
        note: A sentence about what this start changes, on rank 0; None if it changes nothing or is the first.
    """

    def __init__(self, loaded: Loaded[RunConfig], world: World) -> None:
        self.config = loaded.value
        self._loaded, self._world = loaded, world
        self._changes: Changes = {}
        self._is_recorded = self._is_same = False
        self.note: str | None = None
        if not world.is_main:
            return
        try:
            old = recorded_config(self.config.run_dir)
        except ConfigError as error:
            self.note = f"the configuration of the start before cannot be compared: {error}"
            return
        self._changes = {} if old is None else differences(old, self.config)
        self._is_same = old is not None and not self._changes
        if self._changes:
            self.note = f"changed since the last start: {describe(self._changes)}"

    def record(self, step: int) -> None:
        """Records this start and makes its configuration that of the folder; the second call does nothing.

        Call it once the run has accepted the configuration, for example resumed its model. All ranks must call.

        Args:
            step: Steps of the run that are done.

        Raises:
            MMScaleError: the folder cannot be written; every rank raises.
        """
        if self._is_recorded:
            return
        self._is_recorded = True
        complaint = None
        if self._world.is_main:
            try:
                self._write(step)
            except OSError as error:
                complaint = f"run_dir={self.config.run_dir}: {error.strerror}"
        raise_on_any_rank(self._world, complaint, MMScaleError)

    def _write(self, step: int) -> None:
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
            time=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S"),
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
