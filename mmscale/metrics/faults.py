"""The list of samples that a run left out, in the run folder, for people and for the loader.

    StepBatch.skipped --FaultList, each rank its own file--> RUN/faults/rank-00000.jsonl

A line is written at once, so the list is whole when a run ends because of its faults. A resumed run first removes lines
of steps after its checkpoint, since those steps are made again. Not for: what a fault does
(``data_pipeline.order.fault_policy``), or counts of faults (``step_counts``).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from data_pipeline.errors import FaultKind
from data_pipeline.io.untrusted import append_regular, open_regular, parse_json
from data_pipeline.order.fault_policy import FaultConfig, Skipped
from mmscale.dist import World, raise_on_any_rank
from mmscale.errors import MMScaleError

_SHOWN = 20
"""Reasons that a process prints on the terminal; every sample is in the list."""
_OF_ONE_SAMPLE = re.compile(r"'[^']*'|\"[^\"]*\"|\b[0-9a-f]{8,}\b|\d+")
"""The parts of a reason that differ between samples with one fault: names, checksums and numbers."""


class FaultList:
    """The list of this rank.

    Args:
        folder: ``RUN/faults``, seen by all ranks.
        world: This rank.
        step: Steps done; lines of later ones are removed, since those steps are done again.
        note: Prints a line on the terminal.

    Raises:
        MMScaleError: the folder cannot be changed; every rank raises.
    """

    def __init__(self, folder: Path, world: World, step: int, note: Callable[[str], None]) -> None:
        self._path = folder / f"rank-{world.rank:05d}.jsonl"
        self._note, self._counts = note, dict[tuple[FaultKind, str], int]()
        complaint = None
        if world.is_main:
            try:
                folder.mkdir(exist_ok=True)
                for path in fault_lists(folder):
                    _cut_back(path, step)
            except OSError as error:
                complaint = f"the list of faults cannot be written: {error.filename or folder}: {error.strerror}"
        raise_on_any_rank(world, complaint, MMScaleError)

    def record(self, step: int, skipped: Sequence[Skipped]) -> None:
        """Write the samples that this rank left out in a step, numbered as in ``metrics.jsonl``.

        What ``data.faults.exclude`` names is on a list already and is counted only.

        Raises:
            MMScaleError: the disk refuses.
        """
        new = [skip for skip in skipped if skip.kind is not FaultKind.EXCLUDED]
        if not new:
            return
        lines = "".join(
            json.dumps({"step": step, **skip.record(), "action": skip.action.value}, ensure_ascii=False) + "\n"
            for skip in new
        )
        try:
            # Opened each time: no descriptor to keep, and one write appends whole lines.
            with append_regular(self._path) as file:
                file.write(lines.encode(errors="backslashreplace"))
        except OSError as error:
            raise MMScaleError(f"the list of faults cannot be written: {self._path}: {error.strerror}") from error
        self._show(new)

    def _show(self, skipped: Sequence[Skipped]) -> None:
        """Prints each reason with its first sample, then its count at 10, 100, 1,000, ... samples."""
        for skip in skipped:
            reason = (skip.kind, _OF_ONE_SAMPLE.sub("*", skip.reason))
            if reason not in self._counts:
                if len(self._counts) > _SHOWN:
                    continue
                if len(self._counts) == _SHOWN:
                    self._note(f"skipped samples with further reasons are listed in {self._path} only")
                else:
                    self._note(f"skipped {skip.shard}/{skip.key}: {skip.reason}")
            count = self._counts[reason] = self._counts.get(reason, 0) + 1
            if count > 1 and str(count).strip("0") == "1":
                self._note(f"skipped {count:,} samples for this reason so far: {skip.reason} (listed in {self._path})")


def fault_lists(folder: Path) -> list[Path]:
    """The lists of all ranks that ever ran in a run folder."""
    return sorted(folder.glob("rank-*.jsonl"))


def known_lists(folder: Path, config: FaultConfig) -> list[Path]:
    """The lists that spare a loader what it need not try again; none if nothing is quarantined."""
    return fault_lists(folder) if any(config.quarantines(kind) for kind in FaultKind) else []


def _cut_back(path: Path, step: int) -> None:
    """Truncates a list behind the last whole line of ``step`` or before; lines are in order of steps."""
    end = 0
    with open_regular(path) as file:
        for line in file:
            try:
                number = parse_json(line)["step"] if line.endswith(b"\n") else None
            except (ValueError, KeyError, TypeError):
                number = None
            if not isinstance(number, int) or number > step:
                break
            end += len(line)
    if end < path.stat().st_size:
        os.truncate(path, end)
